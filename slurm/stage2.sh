#!/usr/bin/env bash
#SBATCH --job-name=flallm-stage2
#SBATCH --nodes=1                  # as many as you like; the batch of a recipe is shared out over all GPUs
#SBATCH --ntasks-per-node=8        # one task a GPU: the number of GPUs of a node
#SBATCH --gpus-per-node=8          # the same number
#SBATCH --cpus-per-task=8          # data.workers of the recipe, and two more
#SBATCH --time=24:00:00            # what your partition allows
#SBATCH --output=flallm-%x-%j.log  # one log a job
#SBATCH --open-mode=append
##SBATCH --partition=…             # if your cluster wants one: one # less
##SBATCH --account=…               # likewise
#
#   sbatch slurm/stage2.sh phoenix14t --stage1=/path/to/stage-1-run --run_dir=/path/to/run
#   sbatch --nodes=4 slurm/stage2.sh …           (options of sbatch go before the script)
#
# Everything after the script goes to `flallm stage2`. Submit from the folder of the repo, or with flallm on PATH.
set -euo pipefail

# Your cluster's modules, if Python or CUDA come from there:
# module load …

PATH="${SLURM_SUBMIT_DIR:-.}/.venv/bin:$PATH"

# Where the ranks meet: the first node of the job, and a port that two jobs on one node do not share.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

srun --kill-on-bad-exit=1 flallm stage2 "$@"
