"""Blur that varies over the picture: camera rotation and moving layers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.blur import BlurConfig, sample_rng, synthesize_pair
from data.blur.config import MotionConfig
from data.blur.generators import draw_layers, draw_parallax
from data.blur.kernel import IDENTITY
from data.blur.layers import Layers, background_of, blob_mask, share_moved
from data.blur.layers import layers_blur as blur_planes
from data.blur.rolling import draw_rolling, rolling_blur
from data.blur.rotation import Frame, _apply, draw_rotation, reach_of, rotate_blur, rotation_of
from tests.data.blur.kernels import centroid_of

SIZE = 128


def rotation(seed: int, extent: float):
    rng = sample_rng(seed, 0, "rotation", 0)
    return draw_rotation(rng, extent, Frame(512, 600, 200, 300, SIZE))[0]


def plane(function, margin: int) -> np.ndarray:
    """A scene [S + 2m, S + 2m, 3] of a function of (column, row) counted from the crop's first pixel."""
    at = np.arange(-margin, SIZE + margin, dtype=np.float64)
    return np.repeat(function(at[None, :], at[:, None])[..., None], 3, axis=2).astype(np.float32)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 2**20), st.floats(2, 160))
def test_rotation_has_its_extent_its_margin_and_a_centred_unit_kernel(seed, extent):
    motion = rotation(seed, extent)
    at = np.linspace(0, SIZE - 1, 5)
    grid = np.stack(np.meshgrid(at, at), axis=-1).reshape(-1, 2)
    places = _apply(motion.homographies, grid)  # [N, P, 2]
    assert np.ptp(places, axis=0).max(axis=1).mean() == pytest.approx(extent, rel=1e-3)
    assert motion.weights.sum() == pytest.approx(1)
    assert places.min() >= -motion.margin
    assert places.max() <= SIZE - 1 + motion.margin
    assert motion.margin <= reach_of(extent)
    # Rule 1 for every pixel: its light comes from around the pixel itself.
    assert np.abs(np.tensordot(motion.weights, places, axes=1) - grid).max() < 0.02
    assert np.abs(centroid_of(motion.kernel)).max() < 0.02
    assert abs(float(motion.kernel.astype(np.float64).sum()) - 1) < 1e-6


def test_rotation_leaves_a_brightness_ramp_as_it_was():
    motion = rotation(4, 60)
    ramp = plane(lambda x, y: 0.3 + 0.002 * x + 0.003 * y, motion.margin)
    blurred = rotate_blur(ramp, motion)
    assert np.abs(blurred - ramp[motion.margin : -motion.margin, motion.margin : -motion.margin]).max() < 2e-4


def test_pan_streaks_points_along_its_axis_and_roll_around_its_centre():
    middle = (SIZE - 1) / 2
    still = np.zeros((257, 3))
    pan, roll = still.copy(), still.copy()
    pan[:, 1] = roll[:, 2] = np.linspace(-1, 1, 257)
    turned = rotation_of(pan, 4000.0, np.array([middle, middle]), SIZE, 30)
    points = np.zeros((SIZE + 2 * turned.margin, SIZE + 2 * turned.margin, 3), np.float32)
    points[turned.margin + 40, turned.margin + 64] = 1
    rows, columns = np.nonzero(rotate_blur(points, turned)[..., 0] > 1e-4)
    assert np.ptp(rows) <= 2  # straight lines stay straight
    assert np.ptp(columns) == pytest.approx(30, abs=2)
    spun = rotation_of(roll, 4000.0, np.array([middle, middle]), SIZE, 30)
    lengths = np.ptp(_apply(spun.homographies, np.array([[middle, middle], [SIZE - 1, middle]])), axis=0).max(axis=1)
    assert lengths[0] < 0.01
    assert lengths[1] > 20


def test_streaks_of_a_rotation_have_no_gaps():
    # Ghost copies would show as a comb: a point's streak must have light at every px of its length.
    angles = np.zeros((257, 3))
    angles[:, 1] = np.linspace(-1, 1, 257)
    motion = rotation_of(angles, 2000.0, np.array([64.0, 64.0]), SIZE, 80)
    points = np.zeros((SIZE + 2 * motion.margin, SIZE + 2 * motion.margin, 3), np.float32)
    points[motion.margin + 63 : motion.margin + 66, motion.margin + 63 : motion.margin + 66] = 1
    streak = rotate_blur(points, motion)[64, :, 0]
    lit = streak[64 - 36 : 64 + 36]
    assert lit.min() > 0.6 * lit.max()


def test_blob_masks_lie_in_the_crop_and_are_soft():
    for seed in range(20):
        mask = blob_mask(sample_rng(seed, 0, "blob", 0), 200, 100)
        rows, columns = np.nonzero(mask)
        assert 0.03 < (mask > 127).sum() / 100**2 < 0.6
        assert 50 <= rows.mean() <= 150
        assert 50 <= columns.mean() <= 150
        assert len(np.unique(mask)) > 10


