"""The teacher's features through the cache: one target whether read or computed, and off where it does not pay."""

import contextlib
import logging
import math
import time

import pytest
import torch
from torch import nn

from data.feature_cache.codec import dequantise, quantise
from data.feature_cache.spec import crop_keys
from data.stream.loader import PairLoader
from tests.data.streams import loader
from tests.train.small_sets import small_set
from train.config.file import build_config
from train.log import log
from train.objective.targets import CachedTargets


class Teacher(nn.Module):
    """Two levels at strides 4 and 8; `slow` seconds a call, `scale` stands for other weights, `spike` is a number that
    towers above all others of its channel, as vision transformers have them."""

    channels, strides = (6, 10), (4, 8)

    def __init__(
        self, slow: float = 0.0, scale: float = 1.0, precision: str = "fp32", spike: float | None = None
    ) -> None:
        super().__init__()
        self.precision, self.spike = precision, spike
        torch.manual_seed(0)
        self.convs = nn.ModuleList([nn.Conv2d(3, 6, 4, 4), nn.Conv2d(3, 10, 8, 8)])
        self.slow, self.scale, self.crops = slow, scale, 0

    @torch.no_grad()
    def forward(self, image):
        time.sleep(self.slow)
        self.crops += len(image)
        levels = tuple(self.scale * conv(image) for conv in self.convs)
        for level in levels if self.spike is not None else ():
            level[..., 0, 0] = self.spike
        return levels

    def fingerprint(self) -> str:
        return "a test's teacher"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return small_set(tmp_path_factory.mktemp("photographs"), "train", 4)


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, logger=log.name)
    return caplog


def configured(folder, **features):
    return build_config(
        {
            "data": {"crop": 64, "boxes_per_photo": 2, "margin": 8},
            "features": {"cache": "on", "folder": str(folder), **features},
        },
        {},
    )


def opened(folder, teacher=None, rank=0, **features) -> CachedTargets:
    return CachedTargets(teacher or Teacher(), configured(folder, **features), torch.device("cpu"), rank)


def batches(photographs, attach, count=6, workers=0, start=0) -> PairLoader:
    options = {"crop": 64, "boxes_per_photo": 2, "margin": 8, "workers": workers, "seed": 0, "start": start}
    return loader(photographs, batches=count, attach=attach, **options)


def targets(features: CachedTargets, loader) -> list[tuple[torch.Tensor, ...]]:
    return [features(batch["sharp"].float() / 255, batch, contextlib.nullcontext()) for batch in loader]


def uncached(loader) -> list[tuple[torch.Tensor, ...]]:
    """What the teacher itself computes."""
    return [Teacher()(batch["sharp"].float() / 255) for batch in loader]


def assert_equal(one, two, **tolerance) -> None:
    for a, b in zip(one, two, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, **({"rtol": 0, "atol": 0} | tolerance))


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_second_run_reads_what_the_first_computed_and_has_its_targets_bit_for_bit(
    tmp_path, photographs, dtype, workers
):
    first = opened(tmp_path, dtype=dtype)
    computed = targets(first, batches(photographs, first.attach))
    first.close()
    second = opened(tmp_path, dtype=dtype)
    read = targets(second, batches(photographs, second.attach, workers=workers))
    assert (second.hits, second.computed, second.teacher.crops) == (24, 0, 0)
    assert_equal(computed, read)


def test_targets_are_the_teachers_to_storage_precision(tmp_path, photographs):
    plain = uncached(batches(photographs, None))
    for dtype, tolerance in (("fp16", 1e-3), ("int8", 2e-2)):
        cached = opened(tmp_path, dtype=dtype)
        assert_equal(targets(cached, batches(photographs, cached.attach)), plain, rtol=tolerance, atol=tolerance)


def test_hits_and_misses_of_one_batch_stand_at_their_places(tmp_path, photographs):
    features = opened(tmp_path)
    (batch,) = list(batches(photographs, None, count=1))
    sharp = batch["sharp"].float() / 255
    expected = dequantise(quantise(features.teacher(sharp), "fp16"))
    keys = crop_keys(batch)
    known = [0, 2]
    features.writer.put([keys[n] for n in known], quantise(features.teacher(sharp[known]), "fp16"))
    features.writer.flush()
    features.attach(batch)
    assert batch["features"].hits.tolist() == [True, False, True, False]
    found = features(sharp, batch, contextlib.nullcontext())
    assert_equal([found], [[level.float() for level in expected]], rtol=1e-3, atol=1e-4)
    assert (features.hits, features.computed) == (2, 2)


def test_a_batch_without_a_look_up_is_computed_and_not_kept(tmp_path, photographs):
    features = opened(tmp_path)
    targets(features, batches(photographs, None, count=2))
    features.close()
    assert features.writer.stats.written == 0


def test_ranks_of_a_node_share_the_folder(tmp_path, photographs):
    one, two = opened(tmp_path, rank=0), opened(tmp_path, rank=1)
    targets(one, batches(photographs, one.attach))
    one.close()
    targets(two, batches(photographs, two.attach))
    assert two.hits == 24


def test_auto_keeps_the_cache_for_a_slow_teacher(tmp_path, photographs, said):
    features = opened(tmp_path, Teacher(slow=0.05), cache="auto")
    targets(features, batches(photographs, features.attach, count=16))
    assert features.active
    assert features.hits > 0
    (line,) = [record.getMessage() for record in said.records if "kept" in record.getMessage()]
    assert "computing it" in line
    assert "MB/s" in line


