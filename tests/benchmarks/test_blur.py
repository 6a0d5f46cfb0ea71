"""Benchmarks of blur synthesis: pairs a second on one core, decode included, against a plain loop and peers.

`pytest --benchmark-only tests/benchmarks/test_blur.py -s`; peers are measured where they are installed: `pip install
deepinv kornia albumentations`. Times are CPU seconds of one thread, so a busy machine does not change what is compared.
extra_info holds the rates and the ratio of two things timed in the same run. Every row decodes a bundled 512 px JPEG
for two crops of 256² px.
"""

import tarfile
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
import torch

from data.blur import BlurConfig, draw_attempt, plan_pair, sample_rng, synthesize_pair
from data.blur.batched import pairs_of_plans
from tests.data.blur.kernels import centroid_of

CROP, CROPS = 256, 2
GENERATORS = list(BlurConfig().generators.model_dump())
UNIFORM = {"gaussian_process": 0.64, "boracchi_foi": 0.12, "linear": 0.08, "arc": 0.08, "accelerated": 0.08}
OLD = {"preset": "severe"}  # the default before `camera`
MIXES = {
    "default mix": {},
    "old mix": OLD,
    "old uniform mix": {**OLD, "generators": UNIFORM},
    "uniform mix": {"generators": UNIFORM},
    **{g: {"generators": {g: 1}} for g in GENERATORS},
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]

pytestmark = pytest.mark.benchmark(timer=time.process_time, disable_gc=True)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    yield
    torch.set_num_threads(before[0])
    cv2.setNumThreads(before[1])


@pytest.fixture(scope="module")
def files() -> list[bytes]:
    """The bundled photographs as JPEG files, every second one."""
    found = []
    for path in sorted((Path(__file__).parents[2] / "data" / "samples").glob("*/*.tar")):
        with tarfile.open(path) as tar:
            found += [tar.extractfile(m).read() for m in tar.getmembers() if m.name.endswith(".jpg")]
    return found[::2]


def boxes(photo: np.ndarray, name: str):
    for crop in range(CROPS):
        rng = sample_rng(0, 0, name, crop)
        yield (*(int(rng.integers(side - CROP + 1)) for side in photo.shape[:2]), CROP), rng


def make_pairs(files: list[bytes], config: BlurConfig) -> int:
    for number, data in enumerate(files):
        photo = simplejpeg.decode_jpeg(data)
        for box, rng in boxes(photo, str(number)):
            synthesize_pair(photo, box, rng, config)
    return len(files) * CROPS


def each_crop(files: list[bytes], blur) -> int:
    """Decode, crop with room for a 65 px kernel, blur: what every row below shares with `make_pairs`."""
    for number, data in enumerate(files):
        photo = simplejpeg.decode_jpeg(data)
        for (top, left, _), rng in boxes(photo, str(number)):
            top, left = (min(max(v, 32), 512 - CROP - 32) for v in (top, left))
            blur(photo[top - 32 : top + CROP + 32, left - 32 : left + CROP + 32], rng)
    return len(files) * CROPS


def plain(window: np.ndarray, rng: np.random.Generator) -> None:
    """What a short script does: a random streak of 65 px, filter2D on floats, 8 bits, JPEG."""
    kernel = np.zeros((65, 65), np.float32)
    angle = rng.uniform(0, np.pi)
    end = (32 * np.cos(angle), 32 * np.sin(angle))
    cv2.line(kernel, (round(32 - end[0]), round(32 - end[1])), (round(32 + end[0]), round(32 + end[1])), 1.0)
    blurred = cv2.filter2D(window.astype(np.float32), -1, kernel / kernel.sum())[32:-32, 32:-32]
    codes = np.clip(blurred + 0.5, 0, 255).astype(np.uint8)
    cv2.imdecode(cv2.imencode(".jpg", codes, [cv2.IMWRITE_JPEG_QUALITY, 85])[1], cv2.IMREAD_COLOR)


def compare(benchmark, tested, baseline, name: str) -> dict[str, float]:
    """Rates of both in crops per CPU second; the baseline is timed before and after, the better of it counts."""

    def seconds() -> float:
        start = time.process_time()
        baseline()
        return time.process_time() - start

    first = seconds()
    count = benchmark.pedantic(tested, rounds=3, warmup_rounds=1)
    other = min(first, seconds())
    rate = count / benchmark.stats.stats.min
    benchmark.extra_info.update(
        pairs_per_s=round(rate, 1),
        **{f"{name}_per_s": round(count / other, 1), "ratio": round(rate * other / count, 2)},
    )
    return benchmark.extra_info


