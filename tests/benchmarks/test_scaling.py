"""Weak scaling from 1 to 2 processes, and the share of a step that passes in collectives, under every ZeRO stage.

pytest tests/benchmarks/test_scaling.py --benchmark-only -s

The same work on every rank, one thread each, gloo on a CPU (nccl where there are two GPUs). efficiency: samples/s of
two processes over twice those of one; 1 means that the second process costs nothing. predicted: what `sharpprior plan`
computes from the collectives of the stage, given one process's time for a step and the link's measured bandwidth and
latency; it knows of no cache, memory bandwidth or power that the processes of a machine share.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("scaling_worker.py")
STEPS = 10


def measure(ranks: int, zero: int) -> dict:
    """What rank 0 of a run printed."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    done = subprocess.run(
        [*launch, str(WORKER), str(zero), str(STEPS)], capture_output=True, text=True, timeout=600, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_weak_scaling_from_one_to_two_processes(benchmark, zero):
    one = measure(1, zero)
    two = benchmark.pedantic(measure, args=(2, zero), rounds=1, iterations=1)
    efficiency = two["samples_s"] / one["samples_s"] / 2
    predicted = one["step_s"] / (one["step_s"] + two["predicted_communication_s"])
    benchmark.extra_info.update(one=one, two=two, efficiency=efficiency, predicted_efficiency=predicted)
    print(
        f"\nZeRO {zero}: {one['samples_s']:.2f} → {two['samples_s']:.2f} samples/s, efficiency {efficiency:.2f} "
        f"(predicted {predicted:.2f}, {two['predicted_communication_s'] * 1e3:.1f} ms in collectives of a step of "
        f"{two['step_s'] * 1e3:.0f} ms); "
        f"in collectives {two['share_in_collectives']:.0%}; {two['bytes_a_step'] / 2**20:.2f} MiB a step issued, "
        f"{two['sent_a_step'] / 2**20:.2f} sent by a ring, of {4 * two['parameters'] / 2**20:.2f} MiB of parameters"
    )