def layers_blur(light: np.ndarray, background: np.ndarray, motion: Layers) -> np.ndarray:
    """The function under test, on interleaved pictures."""
    return np.stack(blur_planes(list(light.transpose(2, 0, 1)), list(background.transpose(2, 0, 1)), motion), axis=-1)


def scene(seed: int, side: int) -> np.ndarray:
    return sample_rng(seed, 0, "scene", 0).integers(0, 256, (side, side, 3)).astype(np.uint8)


def test_layers_at_rest_are_the_photograph():
    window = scene(0, 96)
    masks = np.stack([blob_mask(sample_rng(s, 0, "m", 0), 96, 64) for s in (1, 2)])
    behind = background_of(window, masks, (30, 40))
    assert not np.array_equal(behind, window)
    light, back = window / np.float32(255), behind / np.float32(255)
    still = Layers((IDENTITY, IDENTITY, IDENTITY), masks, 16, (30, 40))
    assert np.abs(layers_blur(light, back, still) - light[16:-16, 16:-16]).max() < 1e-5


def test_only_the_object_is_blurred_when_the_background_stands_still():
    window = scene(1, 120)
    mask = np.zeros((1, 120, 120), np.uint8)
    mask[0, 50:70, 50:70] = 255
    kernel = np.zeros((11, 11), np.float32)
    kernel[5] = 1 / 11
    behind = background_of(window, mask, (40, 40)) / np.float32(255)
    light = window / np.float32(255)
    result = layers_blur(light, behind, Layers((IDENTITY, kernel), mask, 10, (40, 40)))
    change = np.abs(result - light[10:-10, 10:-10]).max(axis=2)
    rows, columns = np.nonzero(change > 1e-4)
    assert rows.min() >= 40
    assert rows.max() < 60
    assert columns.min() >= 35
    assert columns.max() < 65


def test_a_moving_object_leaves_no_copy_of_itself_behind():
    # A red square on grey: what it uncovers must be grey, and its colour is carried nowhere but along its path.
    window = np.full((160, 160, 3), 128, np.uint8)
    window[60:100, 60:100] = (255, 0, 0)
    mask = np.zeros((1, 160, 160), np.uint8)
    mask[0, 60:100, 60:100] = 255
    behind = background_of(window, mask, (70, 10))
    assert np.abs(behind[70:90, 70:90].astype(int) - 128).max() <= 25
    kernel = np.zeros((61, 61), np.float32)
    kernel[30] = 1 / 61
    result = layers_blur(
        window / np.float32(255), behind / np.float32(255), Layers((IDENTITY, kernel), mask, 30, (70, 10))
    )
    red = result[50, :, 0] - result[50, :, 1]  # along the middle row of the square, crop coordinates
    assert red[:3].max() < 0.05
    assert np.all(np.diff(red[2:45]) > -0.02)  # rises evenly to the middle: a second copy would make it wavy
    assert np.all(np.diff(red[55:98]) < 0.02)


def test_given_masks_move_where_they_are_told_and_flip_with_the_photo():
    photo = scene(3, 200)
    mask = np.zeros((1, 200, 200), np.uint8)
    mask[0, 80:120, 40:80] = 255
    quiet = {
        "curves": {"srgb": 1},
        "highlight_boost": [0, 0],
        "noise": {"shot": 0, "read": 0},
        "jpeg": {"probability": 0},
    }
    config = BlurConfig(generators={"layers": 1}, photometry=quiet, tiers={"mild": {"extent": [6, 6], "psnr": [0, 99]}})
    for flip in (False, True):
        for seed in range(8):  # three in ten backgrounds stand still
            rng = sample_rng(seed, 0, "given", 0)
            pair = synthesize_pair(photo, (50, 10, 100), rng, config, tier="mild", masks=mask, flip=flip)
            if pair.meta["background_extent"] == 0:
                break
        change = np.abs(pair.blurry.astype(int) - pair.sharp).max(axis=2) > 2
        if flip:
            change = change[:, ::-1]
        rows, columns = np.nonzero(change)
        assert 22 <= rows.min() < 34
        assert 66 <= rows.max() < 78
        assert 22 <= columns.min() < 34
        assert 66 <= columns.max() < 78


def test_layers_draw_one_to_three_objects_the_foremost_the_fastest():
    frame = Frame(400, 400, 100, 100, 96)
    counts, still = [], 0
    for seed in range(60):
        layers, extents, details = draw_layers(sample_rng(seed, 0, "layers", 0), 50.0, frame, MotionConfig())
        assert extents[-1] == 50
        counts.append(len(layers.masks))
        still += details["background_extent"] == 0
        assert details["background_extent"] <= 25
        assert len(layers.kernels) == len(layers.masks) + 1
        assert layers.masks.shape[1] == 96 + 2 * layers.margin
        for kernel in layers.kernels:
            assert np.abs(centroid_of(kernel)).max() < 0.02
    assert set(counts) == {1, 2, 3}
    assert 8 <= still <= 30


