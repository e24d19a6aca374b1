#!/usr/bin/env bash
#SBATCH --job-name=flallm-features
#SBATCH --nodes=1                  # as many as you like
#SBATCH --gpus-per-node=8          # of each node; a GPU is a rank
#SBATCH --cpus-per-task=64         # of each node: for every GPU data.workers of the recipe, and two more
#SBATCH --time=02:00:00            # what your partition allows
#SBATCH --signal=USR1@120          # seconds before that to end: the job goes on from the shards that are done
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log  # one log a job
##SBATCH --partition=…             # if your cluster wants one: one # less
##SBATCH --account=…               # likewise
#
#   sbatch slurm/features.sh /path/to/stage-1-run --out=/path/to/features
#
# Everything after the script goes to `flallm features`.
set -euo pipefail
# This script's own path: what runs is a copy. An array's tasks answer all, with the same.
slurm=$(scontrol show job "$SLURM_JOB_ID" | awk '$1 ~ /^Command=/ && !seen++ { sub("Command=", "", $1); print $1 }')
. "${slurm%/*}/run.sh"
flallm_on_all_ranks features "$@"
