# Sourced by the SLURM examples: check the run, launch it on the job's nodes, and requeue the job until the run is done.
#
#   run_and_requeue MAX_RESTARTS pretrain_genlip.py --save SAVE_FOLDER FLAGS...
#
# Before the time limit SLURM signals the job's script (#SBATCH --signal=B:USR1@...), and the script signals its own
# job's processes, which save and leave together. torchrun ends with status 1 for any failure of its workers, so the
# save folder and SLURM decide what happens next:
#   torchrun ended with 0                          the run is done: not requeued
#   final_exit says 2, 18 or 19 for this start     wrong setting, bad data or bad numbers: not requeued, it would repeat
#   SAVE_FOLDER/stop, or stop.obeyed               someone stopped the run: not requeued
#   SLURM says the job is not RUNNING              cancelled, or out of time; or SLURM has requeued it: not requeued here
#   a newer checkpoint than at the start           out of time, preempted, or a process or node failed: requeued
#   no newer checkpoint                            requeued, but not after the third such start in a row
# A failing node may kill this script or end the job; then SLURM itself requeues the job (#SBATCH --requeue). So a start
# is counted before it happens, and the count is reset when a newer checkpoint exists. A preempted start does not count.
# Each start resumes from the newest good checkpoint of SAVE_FOLDER. So do restarts of workers within one start;
# torchrun makes at most MAX_RESTARTS.
#
# Before each start the nodes are checked: GPUs, disk, clock. The job is requeued without those that fail.
#
# SAVE_FOLDER/logs/JOB/ gets
#   starts.log                one line for each start: nodes, steps, seconds, how it ended
#   start-N/job.log           messages of this script and of SLURM
#   start-N/NODE.log          output of all ranks of a node; start-N/NODE/... one file for each rank
#   code/                     what was submitted: every start of the job runs this copy and its config.yaml
source "${BASH_SOURCE[0]%/*}/launch.sh"

readonly MAX_STARTS_WITHOUT_PROGRESS=3

say() { echo "slurm_run.sh: $*"; }

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
    end_start "$3" "not requeued: $2 starts in a row ended with an error before a checkpoint newer than" \
        "step $(latest_step "$1") was saved in $1. Fix the error above and submit the job again."
}

# Final exit status of the workers of a launch; 0 if there is none.
final_status() {
    local status=0 launch="" file=$1/final_exit
    [ -f "$file" ] && read -r status launch _ <"$file"
    [[ $launch == "$2" ]] || status=0
    echo "$status"
}

# A field of what SLURM says about this job, such as JobState.
job_field() { scontrol --oneliner show job "$SLURM_JOB_ID" | grep -oE "(^| )$1=[^ ]*" | cut -d= -f2; }

# Processes of the job. Outside of a job, from the #SBATCH lines of the script that was called.
world_size() {
    local nodes=${SLURM_JOB_NUM_NODES:-} count
    if [ -z "$nodes" ]; then
        nodes=$(sed -n 's/^#SBATCH --nodes=//p' "$0")
        GPUS_PER_NODE=${GPUS_PER_NODE:-$(sed -n 's/^#SBATCH --gpus-per-node=//p' "$0")}
    fi
    count=$(processes_per_node)
    echo "$((nodes * count))"
}

# End this start with a status, and say how it ended.
end_start() {
    local status=$1 line
    shift
    line="start ${SLURM_RESTART_COUNT:-0} of job $SLURM_JOB_ID | nodes $SLURM_JOB_NODELIST | $SECONDS s |"
    line+=" steps $before to $(latest_step "$save") | $*"
    say "$line"
    echo "$(date +%FT%T) $line" >>"$job_folder/starts.log"
    exit "$status"
}

# Continue the log that SLURM opened in the folder of the sbatch call in the folder of this start.
move_log() {
    mkdir -p "$start_folder" || exit
    # Within a file system SLURM's own messages follow the file.
    mv "$SLURM_SUBMIT_DIR/$SLURM_JOB_NAME-$SLURM_JOB_ID.log" "$start_folder/job.log" 2>/dev/null || true
    exec >>"$start_folder/job.log" 2>&1
}

