"""The way of one sample, one module a step:

rows           file, folder, saved or Hub data set → rows (files and hub find it, text_files and arrow_files read)
conversation   row → messages, or prompt and response
chat_template  conversation → text
mask           conversation → input_ids and labels: THE MASK
store          samples on disk, memory-mapped (build, samples and staging write it, fingerprint names it, ledger counts)
packing        lengths → packs
step_plan      packs → global steps → ranks → micro-batches
batch          micro-batch → tensors

`dataset` is the configuration of it all. Functions of plain values: no Lightning, no Hydra.
"""
