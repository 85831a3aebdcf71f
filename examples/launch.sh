# Sourced by the launch scripts: the environment of torchrun, and what the scripts share.

# When a worker dies, torchrun restarts all workers from the last checkpoint. Each start needs a new store, because
# torchrun's still holds the dead worker's address.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# After Ctrl-C or SIGTERM the run finishes its step and saves. torchrun kills it this many seconds later, by default 30
# (torch 2.11: always 30). Set it above a step plus a save.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
# torchrun's --signals-to-handle: SIGUSR1 would kill torchrun itself; so it is passed on to the workers.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
# Without this torchrun prints a C++ trace when the node with the store ends first, also after a finished run.
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}
# With torchrun's --tee: the global rank before each line, instead of the local one.
export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE='[${rank}] '

# Network. NCCL and gloo choose an interface themselves, sometimes the wrong one. `ip -br addr` lists them.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN} # INFO shows which interface and transport NCCL uses
#export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0 # the interface that all nodes share
#export NCCL_IB_HCA=mlx5                                # InfiniBand or RoCE: the adapters to use, see `ibv_devices`
#export FI_PROVIDER=efa                                 # AWS EFA: also needs the aws-ofi-nccl plugin

# Training processes per node: GPUS_PER_NODE, else SLURM's or the machine's number of GPUs, else 1 (on the CPU).
processes_per_node() {
    local count=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
    [ -n "$count" ] || count=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ') || true
    echo "$((count > 0 ? count : 1))"
}

# A port for a job or a run, below the system's range for connections: other jobs of the node use other ports.
port_of() {
    local sum
    sum=$(cksum <<<"$1")
    echo "$((20000 + ${sum%% *} % 10000))"
}

# If --dry-run is among a training's flags: check the run for a number of processes, and exit. Otherwise check only the
# flags, which takes a second, so that a mistyped one is found before any work.
check_flags() { # PROCESSES pretrain_genlip.py FLAGS...
    local processes=$1
    shift
    if [[ " $* " == *" --dry-run "* ]]; then
        WORLD_SIZE=$processes exec python "$@"
    fi
    python "$@" --print-config >/dev/null || exit
}
