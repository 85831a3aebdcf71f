#!/usr/bin/env bash
# GenLIP L/16 on one GPU: a development run on your own shards, or the whole of a small data set.
#   examples/single_gpu.sh TOKENIZER TRAIN_SHARDS VALID_SHARDS RUN_FOLDER [FLAGS...]
#   examples/single_gpu.sh tokenizer.json 'data/train-*.tar' 'data/val-*.tar' runs/l16
# GPUs: 1 of 80 GB. Hours, by formula at 45% MFU of an H100, not measured: 1 million samples of 224x224 take 0.4.
# The batch is 64 packs of 16384 tokens (about 3900 samples), an eighth of the paper's; without a GPU the same command
# runs on the CPU, only slowly.
set -euo pipefail
tokenizer=$1 train=$2 valid=$3 run=$4
shift 4
cd "$(dirname "$0")/.."

# Index the shards once; unchanged ones are skipped. The patterns are expanded by the tool.
python tools/prepare_data.py "$train" "$valid" --tokenizer "$tokenizer"
# Ctrl-C: the run saves, for which torchrun gives it 10 minutes and not 30 seconds.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600
exec torchrun --standalone --nproc-per-node 1 pretrain_genlip.py --config l16_stage1 \
    --tokenizer "$tokenizer" --train-data "$train" --valid-data "$valid" --save "$run" --load "$run" \
    --global-batch-size 64 --micro-batch-size 4 --train-iters 20000 --lr 3e-4 --lr-warmup-iters 200 \
    --save-interval 500 --eval-interval 500 "$@"
