"""Statistics of a set describe what training will see."""

from pathlib import Path

import numpy as np
import pytest

from data.blur import TIERS, BlurConfig
from data.errors import DataError
from data.image import decode_image
from data.look.stats import EXTENT_EDGES, set_stats, write_histogram
from data.shards.set import ShardSet
from data.stream.config import StreamConfig

SAMPLES = Path(__file__).parents[3] / "data" / "samples"


def test_tiers_come_in_their_shares_with_extents_inside_their_bounds(tmp_path):
    stats = set_stats(ShardSet(SAMPLES / "train"), BlurConfig(), StreamConfig(crop=96, workers=0), pairs=240)
    assert stats.pairs == sum(tier.count for tier in stats.tiers) == sum(stats.histogram) == 240
    wanted = {tier: getattr(BlurConfig().tiers, tier).share for tier in TIERS}
    for tier in stats.tiers:
        # four standard errors of a share
        assert abs(tier.share - wanted[tier.tier]) < 4 * (wanted[tier.tier] * (1 - wanted[tier.tier]) / 240) ** 0.5
    medians = {tier.tier: tier.psnr[1] for tier in stats.tiers}
    assert medians["moderate"] > medians["severe"] > medians["extreme"]
    bounds = {tier.tier: (tier.extent[0], tier.extent[2]) for tier in stats.tiers}
    assert 30 <= bounds["severe"][0] <= bounds["severe"][1] <= 80
    text = "\n".join(stats.lines())
    assert "40 samples in 2 shards" in text
    assert "512×512" in text
    picture = decode_image(write_histogram(tmp_path / "new" / "h.png", stats).read_bytes())
    assert len(np.unique(picture[..., 2])) > 2
    assert len(stats.histogram) == len(EXTENT_EDGES) - 1


def test_the_command_describes_a_set_whatever_order_and_groups_a_run_wants(sharpprior):
    command = ("stats", SAMPLES / "val", "--pairs", "12", "--crop", "96")
    plain = sharpprior(*command)
    assert plain[0] == 0
    assert "12 pairs drawn" in plain[1]
    assert sharpprior(*command, "--set", "data.canonical_groups=13", "--set", "data.window=1") == plain


def test_recorded_pairs_have_psnr_but_no_extent(make_set):
    stream = StreamConfig(crop=32, workers=0)
    stats = set_stats(ShardSet(make_set([3], kind="pairs")), BlurConfig(), stream, pairs=5)
    (tier,) = stats.tiers
    assert (tier.tier, tier.count) == ("paired", 5)
    assert np.isfinite(tier.psnr).all()
    assert stats.lines()
    with pytest.raises(DataError, match="at least one"):
        set_stats(ShardSet(make_set(name="other")), BlurConfig(), stream, pairs=0)
