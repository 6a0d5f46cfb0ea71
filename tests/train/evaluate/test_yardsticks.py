"""Yardsticks: what is chosen is what is best, and what needs no model does what its formula says."""

import json
import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage import data, filters

from data.blur.kernel import convolve_planes
from data.shards.set import ShardSet
from data.stream.crops import PAIRS_VERSION
from tests.train.small_sets import BUNDLED, small_set
from train.config.file import configure
from train.evaluate import training_pairs as training
from train.evaluate.bins import BINS, bin_of, nearest_bin
from train.evaluate.chosen import yardsticks_of
from train.evaluate.deconvolution import richardson_lucy, to_linear, to_srgb, wiener
from train.evaluate.metrics import measured
from train.evaluate.yardsticks import (
    ALL,
    AMOUNTS,
    FORMAT,
    ITERATIONS,
    NOISES,
    SIGMAS,
    OutdatedError,
    Yardsticks,
    choose,
    fit,
    fit_deconvolution,
    known_kernel,
    moments,
)


def photograph(top: int = 0, left: int = 160, size: int = 96) -> np.ndarray:
    return np.ascontiguousarray(data.astronaut()[top : top + size, left : left + size])


def tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.rint(image.clip(0, 255)).astype(np.uint8).transpose(2, 0, 1).copy())


def pair(tier: str, blurry: np.ndarray, sharp: np.ndarray, kernel=None, generator: str = "linear") -> dict:
    return {"tier": tier, "blurry": tensor(blurry), "sharp": tensor(sharp), "kernel": kernel, "generator": generator}


def noisy(seed: int, strength: float) -> tuple[np.ndarray, np.ndarray]:
    sharp = photograph(top=40 * seed)
    noise = np.random.Generator(np.random.Philox(seed)).normal(size=sharp.shape) * strength
    return sharp + noise, sharp


def psnr(image: torch.Tensor, sharp: torch.Tensor) -> float:
    return measured(image[None], sharp[None], ["psnr"])[0]["psnr"]


def test_smoothing_is_scipys_and_unsharp_masking_is_skimages():
    image = photograph()
    made = Yardsticks({ALL: 1.4}, {ALL: (2.0, 0.7)}).apply(tensor(image), "severe")
    smooth = ndimage.gaussian_filter(image.astype(np.float64), (1.4, 1.4, 0), mode="mirror", truncate=4)
    sharpened = filters.unsharp_mask(image.astype(np.float64), 2.0, 0.7, preserve_range=True, channel_axis=2)
    for name, other in (("gaussian", smooth), ("unsharp", sharpened)):
        difference = made[name].permute(1, 2, 0).numpy().astype(int) - np.rint(other.clip(0, 255)).astype(int)
        inner = difference[10:-10, 10:-10]  # skimage continues a picture otherwise
        assert np.abs(inner).max() <= 1, name
        assert (inner != 0).mean() < 0.01, name


def test_what_is_chosen_has_the_highest_mean_psnr_of_all_settings():
    pairs = [pair("severe", *noisy(seed, 12)) for seed in range(3)]
    pairs += [pair("mild", ndimage.gaussian_filter(photograph(40 * n).astype(float), (0.8, 0.8, 0)), photograph(40 * n))
              for n in range(2)]  # fmt: skip
    found = fit(pairs)
    for tier in ("severe", "mild", ALL):
        some = [each for each in pairs if tier in (each["tier"], ALL)]

        def mean(settings: Yardsticks, name: str, some=some) -> float:
            return np.mean([psnr(settings.apply(each["blurry"], "any")[name], each["sharp"]) for each in some])

        smooth = {s: mean(Yardsticks({ALL: s}, {ALL: (1.0, 0.0)}), "gaussian") for s in (0.0, *SIGMAS)}
        assert smooth[found.gaussian[tier]] > max(smooth.values()) - 0.01, tier
        best = mean(Yardsticks({ALL: 0.0}, {ALL: found.unsharp[tier]}), "unsharp")
        for setting in [(s, a) for s in SIGMAS[::2] for a in AMOUNTS[::2]]:
            assert best > mean(Yardsticks({ALL: 0.0}, {ALL: setting}), "unsharp") - 0.02, (tier, setting)
    assert found.gaussian["severe"] > 0.5  # noise is smoothed
    assert found.unsharp["severe"][1] == 0
    assert (found.gaussian["mild"], found.unsharp["mild"][1] > 0) == (0.0, True)  # a slight blur is sharpened


