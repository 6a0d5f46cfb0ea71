#!/usr/bin/env bash
# Train on the nodes of a SLURM job. Submit from the checkout:
#
#   sbatch slurm/train_multinode.sh                                             # configs/large.yaml on two whole nodes
#   sbatch --nodes=8 --time=24:00:00 slurm/train_multinode.sh CONFIG [ARGUMENTS OF train/main.py]
#   NODES=8 GPUS_PER_NODE=4 CONFIG=my.yaml bash slurm/train_multinode.sh        # the same through sbatch, by environment
#
# Every #SBATCH line can be overridden on sbatch's command line. Variables, and what happens at the time limit, after a
# preemption, a crash or a node's death: slurm/README.md. What only your site needs: slurm/site.example.sh.
#SBATCH --job-name=sharpprior
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --signal=B:USR2@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
set -eu

UNFINISHED=75 # sysexits' "try again": stopped in good order, with a checkpoint, before the last step

say() {
    echo "[$(date +%H:%M:%S)] $*"
}

fail() {
    echo "error: $*" >&2
    exit 1
}

quoted() { # as YAML: a string, whatever it looks like
    printf "'%s'" "${1//\'/\'\'}"
}

if [ -z "${SLURM_JOB_ID:-}" ]; then
    command -v sbatch >/dev/null || fail "sbatch not found: no SLURM here; one machine trains with accelerate launch train/main.py"
    CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")/.."
    exec sbatch ${NODES:+--nodes="$NODES"} ${GPUS_PER_NODE:+--gpus-per-node="$GPUS_PER_NODE"} slurm/train_multinode.sh "$@"
fi

# SLURM runs a copy of this file: the checkout is where sbatch was typed, or what its --chdir names.
[ -f slurm/node.sh ] || cd "${SLURM_SUBMIT_DIR:-.}"
[ -f train/main.py ] && [ -f slurm/node.sh ] || fail "$PWD is not the checkout: cd there, then sbatch slurm/train_multinode.sh"

SITE=${SITE:-slurm/site.sh}
SRUN_OPTIONS=()
if [ -r "$SITE" ]; then
    set +u
    # shellcheck disable=SC1090,SC1091
    . "$SITE"
    set -u
elif [ "$SITE" != slurm/site.sh ]; then
    fail "SITE=$SITE: cannot read it"
fi

CONFIG=${CONFIG:-configs/large.yaml}
case ${1:-} in
"" | -*) ;;
*)
    CONFIG=$1
    shift
    ;;
esac
for argument in "$@"; do
    case ${argument#--set=} in
    run.name=* | run.root=*) fail "$argument: this script follows the run's folder: set RUN_ROOT and RUN_NAME instead" ;;
    esac
done
[ -r "$CONFIG" ] || fail "$CONFIG: cannot read this configuration"

