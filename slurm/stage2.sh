#!/usr/bin/env bash
#SBATCH --job-name=flallm-stage2
#SBATCH --nodes=1                  # as many as you like. When a node dies, --nodes=4 waits for another, --nodes=1-4 goes on with those left
#SBATCH --gpus-per-node=8          # of each node; a GPU is a rank, and every rank needs one of the clips of train.batch
#SBATCH --cpus-per-task=64         # of each node: for every GPU data.workers of the recipe, and two more
#SBATCH --time=24:00:00            # what your partition allows; the job goes on in as many of these as it needs
#SBATCH --signal=USR1@300          # seconds before that to finish a step and write a checkpoint
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log  # one log a job
##SBATCH --partition=…             # if your cluster wants one: one # less
##SBATCH --account=…               # likewise
#
#   sbatch slurm/stage2.sh phoenix14t --stage1=/path/to/stage-1-run --data.shards=/path/to/shards --run_dir=/path/to/run
#
# Everything after the script goes to `flallm stage2`.
set -euo pipefail
# The path of this script, of which Slurm runs a copy. Slurm tells it with the arguments after it, and
# a path may hold blanks, too. All tasks of an array answer, with the same path.
script=$(scontrol show job "$SLURM_JOB_ID" | awk '!seen && sub(/^ *Command=/, "") { print; seen = 1 }')
while [[ ! -f $script && $script == *" "* ]]; do script=${script% *}; done
slurm=${script%/*}
. "$slurm/run.sh"
flallm_on_all_ranks stage2 "$@"
