"""Tiles: of any size, without seams, and what the whole picture gives where the network does not see far."""

from itertools import pairwise

import pytest
import torch

from model.deblurrer import Deblurrer, build_backbone
from tests.train.restore.known import Known, noise
from train.restore.memory import fitting_tile, forward_bytes
from train.restore.tiles import Way, as_floats, restore_bands, restore_batch, restore_image, split_side


@pytest.mark.parametrize("size", [(1, 1), (63, 64), (64, 65), (100, 331), (257, 129)])
@pytest.mark.parametrize("multiple", [1, 16])
def test_tiles_of_an_identity_network_give_the_image_back(size, multiple):
    image, network = noise(3, *size), Known(multiple=multiple)
    torch.testing.assert_close(restore_image(network, image, 64, batch=3), image, rtol=0, atol=1e-6)
    assert all(height <= 64 and width <= 64 for height, width in network.sizes)


def test_a_network_that_sees_near_pixels_gives_what_it_gives_of_the_whole():
    image = noise(3, 200, 300)
    whole = restore_image(Known(box=17), image, None)  # 8 px to each side: a twelfth of 96
    tiled = restore_image(Known(box=17), image, 96)
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-6)
    assert (restore_image(Known(box=25), image, 96) - restore_image(Known(box=25), image, None)).abs().max() > 1e-4


@pytest.mark.parametrize("size", [(57, 703), (850, 40)])
def test_a_strided_network_has_the_same_grid_in_every_tile(size):
    """MIMO-UNet has strides of 2 and 4 and no means over the image; its weights are random."""
    torch.manual_seed(0)
    network = Deblurrer(build_backbone("mimounet", num_res=1)).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    image = noise(3, *size)
    seen = torch.zeros(1, 3, 256, 256, requires_grad=True)
    network(seen).restored[-1][0, :, 128, 128].sum().backward()
    radius = (seen.grad[0].abs().sum(0).nonzero() - 128).abs().max().item()
    tile = 560
    side = split_side(max(size), tile, network.multiple)
    shared = min(a + side.length - b for a, b in pairwise(side.starts))
    assert 0 < radius <= shared // 3
    whole, tiled = restore_image(network, image, None), restore_image(network, image, tile, batch=2)
    assert (whole - image).abs().max() > 0.05  # it does something
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("size", "tile"), [(65, 64), (96, 64), (1000, 64), (513, 192), (200, 128), (127, 64)])
@pytest.mark.parametrize("multiple", [1, 16])
def test_windows_sum_to_1_and_neighbours_share_a_quarter(size, tile, multiple):
    side = split_side(size, tile, multiple)
    assert side.starts[0] == 0
    assert all(start % multiple == 0 for start in side.starts)
    assert 0 <= side.starts[-1] + side.length - size < multiple
    assert all(a + side.length - b >= tile // 4 - multiple for a, b in pairwise(side.starts))
    total = torch.zeros(size)
    for start, window in zip(side.starts, side.windows, strict=True):
        assert window.min() >= 0
        total[start : start + side.length] += window
    torch.testing.assert_close(total, torch.ones(size))


def test_values_are_clamped_and_strength_blends():
    assert restore_image(Known(shift=2.0), noise(3, 8, 8), None).max() == 1.0
    image = noise(3, 100, 90) * 0.5
    half = restore_image(Known(shift=0.25), image, 64, way=Way(strength=0.5))
    torch.testing.assert_close(half, image + 0.125, rtol=0, atol=1e-6)
    assert torch.equal(restore_image(Known(shift=0.25), image, 64, way=Way(strength=0.0)), image)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_integers_stay_integers(dtype):
    image = (noise(3, 70, 90) * (255 if dtype == torch.uint8 else 65535)).to(dtype)
    result = restore_image(Known(), image, 64)
    assert result.dtype == dtype
    assert torch.equal(as_floats(result), as_floats(image))


def test_an_ensemble_is_the_mean_over_flips_and_turns():
    class Leaning(Known):
        """Moves the image by a pixel: the mean over the eight is symmetric."""

        def forward(self, image):
            return super().forward(image.roll(1, -1))

    image = noise(1, 3, 12, 20)
    result = restore_batch(Leaning(), image, Way(ensemble=True))
    moved = [image.roll(by, axis) for axis in (-1, -2) for by in (1, -1)]
    torch.testing.assert_close(result, sum(moved) / 4, rtol=0, atol=1e-6)


def test_bands_hold_a_tiles_height_and_tell_of_all_tiles():
    image, told, bands = noise(3, 500, 150), [], []
    for top, rows in restore_bands(Known(), image, 64, lambda done, every: told.append((done, every)), batch=2):
        assert rows.shape[1] <= 64
        torch.testing.assert_close(rows, image[:, top : top + rows.shape[1]], rtol=0, atol=1e-6)
        bands.append(rows.shape[1])
    assert sum(bands) == 500
    assert told[-1] == (len(bands) * 3, len(bands) * 3)


def test_tiles_get_smaller_where_the_gpu_is_full():
    class Full(Known):
        """Has room for 2 tiles of 64 px."""

        def forward(self, image):
            if image.numel() > 2 * 3 * 64 * 64:
                raise torch.cuda.OutOfMemoryError("full")
            return super().forward(image)

    image, network = noise(3, 300, 300), Full()
    torch.testing.assert_close(restore_image(network, image, 128, batch=4), image, rtol=0, atol=1e-6)
    assert max(network.sizes) == (64, 64)
    with pytest.raises(ValueError, match="--device cpu"):
        restore_image(_NoRoom(), noise(3, 90, 90), None)


class _NoRoom(Known):
    def forward(self, image):
        raise torch.cuda.OutOfMemoryError("full")


def test_memory_is_counted_without_computing_and_tiles_are_made_to_fit(monkeypatch):
    network = Deblurrer(build_backbone("unet", width=8, blocks=[1, 1])).eval()
    small, large = forward_bytes(network, 128), forward_bytes(network, 256)
    assert 3.5 < large / small < 4.5
    # At patch 2 and width 8 one feature of the first level holds 2/3 of the floats of the image that made it.
    assert 3 < large / (3 * 256 * 256 * 4) < 12
    monkeypatch.setattr("train.restore.memory.free_bytes", lambda device: int(1.2 * small))
    assert fitting_tile(network, 512) == (128, 1)
    monkeypatch.setattr("train.restore.memory.free_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match=r"tiles of 64 px need .* MiB"):
        fitting_tile(network, 512)