nodes=$SLURM_JOB_NUM_NODES
restart=${SLURM_RESTART_COUNT:-0}
MAX_RESTARTS=${MAX_RESTARTS:-20}
RUN_ROOT=${RUN_ROOT:-runs}
name=$(basename "$CONFIG")
name=${name%.*}
RUN_NAME=${RUN_NAME:-${name//[^A-Za-z0-9._-]/-}-$SLURM_JOB_ID}
run=$RUN_ROOT/$RUN_NAME
[ -z "${NODES:-}" ] || [ "$NODES" = "$nodes" ] ||
    fail "NODES=$NODES, but the job has $nodes: sbatch --nodes=$NODES, or start this file with bash instead of sbatch"
[ "$restart" -le "$MAX_RESTARTS" ] || fail "restarted $restart times, MAX_RESTARTS is $MAX_RESTARTS: giving up"
mkdir -p "$run/slurm" || fail "$run: cannot make the run's folder: set RUN_ROOT to one that all nodes see"

# A node's ranks share all its cores: SLURM would bind a step's single task to one. Without a task plugin there is nothing
# to unbind, and srun says so.
settings=$(scontrol show config)
bind=
! grep -qE '^TaskPlugin .*(affinity|cgroup)' <<<"$settings" || bind=--cpu-bind=none
kill_wait=$(sed -n 's/^KillWait *= *\([0-9]*\).*/\1/p' <<<"$settings")

# A step gets only the GPUs it asks for by name, not those that --exclusive granted to its job.
granted=${SLURM_GPUS_ON_NODE:-0}
wanted=${GPUS_PER_NODE:-${SLURM_GPUS_PER_NODE:-$granted}}
wanted=${wanted##*:} # of TYPE:NUMBER
unset SLURM_GPUS_PER_NODE
gpu_options=()
if [ "$granted" -gt 0 ]; then
    [ "$wanted" -le "$granted" ] || fail "GPUS_PER_NODE=$wanted, but the job has $granted on a node: sbatch --gpus-per-node=$wanted"
    gpu_options=(--gpus-per-node="$wanted")
    [ "$wanted" -gt 0 ] || gpu_options=(--gres=none)
fi

step() { # becomes srun with one task on each node of the job; call it in a subshell
    exec srun --export=ALL --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 ${bind:+"$bind"} ${gpu_options[@]+"${gpu_options[@]}"} \
        ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} ${SRUN_OPTIONS[@]+"${SRUN_OPTIONS[@]}"} "$@"
}

# -- signals ------------------------------------------------------------------------------------------------------------

signalled=
# The time limit is near (USR2), a preemption or scancel (TERM), or a person (USR1).
# shellcheck disable=SC2329
on_signal() {
    [ -n "$signalled" ] || say "signal $1: asking the run for a checkpoint ($run/STOP)"
    signalled=$1
    : >"$run/STOP"
}
for signal in USR1 USR2 TERM INT; do
    # shellcheck disable=SC2064
    trap "on_signal $signal" "$signal"
done

# -- what there is ------------------------------------------------------------------------------------------------------

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
address=${MAIN_ADDRESS:-${hosts[0]}}
if ! getent hosts "$address" >/dev/null; then
    # A node's name in SLURM need not be one that resolves; the address by which SLURM reaches it does.
    address=$(scontrol show node "${hosts[0]}" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
fi
export MAIN_ADDRESS=$address
export MAIN_PORT=${MAIN_PORT:-$((15000 + SLURM_JOB_ID % 15000))} # below the range from which Linux hands out ports

say "job $SLURM_JOB_ID, start $((restart + 1)) of at most $((MAX_RESTARTS + 1)): $CONFIG on $nodes nodes ($SLURM_JOB_NODELIST)"
found=$(set -o pipefail && step --kill-on-bad-exit=1 bash slurm/node.sh check | grep $'^node\t' | sort -n -k 2) ||
    fail "a node is not fit to train on: its message is above"

fewest=$(cut -f 4 <<<"$found" | sort -n | head -n 1)
if [ -n "${GPUS_PER_NODE:-}" ] && [ "$GPUS_PER_NODE" -gt "$fewest" ]; then
    fail "GPUS_PER_NODE=$GPUS_PER_NODE, but the nodes have $(cut -f 3,4 <<<"$found" | tr '\t\n' ': ')"
fi
gpus=${GPUS_PER_NODE:-$fewest}
if [ "$gpus" -gt 0 ]; then
    [ "${PROCS_PER_NODE:-$gpus}" = "$gpus" ] || fail "PROCS_PER_NODE is for nodes without GPUs: here a GPU has a process (GPUS_PER_NODE)"
    processes=$gpus
else
    processes=${PROCS_PER_NODE:-1}
    [ "$fewest" -eq 0 ] || export CUDA_VISIBLE_DEVICES= # GPUS_PER_NODE=0: the ranks would take those they see
fi
export WORLD=$((nodes * processes))

while IFS=$'\t' read -r _ number host found_gpus cpus kind versions; do
    say "node $number $host: ranks $((number * processes)) to $(((number + 1) * processes - 1)), $found_gpus GPUs ($kind), $cpus CPUs, $versions"
done <<<"$found"
[ "$(cut -f 7 <<<"$found" | sort -u | wc -l)" -eq 1 ] || fail "the nodes have different versions: one environment for all"
[ "$gpus" -gt 0 ] || say "training on the CPUs, $processes processes a node (PROCS_PER_NODE), gloo: no GPU here, or none wanted"
say "$WORLD ranks, $processes a node; they meet at $MAIN_ADDRESS:$MAIN_PORT; commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
say "run $run; each node's log: $run/slurm/$SLURM_JOB_ID.<node number>.<host>.log"

# -- train --------------------------------------------------------------------------------------------------------------

export FAILURE=$run/slurm/$SLURM_JOB_ID.failure
rm -f "$run/STOP" "$run/STOPPED" "$FAILURE" # of an earlier start: only this one's markers count
log=$run/slurm/%j.%t.%N.log
step --kill-on-bad-exit=1 --open-mode=append --output="$log" --error="$log" bash slurm/node.sh launch \
    --config "$CONFIG" --resume auto --set "run.root=$(quoted "$RUN_ROOT")" --set "run.name=$(quoted "$RUN_NAME")" "$@" &
srun=$!

# A signal ends `wait`, not the step: wait again. A run that was asked while it still set itself up has taken the request
# for an old one and removed it: ask again. And srun waits for a dead node's tasks until SLURM itself has missed the node,
# which takes minutes: once a node has failed, all others are killed or unreachable after SLURM's own KillWait.
failed_at=
while kill -0 "$srun" 2>/dev/null; do
    if [ -n "$signalled" ] && [ ! -e "$run/STOPPED" ]; then
        : >"$run/STOP"
    fi
    if [ -z "$failed_at" ] && [ -s "$FAILURE" ]; then
        failed_at=$SECONDS
    elif [ -n "$failed_at" ] && [ $((SECONDS - failed_at)) -gt $((${kill_wait:-30} + 10)) ]; then
        kill -KILL "$srun"
    fi
    sleep 1 &
    wait $! 2>/dev/null || true
done
status=0
wait "$srun" 2>/dev/null || status=$(($? & 255)) # bash says -1 where a trap ran meanwhile
rm -f "$run/STOP"

# -- and then -----------------------------------------------------------------------------------------------------------

again="$(printf 'RUN_ROOT=%q RUN_NAME=%q sbatch --nodes=%q slurm/train_multinode.sh' "$RUN_ROOT" "$RUN_NAME" "$nodes")"
again+=$(printf ' %q' "$CONFIG" "$@")

# A job that somebody cancelled must not come back; one that SLURM is taking back itself needs no help.
leave_unless_running() {
    local state
    state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T || echo unknown)
    if [ "$state" != RUNNING ]; then
        say "SLURM has ended this job (it is $state): not requeued from here. Go on with: $again"
        exit "$1"
    fi
}

requeue() { # or exit with $1 where that cannot be
    leave_unless_running "$1"
    if [ "$restart" -ge "$MAX_RESTARTS" ]; then
        say "restarted $restart times already (MAX_RESTARTS=$MAX_RESTARTS): not requeued. Go on with: $again"
        exit "$1"
    fi
    if ! scontrol requeue "$SLURM_JOB_ID"; then
        say "SLURM does not requeue this job. Go on with: $again"
        exit "$1"
    fi
    exit 0
}

if [ "$status" -eq 0 ]; then
    if [ ! -e "$run/STOPPED" ]; then
        say "training finished: $run"
        exit 0
    fi
    say "stopped with a checkpoint: $(tr '\n' ' ' <"$run/STOPPED")"
    # The ranks may have had the signal themselves (`--signal` without B:). A STOP that is not ours is a person's wish.
    if [ -n "$signalled" ] || ! grep -q "file STOP" "$run/STOPPED"; then
        say "requeueing"
        requeue "$UNFINISHED"
    fi
    say "somebody made $run/STOP: not requeued. Go on with: $again"
    exit "$UNFINISHED"
fi

leave_unless_running "$status"
first="a node"
if [ -s "$FAILURE" ]; then
    read -r status first <"$FAILURE" # srun tells the highest status, often that of a node which it had to kill
fi
say "$first ended first, with status $status; the last lines of each:"
for path in "$run/slurm/$SLURM_JOB_ID".*.log; do
    echo "--- $path"
    # Of this start, and without the launcher's own traceback, which says nothing about the cause.
    awk '/^== node /{ n = 0; over = 0 } /elastic.*failed \(exitcode/{ over = 1 }
        /^  File "<frozen runpy>/ && line[n - 1] ~ /^Traceback/{ n--; over = 1 } !over { line[n++] = $0 }
        END { for (i = n > 15 ? n - 15 : 0; i < n; i++) print line[i] }' "$path" || true
done

# A crash would only crash again. A node that died is no fault of the run: SLURM keeps the job off it.
probes=()
for host in "${hosts[@]}"; do
    timeout 30 srun --overlap --nodes=1 --ntasks=1 --nodelist="$host" --quiet true >/dev/null 2>&1 &
    probes+=($!)
done
dead=()
for number in "${!hosts[@]}"; do
    wait "${probes[$number]}" || dead+=("${hosts[$number]} (ranks $((number * processes)) to $(((number + 1) * processes - 1)))")
done
if [ "${#dead[@]}" -gt 0 ] && [ "${#dead[@]}" -lt "$nodes" ]; then
    say "dead nodes, which do not answer: ${dead[*]}; requeueing"
    requeue "$status"
fi
say "every node answers, so the run itself failed: not requeued. Mended? $again"
exit "$status"
