#!/usr/bin/env bash
#SBATCH --job-name=flallm-ablate
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1  # each for one run of the table
#SBATCH --cpus-per-task=8  # data.workers of the recipe and two more for each GPU
#SBATCH --time=24:00:00    # what your partition allows; a run requeues itself until it is done
#SBATCH --signal=USR1@300  # seconds before the limit, to finish a step and write a checkpoint
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log  # one log per run
#
#   flallm ablate phoenix14t --table=4,9 --seeds=3 --out=/path/to/ablate --where=slurm \
#     --sbatch="--partition=…"
#
# submits this script as arrays of jobs: first the runs that need no other run, then the features
# that a table reads, then the runs that need those.
set -euo pipefail
# Slurm runs a copy of this script. scontrol tells the original path, with the arguments after it.
# A path may hold blanks. All tasks of an array answer with the same path.
script=$(scontrol show job "$SLURM_JOB_ID" | awk '!seen && sub(/^ *Command=/, "") { print; seen = 1 }')
while [[ ! -f $script && $script == *" "* ]]; do script=${script% *}; done
slurm=${script%/*}
. "$slurm/run.sh"
flallm_on_all_ranks ablate "$@" --run="$SLURM_ARRAY_TASK_ID"
