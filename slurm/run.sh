# What the scripts in this folder share. They source it; do not run it.

# Load your cluster's modules here, if Python or CUDA come from them:
# module load …

PATH="$slurm/../.venv/bin:$PATH"

# flallm_on_all_ranks COMMAND ARGUMENTS…: runs flallm on every task of the job, and requeues the job
# if it has to resume.
flallm_on_all_ranks() {
    local code=0 ranks=${SLURM_GPUS_ON_NODE:-1}
    local cpus=$((${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE} / ranks))
    srun --ntasks-per-node="$ranks" --ntasks=$((SLURM_NNODES * ranks)) --cpus-per-task=$((cpus > 0 ? cpus : 1)) \
        --kill-on-bad-exit=1 flallm "$@" || code=$?
    case $code in
        0 | 2) ;;                    # done, or a mistake that would repeat
        75) again "all is saved" ;;  # flallm was asked to stop
        138) again "the signal came before the trainer could save" ;;
        *) timeout 60 srun --overlap --ntasks-per-node=1 --ntasks="$SLURM_NNODES" --cpus-per-task=1 true || again "a node does not answer" ;;
    esac
    exit $code
}

again() {
    echo "$(date '+%F %T')  $1: job $SLURM_JOB_ID goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60 # until Slurm ends this script: the job is not over
}
