#!/usr/bin/env bash
#SBATCH --job-name=flallm-stage1
#SBATCH --nodes=1          # if a node dies, --nodes=4 waits for another, --nodes=1-4 resumes
#SBATCH --gpus-per-node=8  # per node; a GPU is a rank, and every rank needs one clip of train.batch
#SBATCH --cpus-per-task=64 # per node: data.workers of the recipe and two more for each GPU
#SBATCH --time=24:00:00    # what your partition allows; the job requeues itself until it is done
#SBATCH --signal=USR1@300  # seconds before the limit, to finish a step and write a checkpoint
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log # one log per job
##SBATCH --partition=…     # if your cluster needs it: remove one #
##SBATCH --account=…       # the same
#
#   sbatch slurm/stage1.sh phoenix14t --data.shards=/path/to/shards --run_dir=/path/to/run
#   sbatch --nodes=4 slurm/stage1.sh … --train.batch=256   (options of sbatch go before the script)
#
# Everything after the script goes to `flallm stage1`.
set -euo pipefail
# Slurm runs a copy of this script. scontrol tells the original path, with the arguments after it.
# A path may hold blanks. All tasks of an array answer with the same path.
script=$(scontrol show job "$SLURM_JOB_ID" | awk '!seen && sub(/^ *Command=/, "") { print; seen = 1 }')
while [[ ! -f $script && $script == *" "* ]]; do script=${script% *}; done
slurm=${script%/*}
. "$slurm/run.sh"
flallm_on_all_ranks stage1 "$@"
