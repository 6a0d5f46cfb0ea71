"""Plain transformers as teachers: a pyramid of exact sizes from one resolution, aligned with the pixels."""

import pytest
import torch
from safetensors.torch import save_file

from model.encoder import EncoderSpec, build_encoder
from model.teacher import Teacher
from model.tokens import resample_tokens, spread_blocks

NAME = "test_vit"  # timm's smallest: 6 blocks of 64 channels, 16 px a token


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher(NAME, weights="random")


def test_shallow_levels_read_shallow_blocks():
    assert spread_blocks(12, 4) == [2, 5, 8, 11]
    assert spread_blocks(12, 3) == [3, 7, 11]
    assert spread_blocks(6, 4) == [1, 2, 4, 5]
    for depth in range(1, 30):
        for levels in range(1, min(depth, 5) + 1):
            blocks = spread_blocks(depth, levels)
            assert blocks == sorted(set(blocks))
            assert len(blocks) == levels
            assert blocks[-1] == depth - 1


@pytest.mark.parametrize("patch", [7, 14, 16, 32])
@pytest.mark.parametrize("stride", [4, 8, 16, 32])
def test_resampled_cells_lie_where_their_pixels_are(patch, stride):
    """A map whose values are its tokens' centres, in px, becomes one whose values are the cells' centres."""
    tokens, cells = 512 // patch, 512 // stride
    centres = (torch.arange(tokens) + 0.5) * patch
    rows = resample_tokens(centres.view(1, 1, -1, 1).expand(1, 2, tokens, tokens), patch, stride, (cells, cells))
    columns = resample_tokens(centres.view(1, 1, 1, -1).expand(1, 2, tokens, tokens), patch, stride, (cells, cells))
    wanted = (torch.arange(cells) + 0.5) * stride
    inner = slice(int(2 * 32 / stride), cells - int(2 * 32 / stride))
    for got in (rows[0, 1, inner, 0], columns[0, 0, 0, inner]):
        torch.testing.assert_close(got, wanted[inner])


@pytest.mark.parametrize("stride", [4, 8, 16, 32])
def test_resampling_keeps_a_constant_everywhere_and_the_dtype(stride):
    tokens = torch.full((1, 3, 5, 2), 0.25, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out = resample_tokens(tokens, 16, stride, (-(-75 // stride), -(-20 // stride)))
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, torch.full_like(out, 0.25))


def test_a_coarser_grid_averages_instead_of_picking():
    tokens = torch.zeros(1, 1, 8, 8)
    tokens[..., ::2] = 1.0
    out = resample_tokens(tokens, 16, 32, (4, 4))
    assert out[..., 1:-1, 1:-1].sub(0.5).abs().max() < 0.13


@pytest.mark.parametrize("size", [(64, 96), (65, 33), (1, 1), (7, 130), (200, 17)])
def test_every_size_gives_the_pyramid(teacher, size):
    features = teacher(torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)))
    assert teacher.strides == (4, 8, 16, 32)
    assert teacher.channels == (64, 64, 64, 64)
    assert [tuple(f.shape) for f in features] == [(2, 64, -(-size[0] // s), -(-size[1] // s)) for s in (4, 8, 16, 32)]
    assert all(torch.isfinite(f).all() for f in features)


def test_a_patch_that_is_no_power_of_two():
    encoder = build_encoder(EncoderSpec("convmixer_768_32", weights="random", levels=3), prune=True).eval()
    assert encoder.patch == 7
    with torch.no_grad():
        assert [tuple(f.shape[-2:]) for f in encoder(torch.rand(1, 3, 37, 20))] == [(10, 5), (5, 3), (3, 2)]


def test_the_level_of_the_patch_is_the_block_itself_and_levels_differ(teacher):
    x = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    features, net = teacher(x), teacher.encoder.net
    blocks = net.forward_intermediates(teacher.encoder.preprocess(x), intermediates_only=True, output_fmt="NCHW")
    assert torch.equal(features[2], blocks[4])
    for level, block in ((0, 1), (1, 2), (3, 5)):
        expected = resample_tokens(blocks[block], 16, 4 * 2**level, tuple(features[level].shape[-2:]))
        torch.testing.assert_close(features[level], expected)


def test_weights_of_a_transformer_from_a_file_at_another_image_size(teacher, tmp_path):
    state = {k: v + 0.5 if v.is_floating_point() else v for k, v in teacher.encoder.net.state_dict().items()}
    save_file(state, tmp_path / "vit.safetensors")
    loaded = Teacher(NAME, weights=str(tmp_path / "vit.safetensors"))
    assert torch.equal(loaded.encoder.net.pos_embed, state["pos_embed"])
    assert loaded.fingerprint() != teacher.fingerprint()
    assert loaded(torch.rand(1, 3, 48, 80))[0].shape == (1, 64, 12, 20)


def test_the_classes_of_a_transformer_are_no_level_s(teacher):
    with pytest.raises(ValueError, match=r"loss\.logits\) to 0") as caught:
        teacher.check_classifier()
    assert "\n" not in str(caught.value)
    assert teacher.classify(torch.rand(1, 3, 64, 64)).sum().item() == pytest.approx(1, abs=1e-4)


def test_more_levels_than_blocks_and_images_of_one_size_are_refused():
    with pytest.raises(ValueError, match="has 6 blocks, fewer than 7 levels: set fewer levels"):
        Teacher(NAME, weights="random", levels=7)
    with pytest.raises(ValueError, match="name a network that takes any size"):
        Teacher("test_vit_relpos", weights="random")


def test_as_a_student_every_parameter_learns_and_frozen_levels_stay():
    student = build_encoder(EncoderSpec(NAME, weights="random"), prune=True)
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    sum(f.square().mean() for f in student(x)).backward()
    assert [n for n, p in student.named_parameters() if p.grad is None] == []
    frozen = build_encoder(EncoderSpec(NAME, weights="random"), prune=True, frozen_levels=2)
    assert [f.requires_grad for f in frozen(x)] == [False, False, True, True]
