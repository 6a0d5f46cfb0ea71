"""Kernels and paths: rules 1, 3, 5 and 7 of blur synthesis, and extents that are what they say."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.blur import BlurConfig
from data.blur.defocus import disc_kernel, out_of_focus
from data.blur.generators import draw_path
from data.blur.kernel import kernel_of_path
from data.blur.paths import linear_path, settling_path, straightness_of, turning_of
from data.blur.rng import sample_rng
from data.blur.trajectory import densify, extent_of, gaussian_process_path, scale_to_extent
from tests.data.blur.kernels import centroid_of, convolve_valid

PATHS = ["gaussian_process", "boracchi_foi", "linear", "arc", "accelerated", "tremor", "settling"]
MOTIONS = [BlurConfig().motion, BlurConfig(preset="severe").motion]


def make_path(generator: str, seed: int, extent: float) -> np.ndarray:
    path, _ = draw_path(sample_rng(seed, 0, generator, 0), generator, MOTIONS[seed % 2])
    return scale_to_extent(path, extent)


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(PATHS), st.integers(0, 2**20), st.floats(0.5, 200))
def test_kernel_is_centred_normalised_odd_and_connected(generator, seed, extent):
    kernel = kernel_of_path(make_path(generator, seed, extent))
    assert kernel.dtype == np.float32
    assert kernel.shape[0] == kernel.shape[1]
    assert kernel.shape[0] % 2 == 1
    assert np.abs(centroid_of(kernel)).max() < 0.02
    assert abs(float(kernel.astype(np.float64).sum()) - 1) < 1e-6
    assert kernel.min() >= 0
    pieces, _ = cv2.connectedComponents((kernel > 0).astype(np.uint8), connectivity=8)
    assert pieces == 2  # background and one streak


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(PATHS), st.integers(0, 2**20), st.floats(1, 160))
def test_extent_is_exact_and_seen_in_the_kernel(generator, seed, extent):
    path = make_path(generator, seed, extent)
    assert extent_of(path) == pytest.approx(extent, rel=1e-9)
    rows, columns = np.nonzero(kernel_of_path(path))
    seen = max(np.ptp(rows), np.ptp(columns))
    # A splat covers two px at either end, and the path's ends are half a step short.
    assert extent - 1.5 <= seen <= extent + 2.5


def test_impulse_leaves_the_path_itself_behind():
    # True convolution: a point of light draws the trajectory, not its mirror image.
    path = np.array([[0.0, 0.0], [0.0, 20.0], [12.0, 20.0]])
    kernel = kernel_of_path(path)
    size, radius = len(kernel), len(kernel) // 2
    image = np.zeros((2 * size + 1, 2 * size + 1, 3), np.float32)
    image[size, size] = 1
    blurred = convolve_valid(image, kernel)
    centre = size - radius
    patch = blurred[centre - radius : centre + radius + 1, centre - radius : centre + radius + 1]
    assert np.abs(patch - kernel[..., None]).max() < 1e-6
    assert np.abs(kernel - kernel[::-1, ::-1]).max() > 1e-3


@pytest.mark.parametrize("size", [1, 3, 7, 9, 11, 33, 65])
def test_convolution_equals_the_sum_it_stands_for(size):
    rng = sample_rng(size, 0, "convolution", 0)
    image = rng.random((size + 12, size + 17, 3), dtype=np.float32)
    kernel = rng.random((size, size)).astype(np.float32)
    kernel /= kernel.sum()
    expected = np.zeros((13, 18, 3))
    for y in range(size):
        for x in range(size):
            expected += kernel[y, x] * image[size - 1 - y : size + 12 - y, size - 1 - x : size + 17 - x].astype(float)
    result = convolve_valid(image, kernel)
    assert result.shape == (13, 18, 3)
    assert result.dtype == np.float32
    assert np.abs(result - expected).max() < 2e-6


def test_a_fast_piece_of_a_path_is_as_unbroken_and_less_bright():
    path = np.array([[0.0, 0.0], [0.0, 2.0], [0.0, 42.0]])  # 20 times faster in the second half
    points, weights = densify(path)
    assert np.hypot(*np.diff(points, axis=0).T).max() <= 0.251
    assert weights.sum() == pytest.approx(1)
    assert weights[points[:, 1] < 2].sum() == pytest.approx(0.5)


def test_gaussian_process_has_the_covariance_it_claims():
    length, draws = 0.4, 4000
    paths = np.stack([gaussian_process_path(sample_rng(i, 0, "gp", 0), length, 0.5, 0.0) for i in range(draws)])
    # With angle 0 the columns are the two processes; lags of 0, 32, … of 256 samples.
    for column, deviation in ((0, 1.0), (1, 0.5)):
        values = paths[:, ::32, column] / deviation
        lag = np.arange(values.shape[1]) / 8
        d = np.sqrt(5) * lag / length
        expected = (1 + d + d * d / 3) * np.exp(-d)
        measured = (values[:, :1] * values).mean(0)
        assert np.abs(measured - expected).max() < 4 / np.sqrt(draws)


def test_a_path_that_stands_still_is_refused():
    with pytest.raises(ValueError, match="does not move"):
        scale_to_extent(np.zeros((5, 2)), 10)


@pytest.mark.parametrize("radius", [1, 2.5, 7, 40])
def test_a_disc_is_centred_unit_and_as_wide_as_it_says(radius):
    disc = disc_kernel(radius)
    assert abs(float(disc.sum()) - 1) < 1e-6
    assert np.abs(centroid_of(disc)).max() < 1e-6
    at = np.arange(len(disc)) - len(disc) // 2
    # Mean square distance of a disc along one axis is r²/4, of the px that samples it 1/12.
    assert (disc.sum(0) @ at**2) == pytest.approx(radius**2 / 4 + 1 / 12, rel=0.1, abs=0.08)


def test_defocus_on_a_motion_keeps_its_centre_and_its_streak():
    kernel = kernel_of_path(make_path("linear", 3, 40))
    mixed = out_of_focus(kernel, 2.0)
    assert len(mixed) == len(kernel) + 4
    assert np.abs(centroid_of(mixed)).max() < 0.02
    assert abs(float(mixed.astype(np.float64).sum()) - 1) < 1e-6
    point = np.zeros((101, 101, 3), np.float32)
    point[50, 50] = 1
    both = convolve_valid(convolve_valid(point, kernel), disc_kernel(2.0))
    assert np.abs(both - convolve_valid(point, mixed)).max() < 1e-6


def test_the_default_mix_turns_little_and_the_old_one_much():
    """Turning of the paths, weighted by the shares of their generators."""
    medians = {}
    for name in ("camera", "severe"):
        config = BlurConfig(preset=name)
        shares = {g: share for g, share in config.generators.model_dump().items() if g in PATHS and share > 0}
        turned, weights = [], []
        for generator, share in shares.items():
            for seed in range(120):
                turned.append(turning_of(draw_path(sample_rng(seed, 1, generator, 0), generator, config.motion)[0]))
                weights.append(share / 120)
        order = np.argsort(turned)
        medians[name] = np.array(turned)[order][np.searchsorted(np.cumsum(np.array(weights)[order]), sum(weights) / 2)]
    assert medians["camera"] < 60
    assert medians["severe"] > 250


def test_turning_and_straightness_of_known_paths():
    circle = np.stack([np.sin(t := np.linspace(0, 2 * np.pi, 257)), np.cos(t)], axis=1)
    assert turning_of(circle) == pytest.approx(360, rel=0.03)
    assert straightness_of(circle) == pytest.approx(0, abs=1e-6)
    assert turning_of(linear_path(0.3)) == pytest.approx(0, abs=1e-6)
    assert straightness_of(linear_path(0.3)) == pytest.approx(1)
    assert turning_of(settling_path(0.0, 0.2, 1.0, 0.0)) == pytest.approx(180, abs=2)  # out, and back
