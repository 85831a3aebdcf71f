#!/usr/bin/env bash
# GenLIP L/16 on one GPU: a development run on your own shards, or the whole of a small data set.
#   examples/single_gpu.sh TOKENIZER TRAIN_SHARDS VALID_SHARDS RUN_FOLDER [FLAGS...]
#   examples/single_gpu.sh tokenizer.json 'data/train-*.tar' 'data/val-*.tar' runs/l16
# GPUs: 1 of 80 GB. Hours (estimated at 45% MFU of an H100, not measured): 0.4 for 1 million samples of 224x224.
# The batch is 64 packs of 16384 tokens (about 3900 samples), an eighth of the paper's. Without a GPU the same command
# runs on the CPU, slowly.
set -euo pipefail
tokenizer=$1 shards=$2 valid=$3 run=$4
shift 4
cd "$(dirname "$0")/.."
source examples/launch.sh

train=(pretrain_genlip.py --config l16_stage1
    --tokenizer "$tokenizer" --train-data "$shards" --valid-data "$valid" --save "$run" --load "$run"
    --global-batch-size 64 --micro-batch-size 4 --train-iters 20000 --lr 3e-4 --lr-warmup-iters 200
    --save-interval 500 --eval-interval 500 "$@")
check_flags 1 "${train[@]}"
# Index the shards once; unchanged ones are skipped. The tool expands the patterns.
python tools/prepare_data.py "$shards" "$valid" --tokenizer "$tokenizer"
exec torchrun --standalone --nproc-per-node 1 "${train[@]}"