@pytest.mark.parametrize("mix", MIXES)
def test_pairs_per_core(benchmark, files, mix):
    config = BlurConfig(**MIXES[mix])
    rates = compare(benchmark, lambda: make_pairs(files, config), lambda: each_crop(files, plain), "plain_loop")
    print(f"\n  {mix}: {rates}")


@pytest.mark.parametrize("device", DEVICES)
def test_batched_pairs(benchmark, files, device):
    """The torch path from plans whose first attempts are drawn, as a loading worker hands them over; wall clock."""
    plans = []
    for number, data in enumerate(files[:16]):
        photo = simplejpeg.decode_jpeg(data)
        plans += [plan_pair(photo, box, rng.bytes(16).hex(), BlurConfig()) for box, rng in boxes(photo, str(number))]
    first = [draw_attempt(plan, 0) for plan in plans]

    def run() -> None:
        start = time.perf_counter()
        pairs_of_plans(plans, device, first)
        if device == "cuda":
            torch.cuda.synchronize()
        walls.append(time.perf_counter() - start)

    walls: list[float] = []
    benchmark.pedantic(run, rounds=3, warmup_rounds=1)
    benchmark.extra_info.update(pairs_per_wall_s=round(len(plans) / min(walls), 1))
    print(f"\n  batched on {device}: {benchmark.extra_info}")


def deepinv_blur():
    deepinv = pytest.importorskip("deepinv")
    generator = deepinv.physics.generator.MotionBlurGenerator((65, 65), num_channels=1)

    def kernel(rng):
        return generator.step(1, seed=int(rng.integers(2**31)))["filter"]

    def blur(window, rng):
        picture = torch.from_numpy(np.ascontiguousarray(window)).permute(2, 0, 1)[None].float() / 255
        physics = deepinv.physics.BlurFFT(tuple(picture.shape[1:]), filter=kernel(rng))
        (physics(picture)[0, :, 32:-32, 32:-32].clamp(0, 1) * 255).round().to(torch.uint8)

    return blur, lambda rng: kernel(rng)[0, 0].numpy()


def kornia_blur():
    kornia = pytest.importorskip("kornia")

    def blur(window, rng):
        picture = torch.from_numpy(np.ascontiguousarray(window)).permute(2, 0, 1)[None].float() / 255
        blurred = kornia.filters.motion_blur(picture, 65, float(rng.uniform(0, 360)), 0.0)
        (blurred[0, :, 32:-32, 32:-32].clamp(0, 1) * 255).round().to(torch.uint8)

    return blur, lambda rng: kornia.filters.get_motion_kernel2d(65, float(rng.uniform(0, 360)), 0.0)[0].numpy()


def albumentations_blur():
    albumentations = pytest.importorskip("albumentations")
    transform = albumentations.MotionBlur(blur_limit=(65, 65), allow_shifted=False, p=1)
    return (
        lambda window, rng: transform(image=np.ascontiguousarray(window))["image"][32:-32, 32:-32],
        lambda rng: transform.get_params()["kernel"],
    )


PEERS = {"deepinv": deepinv_blur, "kornia": kornia_blur, "albumentations": albumentations_blur}


@pytest.mark.parametrize("peer", PEERS)
def test_uniform_pairs_against_a_peer(benchmark, files, peer):
    """Ours at an extent of 60 px with the whole camera, the peer's 65 px kernel and blur alone on 8-bit codes."""
    blur, kernel = PEERS[peer]()
    some = files[:6]  # peers take their time
    others = {tier: {"share": 0} for tier in ("identity", "mild", "moderate", "extreme")}
    config = BlurConfig(generators=UNIFORM, tiers=others | {"severe": {"share": 1, "extent": [60, 60]}})
    rates = compare(benchmark, lambda: make_pairs(some, config), lambda: each_crop(some, blur), peer)
    drawn = [np.asarray(kernel(sample_rng(0, 0, peer, i)), np.float64) for i in range(50)]
    whole = [cv2.connectedComponents((k > 1e-6 * k.max()).astype(np.uint8), connectivity=8)[0] == 2 for k in drawn]
    benchmark.extra_info.update(
        peer_kernels_connected=float(np.mean(whole)),
        peer_kernels_centred=float(np.mean([np.abs(centroid_of(k)).max() < 0.02 for k in drawn])),
    )
    print(f"\n  {peer}: {rates}")
