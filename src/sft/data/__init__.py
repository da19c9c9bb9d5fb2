"""The way of one sample, one module a step:

rows           file, folder, saved or Hub data set → rows
conversation   row → messages, prompt and response, or token ids (by message, tool_calls and token_ids; shape finds out
               which function reads a file's rows, among shapes)
chat_template  conversation → text
mask           conversation → input_ids and labels: THE MASK
store          samples on disk, memory-mapped (build writes it, fingerprint names it, ledger counts what was lost)
packing        lengths → packs
step_plan      packs → global steps → ranks → micro-batches
batch          micro-batch → tensors

`dataset` is the configuration of it all. Functions of plain values: no Lightning, no Hydra.
"""