def test_the_choice_depends_on_neither_order_nor_ranks():
    pairs = [pair(tier, *noisy(seed, 4 * seed + 2)) for seed in range(3) for tier in ("severe", "mild")]
    assert fit(pairs) == fit(pairs[::-1])
    found = [moments(each["blurry"], each["sharp"], each["tier"]) for each in pairs]
    assert choose([*found[1::2], *found[::2]], "d").digest == "d"
    assert fit([]).apply(pairs[0]["blurry"], "severe") == {}


def test_a_tier_without_training_pairs_takes_what_is_best_over_all():
    found = fit([pair("severe", *noisy(1, 12))])
    made = found.apply(tensor(noisy(2, 12)[0]), "real pairs")
    assert torch.equal(made["gaussian"], found.apply(tensor(noisy(2, 12)[0]), "severe")["gaussian"])


def test_yardsticks_are_kept_as_they_are(tmp_path):
    found = Yardsticks(
        {"severe": 2.0, ALL: 1.0}, {"severe": (1.0, 0.2), ALL: (1.4, 0.0)}, {ALL: 0.1}, {ALL: 20}, 8, "x"
    )
    found.save(tmp_path / "yardsticks.json")
    assert Yardsticks.load(tmp_path / "yardsticks.json") == found
    for damage in ("{", "[]", json.dumps({"format": FORMAT}), json.dumps({"format": 0, "gaussian": {}})):
        (tmp_path / "yardsticks.json").write_text(damage)
        with pytest.raises(ValueError, match=r"yardsticks.json: not the yardsticks of a run .* made anew"):
            Yardsticks.load(tmp_path / "yardsticks.json")
    (tmp_path / "yardsticks.json").write_text(json.dumps({"format": 1, "gaussian": {}, "unsharp": {}}))
    with pytest.raises(OutdatedError, match=r"yardsticks\.json: .*older version.*made anew"):
        Yardsticks.load(tmp_path / "yardsticks.json")


def test_a_run_s_yardsticks_of_an_older_version_are_made_anew_for_an_evaluation(tmp_path, monkeypatch):
    monkeypatch.setattr("train.evaluate.chosen._of_bundled", lambda blur: Yardsticks({ALL: 5.6}, {ALL: (1.0, 0.0)}))
    source = tmp_path / "run" / "checkpoints" / "step-1"
    source.mkdir(parents=True)
    mine = Yardsticks({ALL: 2.0}, {ALL: (1.0, 0.0)})
    mine.save(tmp_path / "run" / "yardsticks.json")
    how = {"device": torch.device("cpu"), "deconvolution": False}
    found, said = yardsticks_of(config(), source, tmp_path / "a", **how)
    assert (found, said) == (mine, "training pairs of the run")
    (tmp_path / "run" / "yardsticks.json").write_text(json.dumps({"format": 1, "gaussian": {}, "unsharp": {}}))
    found, said = yardsticks_of(config(), source, tmp_path / "b", **how)
    assert found.gaussian == {ALL: 5.6}
    assert "the run's are of an older version" in said
    (tmp_path / "run" / "yardsticks.json").write_text("{")
    with pytest.raises(ValueError, match="not the yardsticks of a run"):
        yardsticks_of(config(), source, tmp_path / "c", **how)


# -- bins --------------------------------------------------------------------------------------------------------------


def test_recorded_pairs_have_the_settings_of_training_pairs_with_like_input_psnr():
    """Of little and of much noise: what is best over all is best for neither."""
    some = {strength: [pair("severe", *noisy(seed, strength)) for seed in range(2)] for strength in (4, 40)}
    found = fit([each for rows in some.values() for each in rows])
    for strength, rows in some.items():
        alone = fit(rows)
        for each in rows:
            before = psnr(each["blurry"], each["sharp"])
            for tier in ("", "paired"):
                made = found.apply(each["blurry"], tier, input_psnr=before)
                assert torch.equal(made["gaussian"], alone.apply(each["blurry"], "")["gaussian"]), strength
            known = found.apply(each["blurry"], "severe", input_psnr=before)  # its own tier goes first
            assert torch.equal(known["gaussian"], found.apply(each["blurry"], "severe")["gaussian"])
    assert len({found.gaussian[ALL], *(fit(rows).gaussian[ALL] for rows in some.values())}) == 3


