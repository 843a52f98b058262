#!/usr/bin/env bash
# The runs behind the README's learning table: bash setup.sh bash benchmarks/arithmetic.sh [SEED ...]
# Three seeds one after the other, into output/arithmetic-<seed>; about a quarter of an hour each on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
(($#)) || set -- 42 43 44
for seed in "$@"; do
    python train.py --model-name embedded --reward-model-name none --run-name "arithmetic-$seed" --seed "$seed" \
        --data data/arithmetic_train.jsonl --eval-data data/arithmetic_test.jsonl --eval-interval 20 \
        --max-steps 60 --max-new-tokens 48 --lr 1e-5 --train-batch-size 32 --micro-batch-size 32 --checkpoint-interval 60
done
