# What is particular to this site: edit it once; all batch scripts here read it, from the project's folder.

# The account and the partition of every job. sft submit reads them here; for sbatch itself, source this file first.
# export SBATCH_ACCOUNT=my-project SBATCH_PARTITION=gpu

# Where the project's commands are found. Bare environment: the one that `make install` has made.
# EDIT where Python comes from modules: module load python/3.12 cuda/12.8
PATH="$PWD/.venv/bin:$PATH"

# Containers. EDIT: an image with this project installed, as `container` names it.
#   Apptainer:      container=(apptainer exec --nv --bind "$PWD" "$PWD/sft.sif")
#   Pyxis/enroot (what the batch script itself calls runs outside of it: `make install` as well):
#                   srun_options=(--container-image="$PWD/sft.sqsh" --container-mounts="$PWD:$PWD" --container-workdir="$PWD")
container=()
srun_options=()

# The network of many nodes. EDIT where NCCL doesn't find the fast one by itself:
# export NCCL_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5

# step [srun options] COMMAND ...   on nodes of the allocation
step() { srun "${srun_options[@]}" "$@"; }
# here COMMAND ...                  on the batch script's own node, also when Slurm starts no new steps any more
here() { "${container[@]}" "$@"; }
