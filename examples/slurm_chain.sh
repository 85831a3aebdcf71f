#!/usr/bin/env bash
# GenLIP So/16, both stages, under SLURM with one command: stage 2 starts when stage 1 is done.
#   export TOKENIZER=tokenizer.json RUN=/shared/runs/so16
#   export TRAIN_DATA='/data/train-*.tar' VALID_DATA='/data/val-*.tar'
#   export STAGE2_TRAIN_DATA='/data/stage2-*.tar' STAGE2_VALID_DATA='/data/val2-*.tar'
#   examples/slurm_chain.sh                         (from the root of the repository)
# GPUs: 64 and then 32 of 80 GB. Hours: see examples/slurm_stage1.sbatch and examples/slurm_stage2.sbatch.
# It checks both stages before it queues them. Stage 1 may be requeued for days: only its success starts stage 2. If
# stage 1 fails or is cancelled, SLURM removes stage 2 from the queue.
set -euo pipefail

stage2=(env "TRAIN_DATA=$STAGE2_TRAIN_DATA" "VALID_DATA=$STAGE2_VALID_DATA")
examples/slurm_stage1.sbatch --dry-run
"${stage2[@]}" examples/slurm_stage2.sbatch --dry-run
first=$(sbatch --parsable examples/slurm_stage1.sbatch)
second=$("${stage2[@]}" sbatch --parsable --dependency="afterok:$first" --kill-on-invalid-dep=yes \
    examples/slurm_stage2.sbatch)
echo "stage 1: job $first | stage 2: job $second"
