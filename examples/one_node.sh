#!/usr/bin/env bash
# GenLIP So/16 on one node of 8 GPUs: stage 1 with plain data parallelism, the fastest layout that fits.
#   examples/one_node.sh TOKENIZER TRAIN_SHARDS VALID_SHARDS RUN_FOLDER [FLAGS...]
# GPUs: 8 of 80 GB. Hours (estimated at 45% MFU of an H100, not measured): 528 for the paper's 8.0B samples; a tenth of
# that with --train-iters 25749 --lr-warmup-iters 180. If memory runs out, add --tp 2 or --recompute selective.
set -euo pipefail
tokenizer=$1 train=$2 valid=$3 run=$4
shift 4
cd "$(dirname "$0")/.."

python tools/prepare_data.py "$train" "$valid" --tokenizer "$tokenizer"
# When a worker dies, torchrun restarts all workers from the last checkpoint. Each start needs a new store, because
# torchrun's still holds the dead worker's address.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# On Ctrl-C the run saves; torchrun waits 10 minutes for it instead of 30 seconds.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600
exec torchrun --standalone --nproc-per-node 8 --max-restarts 3 pretrain_genlip.py --config so16_stage1 \
    --tokenizer "$tokenizer" --train-data "$train" --valid-data "$valid" --save "$run" --load "$run" \
    --overlap-grad-reduce --overlap-param-gather "$@"
