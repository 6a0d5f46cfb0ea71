#!/usr/bin/env bash
# What train_multinode.sh runs once on every node of its job: `check` says in one line what is there, `launch` starts
# accelerate's launcher. A file of its own, so that $SLURM_NODEID is the node's and not the batch script's.
set -eu

activate() {
    if [ -n "${VENV:-}" ]; then
        [ -r "$VENV/bin/activate" ] || {
            echo "error: $SLURMD_NODENAME: VENV=$VENV is no virtual environment that this node can read" >&2
            exit 1
        }
    elif [ -r .venv/bin/activate ]; then
        VENV=$PWD/.venv
    else
        return 0 # the environment that site.sh made, or the one that submitted
    fi
    set +u
    # shellcheck disable=SC1091
    . "$VENV/bin/activate"
    set -u
}

check() {
    python - <<'PYTHON' || {
import importlib.metadata as metadata, os, platform, sys

import torch

versions = [f"Python {platform.python_version()}"]
versions += [f"{name} {metadata.version(name)}" for name in ("torch", "accelerate", "deepspeed")]
gpus = torch.cuda.device_count()
kind = torch.cuda.get_device_name(0) if gpus else "-"
cpus = len(os.sched_getaffinity(0))
print("node", os.environ["SLURM_NODEID"], os.environ["SLURMD_NODENAME"], gpus, cpus, kind, ", ".join(versions), sep="\t")
PYTHON
        echo "error: $SLURMD_NODENAME: $(command -v python || echo 'no python') cannot run sharpprior: set VENV, or" \
            "load the environment in slurm/site.sh" >&2
        exit 1
    }
}

launch() {
    local options=(--config_file "$PWD/slurm/accelerate.yaml")
    # One process in all has nobody to meet: accelerate refuses --multi_gpu. On CPU nodes --multi_gpu is accelerate's
    # only form of several processes that leaves DeepSpeed on (--cpu turns it off).
    [ "$WORLD" -eq 1 ] || options+=(--multi_gpu)
    options+=(
        --num_machines "$SLURM_JOB_NUM_NODES" --num_processes "$WORLD" --machine_rank "$SLURM_NODEID"
        --main_process_ip "$MAIN_ADDRESS" --main_process_port "$MAIN_PORT" --same_network
        # static: ranks in the order of the nodes, and node 0 need not recognise itself by its name.
        --rdzv_backend static --rdzv_conf timeout=900 --max_restarts 0 --monitor_interval 0.2
        --mixed_precision no --dynamo_backend no --gpu_ids all
        --num_cpu_threads_per_process "${OMP_NUM_THREADS:-1}"
    )
    # What an interactive session or another launcher left behind must not reach the ranks.
    unset "${!ACCELERATE_@}" "${!PET_@}" RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
    # The ranks answer signals themselves. A launcher that hears one fails although they end in good order, and after half
    # a minute kills them in their checkpoint. (torchrun takes its options from PET_*; accelerate does not know this one.)
    export PET_SIGNALS_TO_HANDLE=SIGHUP,SIGQUIT
    trap '' USR1 USR2 TERM INT
    echo "== node $SLURM_NODEID $SLURMD_NODENAME, start $((${SLURM_RESTART_COUNT:-0} + 1)), $(date '+%F %T')"
    local status=0
    python -m accelerate.commands.launch "${options[@]}" train/main.py "$@" || status=$?
    if [ "$status" -ne 0 ]; then
        # The first to fail is the cause, the others are its victims; only one of them can make this file.
        (set -C && echo "$status node $SLURM_NODEID $SLURMD_NODENAME" >"$FAILURE") 2>/dev/null || true
    fi
    return "$status"
}

activate
action=$1
shift
"$action" "$@"