@pytest.mark.parametrize("extent", [160.0, 240.0, 320.0])
def test_large_rotations_have_their_extent_and_no_gaps(extent):
    rotation, _ = draw_rotation(sample_rng(1, 0, "large", 0), extent, Frame(768, 768, 200, 200, 256))
    assert rotation.extent == pytest.approx(extent, rel=1e-3)
    assert rotation.margin <= reach_of(extent)
    middle = _apply(rotation.homographies, np.array([[127.5, 127.5], [0, 0], [255, 255]]))
    assert np.hypot(*np.moveaxis(np.diff(middle, axis=0), -1, 0)).max() <= 2
    with pytest.raises(ValueError, match="320 px at most"):
        BlurConfig(tiers={"extreme": {"extent": [80, 400]}})


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("extent", [4.0, 40.0, 150.0])
def test_rolling_shutter_has_its_extent_and_every_row_comes_from_itself(seed, extent):
    times = {"exposure": (1 / 250, 1 / 2), "readout": (0.01, 0.03), "tremor_hz": (8, 12)}
    rolling, facts = draw_rolling(sample_rng(seed, 0, "r", 0), extent, Frame(400, 600, 50, 100, 128), **times)
    assert 1 / 250 <= facts["exposure"] <= 1 / 2
    assert rolling.extent == pytest.approx(extent, rel=1e-6)
    assert rolling.margin <= reach_of(extent)
    means = rolling.ends.mean(axis=0)
    assert np.abs(means[:, 0, 0]).max() < 1e-3
    assert np.abs(means[:, 1, 0] - 127).max() < 1e-3
    assert np.abs(means[:, :, 1] - np.arange(128)[:, None]).max() < 1e-3
    assert np.abs(centroid_of(rolling.kernel)).max() < 0.02
    ramp = np.fromfunction(lambda y, x, c: y + 2 * x, (128 + 2 * rolling.margin,) * 2 + (3,), dtype=np.float32)
    inner = slice(rolling.margin, -rolling.margin)
    # A ramp of brightness stays as it was: no row is shifted against the ground truth.
    assert np.abs(rolling_blur(ramp, rolling) - ramp[inner, inner]).max() < 0.02 * max(1.0, extent / 40)


def test_a_short_exposure_bends_what_a_long_one_only_blurs():
    """Rows of a rolling shutter see pieces of the path: the shorter the exposure beside the readout, the less alike."""
    unlike = {}
    for name, exposure in (("short", (1 / 200, 1 / 200)), ("long", (1 / 2, 1 / 2))):
        rows = []
        for seed in range(10):
            times = {"exposure": exposure, "readout": (0.03, 0.03), "tremor_hz": (8, 12)}
            rolling, _ = draw_rolling(sample_rng(seed, 0, "u", 0), 40.0, Frame(256, 256, 0, 0, 256), **times)
            extents = np.ptp(rolling.ends, axis=0).max(axis=-1)[:, 0]
            rows.append(np.ptp(extents) / extents.mean())
        unlike[name] = np.median(rows)
    assert unlike["short"] > 2 * unlike["long"]


def test_near_and_far_planes_move_together_and_the_share_at_the_tier_is_said():
    frame = Frame(400, 400, 100, 100, 96)
    for seed in range(20):
        layers, (far, near), facts = draw_parallax(sample_rng(seed, 0, "p", 0), 50.0, frame, MotionConfig())
        assert near == 50
        assert 10 <= far == facts["far_extent"] <= 35
        mask = layers.masks[0]
        assert 0.1 < mask.mean() / 255 < 0.9
        share = share_moved(layers, [far, near], 30)
        inner = mask[layers.margin : -layers.margin, layers.margin : -layers.margin].mean() / 255
        assert share == pytest.approx(inner if far < 30 else 1, abs=1e-3)


def test_texture_behind_objects_has_no_seam_from_the_other_side():
    ramp = np.linspace(20, 230, 96)[None, :, None] + np.zeros((96, 96, 3))  # its two ends are 210 codes apart
    window = (ramp + 10 * np.sin(np.arange(96) / 3)[None, :, None]).astype(np.uint8)
    mask = np.full((1, 96, 96), 255, np.uint8)
    mask[:, :4], mask[:, -4:] = 0, 0
    behind = background_of(window, mask, (0, 40)).astype(int)
    steps = np.abs(np.diff(behind[20:76].mean(axis=(0, 2))))
    assert steps.max() < 12
