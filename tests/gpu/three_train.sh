#!/usr/bin/env bash
# Third script for a GPU: train/main.py on photographs for the time that is left; what it wrote goes into $OUT.
#   bash tests/gpu/three_train.sh [SECONDS=240] [--dry] [more options of train/main.py, e.g. --set train.batch=32]
# SHARPPRIOR_DATA names the photographs (else the bundled ones). The run gets the signal that a queue would send 40 s before
# the end: it then writes a checkpoint and leaves. Files of more than 16 MiB stay behind.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
seconds=${1:-240}
[ $# -eq 0 ] || shift
out=${OUT:-runs/gpu}
python=${PYTHON:-python3}
mkdir -p "$out"
root=$(mktemp -d)
options=(--config configs/large.yaml --set "run.root=$root" --set run.name=photographs --set eval.at_start=false
    --set model.backbone.width=32 --set train.batch=32 --set train.distill_steps=300 --set optim.warmup=200
    --set engine.channels_last=true --set train.steps=100000 --set checkpoint.every=500 --set checkpoint.keep=1)
if [ "${1:-}" = --dry ]; then
    shift
    options+=(--set "model.backbone={name: unet, width: 8, blocks: [1, 1]}" --set model.levels=3 --set train.steps=3
        --set train.distill_steps=0 --set train.batch=2 --set data.crop=64 --set data.workers=1 --set engine.zero=0
        --set engine.precision=fp32 --set eval.enabled=false --set checkpoint.every=2 --set model.student.width=16
        --set model.spe.dim=16)
elif ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "three_train: no GPU here; --dry tries the script on the CPU"
    exit 1
fi
status=0
PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} timeout --signal=TERM --kill-after=30 "$((seconds - 40))" \
    "$python" train/main.py "${options[@]}" "$@" >"$out/three_train.log" 2>&1 || status=$?
# At most 8 files come back from a lent machine, so the small ones travel as one archive.
run=$root/photographs
tar -C "$run" -czf "$out/run.tar.gz" --exclude='checkpoints' . 2>/dev/null || true
find "$run" -name '*.safetensors' -size -16M -printf '%T@ %p\n' 2>/dev/null | sort -rn | head -n 2 | cut -d' ' -f2- |
    while read -r file; do cp "$file" "$out/$(basename "$(dirname "$file")")-$(basename "$file")"; done || true
lines=3
[ "$status" -eq 0 ] || lines=40 # why it failed
tail -n "$lines" "$out/three_train.log"
echo "{\"section\": \"train\", \"status\": $status, \"seconds\": $seconds}" | tee -a "$out/three_train.jsonl"
