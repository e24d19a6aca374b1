#!/usr/bin/env bash
#SBATCH --job-name=flallm-shards
#SBATCH --array=0-15       # this many parts; each may run on another node
#SBATCH --cpus-per-task=16 # one core encodes one clip
#SBATCH --time=24:00:00    # what your partition allows; submit a cut-off part again to resume it
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A-%a.log
##SBATCH --partition=…     # if your cluster needs it: remove one #
##SBATCH --account=…       # the same
#
#   sbatch slurm/shards.sh phoenix14t /path/to/PHOENIX-2014-T-release-v3 --out=/path/to/shards
#
#   sbatch --array=0 --dependency=afterok:JOB slurm/shards.sh …
#
# with the same arguments joins the parts after that job.
#
# Everything after the script goes to tools/make_shards.py, which makes this task's part.
set -euo pipefail
# Slurm runs a copy of this script. scontrol tells the original path, with the arguments after it.
# A path may hold blanks. All tasks of an array answer with the same path.
script=$(scontrol show job "$SLURM_JOB_ID" | awk '!seen && sub(/^ *Command=/, "") { print; seen = 1 }')
while [[ ! -f $script && $script == *" "* ]]; do script=${script% *}; done
slurm=${script%/*}
. "$slurm/run.sh"
python "$slurm/../tools/make_shards.py" "$@" --part="$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"
