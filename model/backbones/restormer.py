"""Restormer: a UNet of transformer blocks that attend across channels (Zamir et al., CVPR 2022, arXiv 2111.09881)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from model.backbones.layers import OverlapPatchEmbed, body_norm, channels_last, depthwise
from model.backbones.points import Embed, identity


class Attention(nn.Module):
    """Multi-Dconv head transposed attention, [B, C, h, w] → the same: channels attend to channels, over all pixels.

    A = softmax(temperature · q̄ k̄ᵀ) is [C/heads, C/heads] a head, q̄ and k̄ with rows of unit length over the pixels.

    Neither q̄, k̄ nor A v is ever written: q kᵀ is divided by the lengths of the rows, and the output projection is
    multiplied with A, which is small, before it meets v. One CPU core, [2, 48, 128, 128], forward + backward: 146 ms
    against 175 written out (channels last 118 against 182), 7 saved maps of x's size against 10. PyTorch's
    scaled_dot_product_attention gains nothing here (164 ms, 11 maps): its "tokens" are 48 channels, each of N features.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, bias=False)
        self.qkv_dwconv = depthwise(3 * dim, bias=False)
        self.project_out = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv_dwconv(self.qkv(x)).chunk(3, dim=1)
        attention = self._attention(q, k).to(v.dtype)
        # Blocks on the diagonal as an image [B, C, C, 1]: the projection is a module, which ZeRO gathers when called.
        heads = torch.eye(self.heads, dtype=v.dtype, device=v.device)
        blocks = torch.einsum("bhij,hg->bhigj", attention, heads)
        mix = self.project_out(rearrange(blocks, "b h i g j -> b (h i) (g j) 1")).squeeze(3)
        v = rearrange(v, "b c h w -> b c (h w)")
        out = (v.mT @ mix.mT).mT if channels_last(x) else mix @ v  # in the layout of x
        return rearrange(out, "b c (h w) -> b c h w", h=x.shape[2])

    def _attention(self, q: Tensor, k: Tensor) -> Tensor:
        q, k = (rearrange(t, "b (head c) h w -> b head c (h w)", head=self.heads) for t in (q, k))
        if q.dtype == torch.float16:  # products summed over all pixels would overflow
            q, k = q.float(), k.float()
        return (q @ k.mT / lengths(q) / lengths(k).mT * self.temperature).softmax(dim=-1)


