# Everything particular to this site. Edit it once: all batch scripts here read it, from the project's folder.

# The account and the partition of every job. sft submit reads them here; before a plain sbatch, source this file.
# export SBATCH_ACCOUNT=my-project SBATCH_PARTITION=gpu

# The project's commands. Without a container they are in the environment that `make install` made.
# EDIT if Python comes from modules: module load python/3.12 cuda/12.8
PATH="$PWD/.venv/bin:$PATH"

# Containers. EDIT: an image with this project installed, as `container` names it.
#   Apptainer:      container=(apptainer exec --nv --bind "$PWD" "$PWD/sft.sif")
#   Pyxis/enroot (the batch script's own commands run outside of the container, so `make install` is needed too):
#                   srun_options=(--container-image="$PWD/sft.sqsh" --container-mounts="$PWD:$PWD" --container-workdir="$PWD")
container=()
srun_options=()

# The network between nodes. EDIT if NCCL doesn't find the fast one by itself:
# export NCCL_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5

# step [srun options] COMMAND ...   on nodes of the allocation
step() { srun "${srun_options[@]}" "$@"; }
# here COMMAND ...                  on the batch script's own node, even when Slurm no longer starts steps
here() { "${container[@]}" "$@"; }
