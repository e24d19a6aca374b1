# What the scripts beside this one share; they read it in, nobody runs it.

# Your cluster's modules, if Python or CUDA come from there:
# module load …

PATH="$slurm/../.venv/bin:$PATH"

# flallm_on_all_ranks COMMAND ARGUMENTS…: runs it on every task of the job, and puts the job back in the queue if it is to go on.
flallm_on_all_ranks() {
    local code=0 ranks=${SLURM_GPUS_ON_NODE:-1}
    local cpus=$((${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE} / ranks))
    srun --ntasks-per-node="$ranks" --ntasks=$((SLURM_NNODES * ranks)) --cpus-per-task=$((cpus > 0 ? cpus : 1)) \
        --kill-on-bad-exit=1 flallm "$@" || code=$?
    case $code in
        0 | 2) ;;                    # done, or a mistake that another try would repeat
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
