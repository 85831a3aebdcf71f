#!/usr/bin/env bash
# GenLIP g/16, stage 1, on several nodes without a scheduler: run this on every node, with the same arguments.
#   examples/multi_node.sh HEAD_NODE NODES TOKENIZER TRAIN_SHARDS VALID_SHARDS RUN_FOLDER [FLAGS...]
#   examples/multi_node.sh node01:29500 8 tokenizer.json '/data/train-*.tar' '/data/val-*.tar' /shared/runs/g16
# GPUs: 8 per node; the global batch of 768 packs must be a multiple of micro_batch_size * data parallel size.
# Hours (estimated at 45% MFU of an H100, not measured): 166 on 64 GPUs for the paper's 8.0B samples.
# Index the shards first (tools/prepare_data.py). RUN_FOLDER must be on a file system that all nodes share.
set -euo pipefail
head=$1 nodes=$2 tokenizer=$3 train=$4 valid=$5 run=$6
shift 6
cd "$(dirname "$0")/.."

# When a worker dies, torchrun restarts all workers from the last checkpoint. Each start needs a new store, because
# torchrun's still holds the dead worker's address.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# On Ctrl-C the run saves; torchrun waits 10 minutes for it instead of 30 seconds.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600
exec torchrun --nnodes "$nodes" --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint "$head" --max-restarts 3 \
    pretrain_genlip.py --config g16_stage1 --micro-batch-size 2 \
    --tokenizer "$tokenizer" --train-data "$train" --valid-data "$valid" --save "$run" --load "$run" \
    --overlap-grad-reduce --overlap-param-gather "$@"
