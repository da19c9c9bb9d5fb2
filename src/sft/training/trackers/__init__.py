"""Trackers: who gets a run's figures besides its metrics.csv.

choose        which trackers a run has, and their end
guard         no failure of a tracker ends a run; waiting: nor does a server that hangs
about         what they are told of a run
wandb_run     Weights & Biases (wandb_server: whether it can be used; wandb_files: artefacts)
tensorboard, mlflow
alerts        what needs a look; notify: of a job that has ended
nodes         the load of every node
"""
