#!/usr/bin/env bash
#SBATCH --job-name=flallm-ablate
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1          # a run of the table each
#SBATCH --cpus-per-task=8          # for every GPU data.workers of the recipe, and two more
#SBATCH --time=24:00:00            # what your partition allows; a run goes on in as many of these as it needs
#SBATCH --signal=USR1@300          # seconds before that to finish a step and write a checkpoint
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log      # one log a run
#
#   flallm ablate phoenix14t --table=4,9 --seeds=3 --out=/path/to/ablate --where=slurm --sbatch="--partition=…"
#
# submits this script as arrays of jobs: those that need no other run, then the features of a stage 1 that a table reads, then those on top of it.
set -euo pipefail
# The path of this script, of which Slurm runs a copy. Slurm tells it with the arguments after it, and
# a path may hold blanks, too. All tasks of an array answer, with the same path.
script=$(scontrol show job "$SLURM_JOB_ID" | awk '!seen && sub(/^ *Command=/, "") { print; seen = 1 }')
while [[ ! -f $script && $script == *" "* ]]; do script=${script% *}; done
slurm=${script%/*}
. "$slurm/run.sh"
flallm_on_all_ranks ablate "$@" --run="$SLURM_ARRAY_TASK_ID"
