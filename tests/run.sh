#!/usr/bin/env bash
# The whole test suite in the tested environment, on all cores. Further arguments go to pytest.
. "$(dirname "${BASH_SOURCE[0]}")/../train/environment.sh"

# A process a core, a thread a process: torch's threads would fight each other. A file's tests share their fixtures.
export OMP_NUM_THREADS=1
exec python -m pytest --durations=25 -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder "$@"
