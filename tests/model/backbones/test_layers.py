"""What the published networks share: one layer norm over channels, right in both layouts and sparing with memory."""

import pytest
import torch
import torch.nn.functional as F

from model.backbones.layers import LayerNorm2d

layouts = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])


def norm_and_input(layout: torch.memory_format, dtype: torch.dtype) -> tuple[LayerNorm2d, torch.Tensor]:
    torch.manual_seed(0)
    norm = LayerNorm2d(6).to(dtype)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = 3 + 2 * torch.randn(2, 6, 4, 5)
    return norm, x.to(dtype, memory_format=layout).requires_grad_()


@layouts
def test_it_normalises_the_channels_of_every_pixel_and_so_do_its_gradients(layout):
    norm, x = norm_and_input(layout, torch.float64)
    out = norm(x)
    assert out.is_contiguous(memory_format=layout)
    scaled = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + 1e-6).sqrt()
    expected = scaled * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    inputs = (x, norm.weight, norm.bias)
    ours = torch.autograd.grad(out, inputs, grad)
    for one, other in zip(ours, torch.autograd.grad(expected, inputs, grad), strict=True):
        torch.testing.assert_close(one, other)


@layouts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_are_fp32_in_short_types_and_the_dtype_is_kept(layout, dtype):
    norm, x = norm_and_input(layout, dtype)
    out = norm(x)
    wide = F.layer_norm(x.float().movedim(1, -1), (6,), norm.weight.float(), norm.bias.float(), 1e-6).movedim(-1, 1)
    assert out.dtype == dtype
    torch.testing.assert_close(out, wide.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    out.sum().backward()
    assert [x.grad.dtype, norm.weight.grad.dtype, norm.bias.grad.dtype] == [dtype] * 3


@layouts
def test_the_backward_pass_keeps_one_map_and_two_numbers_a_pixel(layout):
    norm, x = norm_and_input(layout, torch.float32)
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        norm(x)
    pixels = x.numel() // 6
    assert sum(kept.values()) <= x.numel() + 2 * pixels + 2 * 6
