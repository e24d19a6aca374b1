#!/usr/bin/env bash
#SBATCH --job-name=flallm-evaluate
#SBATCH --nodes=1          # any number
#SBATCH --gpus-per-node=8  # per node; a GPU is a rank
#SBATCH --cpus-per-task=64 # per node: data.workers of the recipe and two more for each GPU
#SBATCH --time=02:00:00    # what your partition allows
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log # one log per job
##SBATCH --partition=…     # if your cluster needs it: remove one #
##SBATCH --account=…       # the same
#
#   sbatch slurm/evaluate.sh /path/to/run --split=test
#
# Everything after the script goes to `flallm evaluate`.
set -euo pipefail
# Slurm runs a copy of this script. scontrol tells the original path, with the arguments after it.
# A path may hold blanks. All tasks of an array answer with the same path.
script=$(scontrol show job "$SLURM_JOB_ID" | awk '!seen && sub(/^ *Command=/, "") { print; seen = 1 }')
while [[ ! -f $script && $script == *" "* ]]; do script=${script% *}; done
slurm=${script%/*}
. "$slurm/run.sh"
flallm_on_all_ranks evaluate "$@"