def lengths(rows: Tensor) -> Tensor:
    """Euclidean lengths of [..., N] → [..., 1], fp32 or wider, no less than 1e-12."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=dtype).clamp_min(1e-12)


class FeedForward(nn.Module):
    """Gated-Dconv feed-forward, [B, C, h, w] → the same: GELU of one half of the hidden channels times the other."""

    def __init__(self, dim: int, expansion: float) -> None:
        super().__init__()
        hidden = int(dim * expansion)
        self.project_in = nn.Conv2d(dim, 2 * hidden, 1, bias=False)
        self.dwconv = depthwise(2 * hidden, bias=False)
        self.project_out = nn.Conv2d(hidden, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.dwconv(self.project_in(x)).chunk(2, dim=1)
        return self.project_out(F.gelu(gate) * value)


class TransformerBlock(nn.Module):
    """[B, C, h, w] → the same: attention, then feed-forward, each on the normalised feature and added to it."""

    def __init__(self, dim: int, heads: int, expansion: float) -> None:
        super().__init__()
        self.norm1 = body_norm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = body_norm(dim)
        self.ffn = FeedForward(dim, expansion)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class Resample(nn.Module):
    """Halve the resolution and double the channels, or the reverse: a 3×3 convolution and a pixel-(un)shuffle."""

    def __init__(self, dim: int, *, up: bool) -> None:
        super().__init__()
        conv = nn.Conv2d(dim, 2 * dim if up else dim // 2, 3, padding=1, bias=False)
        self.body = nn.Sequential(conv, nn.PixelShuffle(2) if up else nn.PixelUnshuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Restormer(nn.Module):
    """Blurry [B, 3, H, W] → (restored [B, 3, H, W],), sRGB, nominally in [0, 1]; H, W multiples of 8.

    Four levels of stride 1, 2, 4, 8 and dim, 2·dim, 4·dim, 8·dim channels with `num_blocks` blocks and `heads` heads
    each (the first three on the way down and again on the way up; the first decoder level, and the refinement after
    it, have 2·dim channels). The defaults are the paper's. Keys and shapes of the state dict are those of the official
    motion-deblurring release: no convolution has a bias, layer norms have one.
    `embed_points` {name: (channels, stride)}: `bottleneck`, `decoder3`, `decoder2`; `embed(name, feature)` is called
    there, before the level's blocks. ValueError for counts that make no network.
    """

    def __init__(
        self,
        dim: int = 48,
        num_blocks: Sequence[int] = (4, 6, 6, 8),
        num_refinement_blocks: int = 4,
        heads: Sequence[int] = (1, 2, 4, 8),
        ffn_expansion_factor: float = 2.66,
    ) -> None:
        super().__init__()
        if len(num_blocks) != 4 or len(heads) != 4 or min(*num_blocks, num_refinement_blocks) < 0 or min(heads) < 1:
            raise ValueError(
                "a Restormer has four levels: give four num_blocks ≥ 0 and four heads ≥ 1, got num_blocks "
                f"{list(num_blocks)}, num_refinement_blocks {num_refinement_blocks}, heads {list(heads)}"
            )
        if dim < 2 or dim % 2 or any(dim * 2**level % h for level, h in enumerate(heads)):
            raise ValueError(
                f"dim must be even, and heads divide the levels' channels dim·(1, 2, 4, 8), got dim {dim}, "
                f"heads {list(heads)}"
            )

        def stack(level: int, channels: int, count: int) -> nn.Sequential:
            return nn.Sequential(
                *(TransformerBlock(channels, heads[level], ffn_expansion_factor) for _ in range(count))
            )

        self.stride_multiple = 8
        self.embed_points = {"bottleneck": (8 * dim, 8), "decoder3": (4 * dim, 4), "decoder2": (2 * dim, 2)}
        self.patch_embed = OverlapPatchEmbed(dim)
        self.encoder_level1 = stack(0, dim, num_blocks[0])
        self.down1_2 = Resample(dim, up=False)
        self.encoder_level2 = stack(1, 2 * dim, num_blocks[1])
        self.down2_3 = Resample(2 * dim, up=False)
        self.encoder_level3 = stack(2, 4 * dim, num_blocks[2])
        self.down3_4 = Resample(4 * dim, up=False)
        self.latent = stack(3, 8 * dim, num_blocks[3])
        self.up4_3 = Resample(8 * dim, up=True)
        self.reduce_chan_level3 = nn.Conv2d(8 * dim, 4 * dim, 1, bias=False)
        self.decoder_level3 = stack(2, 4 * dim, num_blocks[2])
        self.up3_2 = Resample(4 * dim, up=True)
        self.reduce_chan_level2 = nn.Conv2d(4 * dim, 2 * dim, 1, bias=False)
        self.decoder_level2 = stack(1, 2 * dim, num_blocks[1])
        self.up2_1 = Resample(2 * dim, up=True)
        self.decoder_level1 = stack(0, 2 * dim, num_blocks[0])
        self.refinement = stack(0, 2 * dim, num_refinement_blocks)
        self.output = nn.Conv2d(2 * dim, 3, 3, padding=1, bias=False)

    def forward(self, x: Tensor, embed: Embed = identity) -> tuple[Tensor, ...]:
        level1 = self.encoder_level1(self.patch_embed(x))
        level2 = self.encoder_level2(self.down1_2(level1))
        level3 = self.encoder_level3(self.down2_3(level2))
        feature = self.latent(embed("bottleneck", self.down3_4(level3)))
        feature = self.reduce_chan_level3(torch.cat([self.up4_3(feature), level3], dim=1))
        feature = self.decoder_level3(embed("decoder3", feature))
        feature = self.reduce_chan_level2(torch.cat([self.up3_2(feature), level2], dim=1))
        feature = self.decoder_level2(embed("decoder2", feature))
        feature = self.decoder_level1(torch.cat([self.up2_1(feature), level1], dim=1))
        return (self.output(self.refinement(feature)) + x,)
