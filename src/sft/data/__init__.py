"""The way of one sample, one module a step:

rows           file, folder, saved or Hub data set → rows (files and hub find it, text_files and arrow_files read)
conversation   row → messages, prompt and response, or token ids (by message, tool_calls and token_ids; shape finds out
               which function reads a file's rows, among shapes)
chat_template  conversation → text (rendering finds the turns in it, outline the same at once, pieces what is missing)
mask           conversation → input_ids and labels: THE MASK (encoding has the tokens of the text)
store          samples on disk, memory-mapped (build, samples and staging write it, fingerprint names it, ledger counts)
packing        lengths → packs
step_plan      packs → global steps → ranks → micro-batches
batch          micro-batch → tensors

`dataset` is the configuration of it all. Functions of plain values: no Lightning, no Hydra.
"""
