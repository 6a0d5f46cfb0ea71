"""Memory of a rank, counted by hand for each of the engine's options."""

import pytest
import torch
from torch import nn

from tests.model.models import deblurrer
from train.config.schema import Config
from train.engine.settings import bucket_elements
from train.plan.memory import activation_bytes, memory_per_rank

WORLD = 4


@pytest.fixture(scope="module")
def network() -> nn.Module:
    with torch.device("meta"):
        return deblurrer(backbone={"name": "unet", "width": 8, "blocks": [1, 2]}, prior=False)


def sizes(network: nn.Module, **engine: object) -> tuple[int, dict[str, float]]:
    """(trained elements, bytes by purpose but for activations)."""
    found = memory_per_rank(Config(engine=engine, data={"crop": 64}), network, WORLD, 1)
    assert found.pop("activations") > 0
    return sum(p.numel() for p in network.parameters()), found


@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        ({"zero": 0}, {"parameters": 4, "gradients": 4, "AdamW's moments": 8, "averaged weights": 4}),
        (
            {"zero": 2, "precision": "bf16"},
            {
                "parameters": 4,
                "gradients": 1,
                "gradients' buckets": 8,
                "AdamW's moments, fp32 master": 3,
                "averaged weights": 1,
            },
        ),
        (
            {"zero": 1, "precision": "bf16_params"},
            {
                "parameters": 2,
                "gradients": 2,
                "gradients' buckets": 2,
                "AdamW's moments, fp32 master": 3,
                "averaged weights": 1,
            },
        ),
        (
            {"zero": 3, "precision": "bf16_params"},
            {
                "parameters": 0.5,
                "gradients": 1,
                "gradients' buckets": 2,
                "AdamW's moments, fp32 master": 3,
                "averaged weights": 1,
            },
        ),
        (
            {"zero": 3, "offload": "cpu", "offload_parameters": "cpu"},
            {
                "parameters (in host memory)": 1,
                "gradients (in host memory)": 1,
                "gradients' buckets": 4,
                "AdamW's moments, fp32 master (in host memory)": 3,
                "averaged weights (in host memory)": 1,
            },
        ),
    ],
)
def test_bytes_of_an_element_on_each_of_four_ranks(network, engine, expected):
    count, found = sizes(network, **engine)
    del found["sum on the device"]
    assert {name: size / count for name, size in found.items()} == pytest.approx(expected)


def test_what_is_in_host_memory_is_not_in_the_devices_sum(network):
    config = Config(engine={"zero": 3, "offload": "cpu", "offload_parameters": "cpu"}, data={"crop": 64})
    found = memory_per_rank(config, network, WORLD, 1)
    assert found["sum on the device"] == found["activations"] + found["gradients' buckets"]


def test_a_bucket_holds_no_more_than_there_are_gradients_and_what_the_user_says():
    assert bucket_elements(Config(engine={"zero": 2}).engine, 7) == 7
    assert bucket_elements(Config(engine={"zero": 2}).engine, 10**10) == 5 * 10**8
    given = {"zero_optimization": {"reduce_bucket_size": 9}}
    assert bucket_elements(Config(engine={"zero": 2, "deepspeed": given}).engine, 7) == 9


def test_recomputed_blocks_keep_less_and_16_bit_parameters_need_no_copies():
    with torch.device("meta"):
        network = deblurrer(backbone={"name": "unet", "width": 8, "blocks": [2, 2]}, levels=2)

    def kept(**engine: object) -> int:
        return activation_bytes(Config(engine=engine, data={"crop": 64}), network, 2)

    plain, bf16 = kept(), kept(precision="bf16")
    assert kept(checkpointing=True) < 0.6 * plain
    assert kept(precision="bf16", checkpointing=True) < bf16 < plain
    assert kept(precision="bf16_params", zero=1) < bf16
