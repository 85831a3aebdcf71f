# Sourced by the SLURM examples: launch the training on the job's nodes, and requeue the job until the run is done.
#
#   run_and_requeue SAVE_FOLDER MAX_RESTARTS pretrain_genlip.py FLAGS...
#
# Before the time limit SLURM signals the job's script (#SBATCH --signal=B:USR1@...), and the script signals the training
# processes, which save and leave together. torchrun ends with status 1 for any failure of its workers, so the save
# folder decides what happens next:
#   torchrun ended with 0                          the run is done: not requeued
#   final_exit says 2, 18 or 19 for this start     wrong setting, bad data or bad numbers: not requeued, it would repeat
#   SAVE_FOLDER/stop, or stop.obeyed               someone stopped the run: not requeued
#   a newer checkpoint than at the start           preempted, or a process or node failed: requeued
#   no newer checkpoint                            requeued, but not after the third such start in a row
# A failing node may kill this script or end the job; then SLURM itself requeues the job (#SBATCH --requeue). So a start
# is counted before it happens, and the count is reset when a newer checkpoint exists.
# Each start resumes from the newest good checkpoint of SAVE_FOLDER. So do restarts of workers within one start;
# torchrun makes at most MAX_RESTARTS.

readonly MAX_STARTS_WITHOUT_PROGRESS=3

# Step of a folder's newest checkpoint; 0 if there is none.
latest_step() {
    local step=0 file=$1/latest_checkpointed_iteration.txt
    [ -f "$file" ] && read -r step _ <"$file"
    [[ $step =~ ^[0-9]+$ ]] || step=0
    echo "$((10#$step))"
}

# Number of starts of this job in a row from its current step; starts of other jobs do not count.
starts_without_progress() {
    local job="" count=0 step=0 file=$1/requeues_without_progress
    [ -f "$file" ] && read -r job count step _ <"$file"
    [[ $job == "$SLURM_JOB_ID" && $count =~ ^[0-9]+$ && $step =~ ^[0-9]+$ ]] || count=0
    ((count == 0 || $(latest_step "$1") <= step)) || count=0
    echo "$count"
}

# End the job after too many starts in a row without progress.
give_up_without_progress() {
    (($2 < MAX_STARTS_WITHOUT_PROGRESS)) && return
    echo "slurm_run.sh: not requeued: $2 starts in a row ended with an error before a checkpoint newer than" \
        "step $(latest_step "$1") was saved in $1. Fix the error above and submit the job again." >&2
    exit "$3"
}

# Final exit status of the workers of a launch; 0 if there is none.
final_status() {
    local status=0 launch="" file=$1/final_exit
    [ -f "$file" ] && read -r status launch _ <"$file"
    [[ $launch == "$2" ]] || status=0
    echo "$status"
}

tell_training() {
    signalled=1
    # Only the training processes: the signal would kill torchrun itself.
    srun --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
        pkill -USR1 -f '^[^ ]*python[0-9.]* -u pretrain_genlip\.py' || true
}

run_and_requeue() {
    local save=$1 restarts=$2 head before count status training
    shift 2
    # Unique for this start: a requeued job keeps its number.
    local launch=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    before=$(latest_step "$save")
    count=$(starts_without_progress "$save")
    give_up_without_progress "$save" "$count" 1  # SLURM requeued it each time, after a node had failed
    mkdir -p "$save" && echo "$SLURM_JOB_ID $((count + 1)) $before" >"$save/requeues_without_progress"
    rm -f "$save/stop.obeyed"
    trap tell_training USR1

    # Each start needs a new store: torchrun's still holds the addresses of dead workers.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node 8 \
        --rdzv-id "$launch" --rdzv-backend c10d --rdzv-endpoint "$head:29500" --max-restarts "$restarts" "$@" &
    training=$!
    # A trapped signal ends `wait` while the training is still saving.
    signalled=1
    while ((signalled)); do
        signalled=0
        wait "$training"
        status=$?
    done

    if ((status == 0)); then
        rm -f "$save/requeues_without_progress"
        echo "slurm_run.sh: done, at step $(latest_step "$save") of $save"
        exit 0
    fi
    case $(final_status "$save" "$launch") in
        2 | 18 | 19)
            echo "slurm_run.sh: not requeued: the training left with status $(final_status "$save" "$launch")," \
                "which a restart does not fix; the error is above" >&2
            exit "$status"
            ;;
    esac
    if [ -e "$save/stop" ] || [ -e "$save/stop.obeyed" ]; then
        echo "slurm_run.sh: not requeued: the stop file $save/stop ended it. Submit the job again to continue." >&2
        exit "$status"
    fi
    count=$(starts_without_progress "$save")
    give_up_without_progress "$save" "$count" "$status"
    echo "slurm_run.sh: requeued at step $(latest_step "$save") (step $before at the start, $count starts without progress)"
    scontrol requeue "$SLURM_JOB_ID"
    exit "$status"
}
