"""The recorder of collectives counts what DeepSpeed's stages issue, against a count by hand."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from tests.train.workers.collectives import SIZES

WORKER = Path(__file__).parents[1] / "workers" / "collectives.py"
# Weights and biases of the worker's two layers, fp32.
PARAMETERS = 4 * sum(inputs * outputs + outputs for inputs, outputs in pairwise(SIZES))
NORM = 4  # ZeRO 1 and 2 add up the gradients' norm, one fp32 number


@pytest.fixture(scope="module")
def found() -> dict:
    """What two ranks issued."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(WORKER)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_form_of_call_is_counted_once(found):
    assert found["plain"] == [
        ["all_reduce", 40, "torch.float64", 2],
        ["all_gather", 24, "torch.float32", 2],
        ["all_gather", 16, "torch.float32", 2],
        ["broadcast", 7, "torch.int8", 2],
        ["reduce", 12, "torch.float32", 2],
        ["reduce_scatter", 16, "torch.float32", 2],
    ]


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_zero_0_reduces_the_gradients_once_a_step(found, micro_batches):
    assert found[f"0/{micro_batches}"]["operations"] == {"all_reduce": [1, PARAMETERS]}


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_zero_1_also_gathers_the_new_parameters(found, micro_batches):
    assert found[f"1/{micro_batches}"]["operations"] == {
        "all_reduce": [2, PARAMETERS + NORM],
        "all_gather": [1, PARAMETERS],
    }


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_zero_2_reduces_after_every_micro_batch(found, micro_batches):
    assert found[f"2/{micro_batches}"]["operations"] == {
        "all_reduce": [micro_batches + 1, micro_batches * PARAMETERS + NORM],
        "all_gather": [1, PARAMETERS],
    }


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_zero_3_gathers_and_scatters_in_every_micro_batch(found, micro_batches):
    operations = found[f"3/{micro_batches}"]["operations"]
    assert operations["all_gather"] == [micro_batches, micro_batches * PARAMETERS]
    assert operations["reduce_scatter"] == [micro_batches, micro_batches * PARAMETERS]
    assert operations.keys() == {"all_gather", "reduce_scatter", "all_reduce"}
    assert operations["all_reduce"] == [1, 8]  # the norm, fp64


def test_time_in_collectives_is_a_part_of_the_step(found):
    for name, step in found.items():
        if name != "plain":
            assert 0 < step["share"] < 1
            ring = {"all_reduce": 1.0, "all_gather": 0.5, "reduce_scatter": 0.5}  # of two ranks
            assert step["sent"] == sum(ring[name] * size for name, (_, size) in step["operations"].items())
