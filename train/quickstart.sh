#!/usr/bin/env bash
# From a fresh checkout to a trained model and its report: environment, then a few minutes of training.
#   bash train/quickstart.sh                     further arguments go to train/main.py (--resume auto, --set key=value)
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# Ctrl-C is the training process's to answer (it saves a checkpoint): the launcher would only die of it first.
trap '' INT
exec accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
    train/main.py --config configs/quickstart.yaml "$@"