# Copy the code, the resolved settings and a list of the packages, for all starts of this job.
take_snapshot() {
    local new=$job_folder/code.partial
    rm -rf "$new" && mkdir -p "$new" && cp -r genlip_megatron pretrain_genlip.py examples "$new" || return
    git describe --always --abbrev=40 --exclude='*' --dirty=+changes >"$new/REVISION" 2>/dev/null
    python -m pip freeze >"$new/packages.txt" 2>/dev/null
    python "$@" --print-config >"$new/config.yaml" && mv "$new" "$job_folder/code"
}

# The last --save of a command line.
save_of() {
    local folder=""
    while (($#)); do
        case $1 in
            --save) folder=${2:-} ;;
            --save=*) folder=${1#*=} ;;
        esac
        shift
    done
    echo "${folder:?--save is missing}"
}

# Nodes on which training would fail or wait, each with the reason: "NODE REASON".
unfit_nodes() {
    # shellcheck disable=SC2016
    local facts='gpus=0 used=0
        if command -v nvidia-smi >/dev/null; then
            gpus=$(nvidia-smi -L | grep -c "^GPU ")
            used=$(nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits | sort -n | tail -n 1)
        else
            gpus=$1
        fi
        echo "$SLURMD_NODENAME $(date +%s) $(df --output=avail -m "${TMPDIR:-/tmp}" | tail -n 1) $gpus ${used:-0}"'
    srun --ntasks-per-node=1 --cpu-bind=none --mem=0 bash -c "$facts" facts "$(processes_per_node)" |
        while read -r node clock disk gpus used; do
            skew=$((clock - $(date +%s)))
            ((${skew#-} <= 60)) || echo "$node clock differs by $skew s"
            ((disk >= 1000)) || echo "$node only $disk MiB free for temporary files"
            ((gpus >= $(processes_per_node))) || echo "$node only $gpus GPUs"
            ((used <= 2000)) || echo "$node another process uses $used MiB of a GPU"
        done
}

# Requeue the job, unless SLURM ends it: a requeue would bring a cancelled job back.
requeue() { # STATUS NODES-TO-AVOID WHAT
    local state avoid
    state=$(job_field JobState)
    if [ "$state" != RUNNING ]; then
        end_start "$1" "not requeued by this script: SLURM ended the job, which is now ${state:-unknown to it}"
    fi
    avoid=$(job_field ExcNodeList)
    [ "$avoid" != "(null)" ] || avoid=""
    scontrol requeue "$SLURM_JOB_ID" ||
        end_start "$1" "not requeued: scontrol requeue failed. Submit the job again to continue."
    [ -z "$2" ] || scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=${avoid:+$avoid,}$2"
    end_start "$1" "requeued $3"
}

# A preemption is no failure: do not count this start. SLURM shows PreemptTime only while it gives the job time to end.
forget_start_if_preempted() {
    if [[ $(job_field PreemptTime) == 2* ]] || grep -qs "DUE TO PREEMPTION" "$start_folder/job.log"; then
        echo "$SLURM_JOB_ID $count $before" >"$save/requeues_without_progress"
    fi
}

# Before the time limit: tell the processes of this job, and no others, to save and leave.
tell_training() {
    # scancel says nothing if there is no step. torch 2.11's torchrun would kill its workers 30 s after the signal.
    if squeue --noheader --steps --jobs="$SLURM_JOB_ID" --format=%i | grep -qE '\.[0-9]+$' &&
        python -c 'import sys; from importlib.metadata import version as v
sys.exit(tuple(map(int, v("torch").split(".")[:2])) < (2, 12))' && scancel --signal=USR1 "$SLURM_JOB_ID"; then
        say "time is almost up: told the training to save and leave"
    elif [ -e "$save/stop" ] || { touch "$save/stop" && told_by_file=1; }; then
        say "time is almost up: told the training to save and leave by $save/stop"
    else
        say "time is almost up, but nobody could be told: work since the last checkpoint will be lost" >&2
    fi
}

run_and_requeue() {
    local restarts=$1 head status training launch unfit
    shift
    save=$(save_of "$@") || exit
    before=0 count=0 told_by_file=0
    if [ -z "${SLURM_JOB_ID:-}" ]; then
        [[ " $* " == *" --dry-run "* ]] || { echo "Submit this script with sbatch, or add --dry-run." >&2 && exit 2; }
        check_flags "$(world_size)" "$@"
    fi
    # Unique for this start: a requeued job keeps its number.
    launch=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
    job_folder=$save/logs/$SLURM_JOB_ID
    start_folder=$job_folder/start-${SLURM_RESTART_COUNT:-0}
    move_log
    before=$(latest_step "$save")
    if [ ! -d "$job_folder/code" ]; then
        # On one node in seconds, not on all after minutes. Other failures may go away, so the training decides.
        WORLD_SIZE=$(world_size) python "$@" --dry-run
        status=$?
        ((status != 2)) || end_start 2 "not requeued: the settings are wrong; the error is in $start_folder/job.log"
        [[ " $* " != *" --dry-run "* ]] || end_start "$status" "dry run: not started"
        take_snapshot "$@" || end_start 1 "not started: $job_folder/code could not be written"
    fi
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    count=$(starts_without_progress "$save")
    give_up_without_progress "$save" "$count" 1 # SLURM requeued it each time, after a node had failed
    trap tell_training USR1
    trap forget_start_if_preempted TERM # and stay: SLURM ends the step, then this script says how it ended
    unfit=$(unfit_nodes)
    if [ -n "$unfit" ]; then
        say "$unfit"
        requeue 1 "$(cut -d' ' -f1 <<<"$unfit" | sort -u | paste -sd,)" "without ${unfit//$'\n'/; }"
    fi
    echo "$SLURM_JOB_ID $((count + 1)) $before" >"$save/requeues_without_progress"
    rm -f "$save/stop.obeyed"

    say "start ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST from step $before; output in $start_folder/$head.log"
    # Without the flags a step may get one core and little memory. exec: SLURM signals only the processes it started.
    srun --kill-on-bad-exit=1 --cpu-bind=none --cpus-per-task="$SLURM_CPUS_ON_NODE" --mem=0 \
        --output="$start_folder/%N.log" bash -c 'exec torchrun --log-dir "$0/$SLURMD_NODENAME" --tee 3 "$@"' \
        "$start_folder" --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$(processes_per_node)" \
        --rdzv-id "$launch" --rdzv-backend c10d --rdzv-endpoint "$head:$(port_of "$SLURM_JOB_ID")" \
        --max-restarts "$restarts" "$job_folder/code/pretrain_genlip.py" --config "$job_folder/code/config.yaml" &
    training=$!
    # A trapped signal ends `wait` while the training is still saving.
    while :; do
        wait "$training"
        status=$?
        kill -0 "$training" 2>/dev/null || break
    done

    ((told_by_file == 0)) || rm -f "$save/stop" "$save/stop.obeyed"
    if ((status == 0)); then
        rm -f "$save/requeues_without_progress"
        end_start 0 "done"
    fi
    grep -hoE 'pretrain_genlip\.py: error: .*' "$start_folder"/*.log | sort -u | head -n 3
    case $(final_status "$save" "$launch") in
        2 | 18 | 19)
            end_start "$status" "not requeued: the training left with status $(final_status "$save" "$launch")," \
                "which a restart does not fix; the error is in $start_folder"
            ;;
    esac
    if [ -e "$save/stop" ] || [ -e "$save/stop.obeyed" ]; then
        end_start "$status" "not requeued: the stop file $save/stop ended it. Submit the job again to continue."
    fi
    forget_start_if_preempted
    count=$(starts_without_progress "$save")
    [ "$(job_field JobState)" != RUNNING ] || give_up_without_progress "$save" "$count" "$status"
    requeue "$status" "" "at step $(latest_step "$save"), $count starts without progress"
}
