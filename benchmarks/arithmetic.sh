#!/usr/bin/env bash
# The runs behind the README's learning table: bash setup.sh bash benchmarks/arithmetic.sh [SEED ...]
# Three seeds one after the other, into output/arithmetic-<seed>; about ten minutes each on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
(($#)) || set -- 42 43 44
for seed in "$@"; do
    python train.py --model-name embedded --reward-model-name none --run-name "arithmetic-$seed" --seed "$seed" \
        --data data/arithmetic_train.jsonl --eval-data data/arithmetic_test.jsonl --eval-interval 25 --max-steps 50 \
        --rollouts-per-step 16 --train-batch-size 64 --micro-batch-size 64 --max-new-tokens 48 --temperature 1.0 \
        --kl-weight 0 --lr 2e-5 --lr-schedule linear --checkpoint-interval 50
done
