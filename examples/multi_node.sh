#!/usr/bin/env bash
# GenLIP g/16, stage 1, on several nodes without a scheduler: run this on every node, with the same arguments.
#   examples/multi_node.sh HEAD_NODE NODES TOKENIZER TRAIN_SHARDS VALID_SHARDS RUN_FOLDER [FLAGS...]
#   examples/multi_node.sh node01 8 tokenizer.json '/data/train-*.tar' '/data/val-*.tar' /shared/runs/g16
# GPUs: 8 per node; the global batch of 768 packs must be a multiple of micro_batch_size * data parallel size.
# Hours (estimated at 45% MFU of an H100, not measured): 166 on 64 GPUs for the paper's 8.0B samples.
# Index the shards first (tools/prepare_data.py). RUN_FOLDER must be on a file system that all nodes share.
# NODES may be a range: with 4:8 the run goes on with 4 to 7 nodes when some are lost, and takes nodes back when this
# script starts there again. The head node must stay. The port follows from RUN_FOLDER; HEAD_NODE:PORT sets another.
set -euo pipefail
head=$1 nodes=$2 tokenizer=$3 shards=$4 valid=$5 run=$6
shift 6
cd "$(dirname "$0")/.."
source examples/launch.sh

train=(pretrain_genlip.py --config g16_stage1 --micro-batch-size 2
    --tokenizer "$tokenizer" --train-data "$shards" --valid-data "$valid" --save "$run" --load "$run"
    --overlap-grad-reduce --overlap-param-gather "$@")
check_flags "$((${nodes#*:} * $(processes_per_node)))" "${train[@]}"
port=$(port_of "$run")
[[ $head == *:* ]] || head=$head:$port
exec torchrun --nnodes "$nodes" --nproc-per-node "$(processes_per_node)" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$head" --rdzv-id "$port" "${train[@]}"
