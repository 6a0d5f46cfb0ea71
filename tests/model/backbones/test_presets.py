"""Names for the papers' sizes: each gives the paper's network, and yields to what is set beside it."""

import pytest
import torch

from model.backbones import PRESETS
from model.deblurrer import build_backbone
from tests.model.models import deblurrer


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("nafnet-32", 17.11),
        ("nafnet-64", 67.89),
        ("restormer", 26.13),
        ("uformer-b", 50.88),
        ("fftformer", 16.54),  # 16.56 with the release's unused convolution, 16.6 in the paper
        ("uformer-t", 5.29),  # the paper's 5.23 and 20.63 are without modulators, which the release builds them with
        ("uformer-s", 20.75),
    ],
)
def test_the_parameters_are_the_paper_s(name, millions):
    with torch.device("meta"):
        network = build_backbone(name)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_network_of_the_table(name):
    with torch.device("meta"):
        assert build_backbone(name).embed_points


def test_settings_beside_a_preset_s_name_go_before_its_own():
    network = deblurrer(backbone={"name": "nafnet-64", "width": 4, "middle_blk_num": 2}, prior=False).backbone
    assert network.intro.out_channels == 4
    assert len(network.middle_blks) == 2
    assert len(network.encoders[3]) == 28


def test_a_wrong_preset_or_setting_of_one_is_told():
    with pytest.raises(ValueError, match="did you mean nafnet-32"):
        build_backbone("nafnet-23")
    with pytest.raises(ValueError, match="unknown setting of backbone nafnet: 'widht': did you mean width"):
        build_backbone("nafnet-32", widht=4)
