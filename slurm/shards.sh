#!/usr/bin/env bash
#SBATCH --job-name=flallm-shards
#SBATCH --array=0-15               # this many parts, each on a node of its own choice
#SBATCH --cpus-per-task=16         # a clip is encoded by one core
#SBATCH --time=24:00:00            # what your partition allows; a part that was cut off goes on when it is submitted again
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A-%a.log
##SBATCH --partition=…             # if your cluster wants one: one # less
##SBATCH --account=…               # likewise
#
#   sbatch slurm/shards.sh phoenix14t /path/to/PHOENIX-2014-T-release-v3 --out=/path/to/shards
#
#   sbatch --array=0 --dependency=afterok:JOB slurm/shards.sh …   with the same words joins the parts once that job is done
#
# Everything after the script goes to tools/make_shards.py, which makes the part of this task of the array.
set -euo pipefail
# The path of this script, of which Slurm runs a copy. Slurm tells it with the arguments after it, and
# a path may hold blanks, too. All tasks of an array answer, with the same path.
script=$(scontrol show job "$SLURM_JOB_ID" | awk '!seen && sub(/^ *Command=/, "") { print; seen = 1 }')
while [[ ! -f $script && $script == *" "* ]]; do script=${script% *}; done
slurm=${script%/*}
. "$slurm/run.sh"
python "$slurm/../tools/make_shards.py" "$@" --part="$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"