def test_auto_decides_by_what_all_ranks_measured(tmp_path, photographs, said):
    """This rank alone would keep the cache: another one reads so slowly that together they do not."""
    features = CachedTargets(
        Teacher(slow=0.05),
        configured(tmp_path, cache="auto"),
        torch.device("cpu"),
        0,
        over_ranks=lambda values: values + torch.tensor([1000.0, 50.0]),
    )
    targets(features, batches(photographs, features.attach, count=16))
    assert not features.active
    assert any("turned off, it does not pay" in record.getMessage() for record in said.records)


def test_auto_drops_the_cache_where_reading_takes_longer(tmp_path, photographs, said, monkeypatch):
    features = opened(tmp_path, cache="auto")
    monkeypatch.setattr(features.cache, "probe", lambda keys: (1e3, 1.0))
    loader = batches(photographs, features.attach, count=20, workers=1)
    found = targets(features, loader)
    assert not features.active
    assert features.hits == 0
    assert any("turned off, it does not pay" in record.getMessage() for record in said.records)
    assert "turned off" in features.summary()
    plain = uncached(batches(photographs, None, count=20))
    assert_equal(found[-1:], plain[-1:])  # and computes on, unrounded


def test_auto_says_so_where_nothing_could_be_written(tmp_path, photographs, said):
    folder = tmp_path / "file"
    folder.write_text("in the way")
    features = opened(folder, Teacher(slow=0.02), cache="auto")
    targets(features, batches(photographs, features.attach, count=16))
    assert not features.active
    assert any("nothing could be read back" in record.getMessage() for record in said.records)


def test_a_cache_that_disagrees_with_the_teacher_is_turned_off(tmp_path, photographs, said):
    stale = opened(tmp_path, Teacher(scale=1.1))
    targets(stale, batches(photographs, stale.attach))
    stale.close()
    features = opened(tmp_path, check_every=8)
    found = targets(features, batches(photographs, features.attach))
    assert features.drifted == 1
    assert not features.active
    assert any("differs by" in record.getMessage() for record in said.records)
    plain = uncached(batches(photographs, None))
    assert_equal(found[-1:], plain[-1:])


@pytest.mark.parametrize(("dtype", "spike"), [("fp16", None), ("int8", None), ("int8", 6.0)])
def test_a_sound_cache_passes_its_checks_however_coarse_its_form(tmp_path, photographs, dtype, spike):
    for _ in range(2):
        features = opened(tmp_path, Teacher(spike=spike), check_every=2, dtype=dtype)
        targets(features, batches(photographs, features.attach, count=3))
        features.close()
    assert (features.drifted, features.active) == (0, True)


@pytest.mark.parametrize(("teacher", "run", "kept"), [("bf16", "fp32", True), ("fp32", "bf16", False)])
def test_what_a_check_forgives_is_the_teachers_own_precision(tmp_path, photographs, teacher, run, kept):
    for scale in (1.0, 1.03):
        config = configured(tmp_path, check_every=2)
        config = config.model_copy(update={"engine": config.engine.model_copy(update={"precision": run})})
        features = CachedTargets(Teacher(scale=scale, precision=teacher), config, torch.device("cpu"), 0)
        targets(features, batches(photographs, features.attach, count=2))
        features.close()
    assert features.active is kept


def test_the_share_and_the_rate_are_of_what_was_read_not_of_what_was_found(tmp_path, photographs):
    first = opened(tmp_path)
    targets(first, batches(photographs, first.attach, count=2))
    first.close()
    deciding = opened(tmp_path, cache="auto")
    targets(deciding, batches(photographs, deciding.attach, count=2))
    assert (deciding.share, deciding.hits, deciding.read_bytes, deciding.read_s) == (0.0, 0, 0, 0.0)
    deciding.close()
    again = opened(tmp_path)
    targets(again, batches(photographs, again.attach, count=2))
    assert (again.share, again.hits) == (1.0, 8)
    again.attach.turn_off()
    targets(again, batches(photographs, again.attach, count=2))
    assert again.share == 0.0


def test_features_that_are_not_finite_reach_the_loss_but_not_the_disk(tmp_path, photographs):
    features = opened(tmp_path, Teacher(scale=math.inf))
    found = targets(features, batches(photographs, features.attach, count=1))
    features.close()
    assert not found[0][0].isfinite().all()
    assert (features.writer.stats.written, features.writer.stats.unstorable) == (0, 4)


def test_the_summary_counts(tmp_path, photographs):
    for _ in range(2):
        features = opened(tmp_path)
        targets(features, batches(photographs, features.attach))
        features.close()
    assert features.summary().startswith("100% of 24 crops read at ")


def test_runs_with_the_cache_off_on_and_read_again_have_the_same_losses(runs, tmp_path):
    settings = {"train__steps": 4, "train__distill_steps": 2, "train__batch": 4, "data__boxes_per_photo": 2}
    settings |= {"eval__per_tier": 1}
    cached = {"features__folder": tmp_path, "features__cache": "on", **settings}
    runs.run("uncached", **settings)
    runs.run("cached", **cached)
    runs.run("cached-again", ranks=2, engine__zero=2, **cached)
    plain, first, second = (runs.losses(name) for name in ("uncached", "cached", "cached-again"))
    for step, loss in plain.items():
        # fp16 features; the restorer's first update, a whole one, carries their difference on.
        assert first[step] == pytest.approx(loss, abs=5e-4)
        assert second[step] == pytest.approx(first[step], abs=1e-4)
    shares = [record["cached"] for record in runs.records("cached-again") if "cached" in record]
    assert shares == [1.0] * 4
    assert "feature cache, rank 0: 100% of 8 crops read" in (runs.folder("cached-again") / "log.txt").read_text()