def test_a_bin_without_training_pairs_takes_its_nearest_neighbour():
    found = fit([pair("severe", *noisy(0, 40)), pair("mild", *noisy(1, 4))])
    low, high = (bin_of(psnr(*[tensor(image) for image in noisy(n, strength)])) for n, strength in ((0, 40), (1, 4)))
    assert set(BINS) < found.gaussian.keys()
    assert set(BINS) < found.unsharp.keys()
    assert (low, high) == (BINS[0], BINS[-1])
    assert [found.gaussian[name] for name in BINS] == [found.gaussian[low]] * 3 + [found.gaussian[high]] * 3
    assert found.gaussian[low] > found.gaussian[high]
    assert nearest_bin(BINS[2], {BINS[0], BINS[4]}) == BINS[4]  # of two as near the one whose settings do less
    with pytest.raises(ValueError, match="no bin at all"):
        nearest_bin(BINS[2], {ALL})
    assert fit([]).gaussian == {}


# -- deconvolution -----------------------------------------------------------------------------------------------------


def streak(length: int = 15) -> np.ndarray:
    """Not symmetric, so that a mirrored kernel shows."""
    kernel = np.zeros((length, length), np.float32)
    for n in range(length):
        kernel[n, min(n, length - 1 - n // 2)] = 1 + 3 * n / length
    return kernel / kernel.sum()


def blurred(kernel: np.ndarray, size: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """(blurry, sharp) float32 [3, size, size] in [0, 1]: true convolution in linear light of more than the crop."""
    reach = len(kernel) // 2
    whole = to_linear(torch.from_numpy(data.astronaut()[:220, 100:320].transpose(2, 0, 1) / np.float32(255)))
    top = slice(40, 40 + size)
    window = whole[:, 40 - reach : 40 + size + reach, 40 - reach : 40 + size + reach].contiguous().numpy()
    light = torch.from_numpy(np.stack(convolve_planes(list(window), kernel)))
    return to_srgb(light), to_srgb(whole[:, top, top])


def decibels(first: torch.Tensor, second: torch.Tensor, rim: int = 0) -> float:
    inner = (..., slice(rim, first.shape[-2] - rim), slice(rim, first.shape[-1] - rim))
    return -10 * math.log10((first[inner] - second[inner]).square().mean())


@pytest.mark.parametrize("mirrored", [False, True])
def test_deconvolution_undoes_a_blur_by_its_own_kernel_and_by_no_other(mirrored):
    kernel = streak()
    blurry, sharp = blurred(kernel)
    before = decibels(blurry, sharp)
    given = kernel[::-1, ::-1].copy() if mirrored else kernel
    gains = (
        decibels(wiener(blurry, given, 1e-3), sharp) - before,
        decibels(richardson_lucy(blurry, given, 60), sharp) - before,
    )
    if mirrored:
        assert max(gains) < 0
    else:
        assert gains[0] > 1  # its borders are made up
        assert gains[1] > 6
        assert decibels(wiener(blurry, kernel, 1e-3), sharp, 30) - decibels(blurry, sharp, 30) > 6


def test_wiener_is_its_formula_on_a_picture_that_wraps_around():
    """In its middle, against a plain circular transform of the same picture in fp64."""
    kernel = streak(9)
    blurry, _ = blurred(kernel)
    light = to_linear(blurry).double().numpy()
    canvas = np.zeros(light.shape[-2:])
    for (y, x), value in np.ndenumerate(kernel):
        canvas[(y - 4) % 128, (x - 4) % 128] += value
    transfer = np.fft.fft2(canvas)
    plain = np.fft.ifft2(np.fft.fft2(light) * transfer.conj() / (np.abs(transfer) ** 2 + 0.1)).real
    mine = to_linear(wiener(blurry, kernel, 0.1)).double().numpy()
    assert np.abs(mine - plain.clip(0, 1))[:, 45:-45, 45:-45].max() < 0.02


def test_richardson_lucy_is_skimages_where_borders_do_not_matter():
    from skimage.restoration import richardson_lucy as theirs

    kernel = streak(7)
    blurry, _ = blurred(kernel)
    light = to_linear(blurry).double().numpy()
    other = np.stack([theirs(plane, kernel.astype(float), num_iter=5, clip=False) for plane in light])
    mine = to_linear(richardson_lucy(blurry, kernel, 5)).double().numpy()
    # It begins with a grey picture and ours with the blurry one: after few iterations they still differ a little.
    assert np.abs(mine - other)[:, 40:-40, 40:-40].mean() < 0.02
    more = np.stack([theirs(plane, kernel.astype(float), num_iter=80, clip=False) for plane in light])
    mine = to_linear(richardson_lucy(blurry, kernel, 80)).double().numpy()
    assert np.abs(mine - more)[:, 40:-40, 40:-40].mean() < 0.005


def test_deconvolution_is_chosen_on_pairs_whose_kernel_is_known_and_used_on_them_alone():
    kernel = streak()
    images = [image.permute(1, 2, 0).numpy() * 255 for image in blurred(kernel)]
    rows = [pair("severe", *images, kernel), pair("severe", *images, kernel, "rotation"), pair("mild", *images)]
    assert [known_kernel(row) is not None for row in rows] == [True, False, False]
    assert known_kernel(pair("identity", *images, np.ones((1, 1), np.float32))) is None
    found = fit_deconvolution(Yardsticks({ALL: 1.0}, {ALL: (1.0, 0.0)}), rows, torch.device("cpu"))
    assert found.wiener == dict.fromkeys(["severe", ALL], found.wiener[ALL])
    made = found.apply(rows[0]["blurry"], "severe", kernel)
    assert list(made) == ["gaussian", "unsharp", "wiener", "richardson_lucy"]
    assert list(found.apply(rows[0]["blurry"], "severe")) == ["gaussian", "unsharp"]

    def quality(noise: float) -> float:
        alone = Yardsticks(wiener={ALL: noise}, richardson_lucy={ALL: 5})
        return psnr(alone.apply(rows[0]["blurry"], "", kernel)["wiener"], rows[0]["sharp"])

    results = {noise: quality(noise) for noise in NOISES}
    assert found.wiener["severe"] == max(results, key=results.get)
    assert found.richardson_lucy["severe"] in ITERATIONS
    assert fit_deconvolution(found, [], torch.device("cpu")).wiener == {}


# -- the training pairs ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> list[ShardSet]:
    folder = tmp_path_factory.mktemp("yardsticks")
    return [ShardSet(small_set(folder / name, split, 4)) for name, split in (("a", "train"), ("b", "val"))]


def config(**changes):
    return configure(
        [
            f"{name.replace('__', '.')}={value}"
            for name, value in {"data__crop": 64, "data__margin": 16, **changes}.items()
        ]
    )


def test_training_pairs_are_spread_over_the_sets_and_shared_by_the_ranks(sets):
    whole = list(training.training_pairs(config(), sets, photographs=6))
    assert len(whole) == 6 * 5
    assert len({each["key"] for each in whole[:15]}) == 3
    parts = [list(training.training_pairs(config(), sets, photographs=6, rank=r, world=4)) for r in range(4)]
    assert max(map(len, parts)) == 10

    def digest(rows) -> list:
        return sorted((each["key"], each["tier"], int(each["blurry"].sum())) for each in rows)

    assert digest([each for part in parts for each in part]) == digest(whole)
    few = list(training.training_pairs(config(), sets[:1], photographs=9))
    assert len(few) == 4 * 5  # each photograph once


def test_the_digest_tells_other_training_pairs(sets, monkeypatch):
    mine = training.training_digest(config(), sets)
    assert mine == training.training_digest(config(run__seed=7), sets)  # the same pairs for any seed
    others = [
        training.training_digest(config(), sets[:1]),
        training.training_digest(config(data__crop=96), sets),
        training.training_digest(config(blur__preset="mild"), sets),
    ]
    monkeypatch.setattr(training, "PAIRS_VERSION", PAIRS_VERSION + 1)
    assert len({mine, *others, training.training_digest(config(), sets)}) == 5


def test_on_the_bundled_photographs_smoothing_gains_what_the_docs_record():
    """docs/METRICS.md: a tenth of a decibel on the severe tier of the validation photographs, without any model."""
    from data.stream.validation import validation_pairs

    whole = configure(["data.crop=192"])
    found = choose(training.training_moments(whole, [ShardSet(BUNDLED / "train")]))
    severe = validation_pairs(
        ShardSet(BUNDLED / "val"), whole.blur, crop=256, margin=whole.data.margin, seed=0, tiers=["severe"]
    )
    gains = [psnr(found.apply(p["blurry"], p["tier"])["gaussian"], p["sharp"]) - p["input_psnr"] for p in severe]
    assert found.pairs == 80
    assert np.mean(gains) == pytest.approx(0.11, abs=0.02)
