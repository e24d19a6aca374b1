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
# This script's own path: what runs is a copy. An array's tasks answer all, with the same.
slurm=$(scontrol show job "$SLURM_JOB_ID" | awk '$1 ~ /^Command=/ && !seen++ { sub("Command=", "", $1); print $1 }')
. "${slurm%/*}/run.sh"
python "${slurm%/*}/../tools/make_shards.py" "$@" --part="$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"
