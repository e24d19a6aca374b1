#!/usr/bin/env bash
#SBATCH --job-name=flallm-evaluate
#SBATCH --nodes=1                  # as many as you like
#SBATCH --gpus-per-node=8          # of each node; a GPU is a rank
#SBATCH --cpus-per-task=64         # of each node: for every GPU data.workers of the recipe, and two more
#SBATCH --time=02:00:00            # what your partition allows
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log  # one log a job
##SBATCH --partition=…             # if your cluster wants one: one # less
##SBATCH --account=…               # likewise
#
#   sbatch slurm/evaluate.sh /path/to/run --split=test
#
# Everything after the script goes to `flallm evaluate`.
set -euo pipefail
# The path of this script, of which Slurm runs a copy. Slurm tells it with the arguments after it, and
# a path may hold blanks, too. All tasks of an array answer, with the same path.
script=$(scontrol show job "$SLURM_JOB_ID" | awk '!seen && sub(/^ *Command=/, "") { print; seen = 1 }')
while [[ ! -f $script && $script == *" "* ]]; do script=${script% *}; done
slurm=${script%/*}
. "$slurm/run.sh"
flallm_on_all_ranks evaluate "$@"
