"""The way of one sample, a module a step:

rows          file, folder, saved or Hub data set → rows
conversation  row → messages, or prompt and response
tokenization  conversation → input_ids and labels: THE MASK (template: what text a conversation is)
store         samples on disk, memory-mapped (build makes it, fingerprint names it, ledger counts what was lost)
packing       lengths → packs
schedule      packs → global steps → ranks → micro-batches
batch         micro-batch → tensors

`dataset` is the configuration of it all. Functions of plain values: no Lightning, no Hydra.
"""
