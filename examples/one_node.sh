#!/usr/bin/env bash
# GenLIP So/16 on one node of 8 GPUs: stage 1 with plain data parallelism, the fastest layout that fits.
#   examples/one_node.sh TOKENIZER TRAIN_SHARDS VALID_SHARDS RUN_FOLDER [FLAGS...]
# GPUs: 8 of 80 GB. Hours (estimated at 45% MFU of an H100, not measured): 528 for the paper's 8.0B samples; a tenth of
# that with --train-iters 25749 --lr-warmup-iters 180. If memory runs out, add --tp 2 or --recompute selective.
# It uses all GPUs of the machine; GPUS_PER_NODE=4 in the environment makes it four.
set -euo pipefail
tokenizer=$1 shards=$2 valid=$3 run=$4
shift 4
cd "$(dirname "$0")/.."
source examples/launch.sh

train=(pretrain_genlip.py --config so16_stage1
    --tokenizer "$tokenizer" --train-data "$shards" --valid-data "$valid" --save "$run" --load "$run"
    --overlap-grad-reduce --overlap-param-gather "$@")
check_flags "$(processes_per_node)" "${train[@]}"
python tools/prepare_data.py "$shards" "$valid" --tokenizer "$tokenizer"
exec torchrun --standalone --nproc-per-node "$(processes_per_node)" --max-restarts 3 "${train[@]}"
