"""FFTformer: attention and feed-forward by products in the frequency domain of 8×8 patches.

Kong et al., "Efficient Frequency Domain-based Transformers for High-Quality Image Deblurring", CVPR 2023,
arXiv 2211.12250.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from model.backbones.layers import OverlapPatchEmbed, body_norm, depthwise
from model.backbones.points import Embed, identity

PATCH = 8  # side of the patches whose spectra are multiplied, px of the feature
FUSE_EXPANSION = 2.66  # of the feed-forward inside `Fuse`, whatever the network's own is


def spectra(x: Tensor) -> Tensor:
    """[B, C, h, w] → complex64 [B, C, h/8, w/8, 8, 5], the spectrum of every patch, in one batched transform."""
    patches = rearrange(x.float(), "b c (h p1) (w p2) -> b c h w p1 p2", p1=PATCH, p2=PATCH)
    return torch.fft.rfft2(patches)


def from_spectra(spectrum: Tensor) -> Tensor:
    """The inverse of `spectra`: fp32 [B, C, h, w]."""
    patches = torch.fft.irfft2(spectrum, s=(PATCH, PATCH))
    return rearrange(patches, "b c h w p1 p2 -> b c (h p1) (w p2)")


class FSAS(nn.Module):
    """Frequency domain-based self-attention solver, [B, C, h, w] → the same.

    The correlation of queries and keys inside each patch is the product of their spectra; normalised, it weighs v.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.to_hidden = nn.Conv2d(dim, 6 * dim, 1, bias=False)
        self.to_hidden_dw = depthwise(6 * dim, bias=False)
        self.project_out = nn.Conv2d(2 * dim, dim, 1, bias=False)
        self.norm = body_norm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.to_hidden_dw(self.to_hidden(x))
        qk, v = hidden.split([4 * x.shape[1], 2 * x.shape[1]], dim=1)
        q, k = spectra(qk).chunk(2, dim=1)
        return self.project_out(v * self.norm(from_spectra(q * k).to(v.dtype)))


class DFFN(nn.Module):
    """Discriminative frequency domain-based feed-forward, [B, C, h, w] → the same.

    `fft` [2·hidden, 1, 1, 8, 5] weighs every frequency of every hidden channel; then a gated depthwise feed-forward.
    """

    def __init__(self, dim: int, expansion: float) -> None:
        super().__init__()
        hidden = int(dim * expansion)
        self.fft = nn.Parameter(torch.ones(2 * hidden, 1, 1, PATCH, PATCH // 2 + 1))
        self.project_in = nn.Conv2d(dim, 2 * hidden, 1, bias=False)
        self.dwconv = depthwise(2 * hidden, bias=False)
        self.project_out = nn.Conv2d(hidden, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.project_in(x)
        hidden = from_spectra(spectra(hidden) * self.fft).to(hidden.dtype)
        gate, value = self.dwconv(hidden).chunk(2, dim=1)
        return self.project_out(F.gelu(gate) * value)


class FeedForwardBlock(nn.Module):
    """[B, C, h, w] → the same: the frequency-domain feed-forward on the normalised feature, added to it."""

    def __init__(self, dim: int, expansion: float) -> None:
        super().__init__()
        self.norm2 = body_norm(dim)
        self.ffn = DFFN(dim, expansion)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(self.norm2(x))


class TransformerBlock(FeedForwardBlock):
    """[B, C, h, w] → the same: attention before the feed-forward. The paper uses it in the decoder alone."""

    def __init__(self, dim: int, expansion: float) -> None:
        super().__init__(dim, expansion)
        self.norm1 = body_norm(dim)
        self.attn = FSAS(dim)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.attn(self.norm1(x)))


class Fuse(nn.Module):
    """Decoder and encoder features, both [B, C, h, w] → one: the halves of a joint feed-forward, summed."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.att_channel = FeedForwardBlock(2 * dim, FUSE_EXPANSION)
        self.conv = nn.Conv2d(2 * dim, 2 * dim, 1)
        self.conv2 = nn.Conv2d(2 * dim, 2 * dim, 1)

    def forward(self, decoded: Tensor, encoded: Tensor) -> Tensor:
        joint = self.conv2(self.att_channel(self.conv(torch.cat([decoded, encoded], dim=1))))
        first, second = joint.chunk(2, dim=1)
        return first + second


class Scale(nn.Module):
    """Bilinear scaling by up / down. The size is told as integers, which an export for any size can reason about."""

    def __init__(self, up: int, down: int) -> None:
        super().__init__()
        self.up, self.down = up, down

    def forward(self, x: Tensor) -> Tensor:
        size = [side * self.up // self.down for side in x.shape[-2:]]
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class Resample(nn.Module):
    """Bilinear scaling by up / down, then a 3×3 convolution to `outputs` channels."""

    def __init__(self, inputs: int, outputs: int, *, up: int = 1, down: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            Scale(up, down),
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class FFTformer(nn.Module):
    """Blurry [B, 3, H, W] → (restored [B, 3, H, W],), sRGB, nominally in [0, 1]; H, W multiples of 32.

    Three levels of stride 1, 2, 4 and dim, 2·dim, 4·dim channels with `num_blocks` blocks each, on the way down and
    again on the way up. The defaults are the paper's. Keys and shapes of the state dict are those of the official
    release, whose `reduce_chan_level2` takes no part in what it computes: it is kept as a buffer, which no optimizer
    moves. Spectra are fp32 whatever the dtype.
    `embed_points` {name: (channels, stride)}: `bottleneck` (before the deepest decoder blocks) and `decoder2`;
    `embed(name, feature)` is called there, before the level's blocks. ValueError for counts that make no network.
    """

    def __init__(
        self,
        dim: int = 48,
        num_blocks: Sequence[int] = (6, 6, 12),
        num_refinement_blocks: int = 4,
        ffn_expansion_factor: float = 3,
    ) -> None:
        super().__init__()
        if dim < 1 or len(num_blocks) != 3 or min(*num_blocks, num_refinement_blocks) < 0 or ffn_expansion_factor <= 0:
            raise ValueError(
                "an FFTformer has three levels: give dim ≥ 1, three num_blocks ≥ 0 and a positive "
                f"ffn_expansion_factor, got dim {dim}, num_blocks {list(num_blocks)}, "
                f"num_refinement_blocks {num_refinement_blocks}, ffn_expansion_factor {ffn_expansion_factor}"
            )

        def stack(block: type[nn.Module], channels: int, count: int) -> nn.Sequential:
            return nn.Sequential(*(block(channels, ffn_expansion_factor) for _ in range(count)))

        self.stride_multiple = 4 * PATCH
        self.embed_points = {"bottleneck": (4 * dim, 4), "decoder2": (2 * dim, 2)}
        self.patch_embed = OverlapPatchEmbed(dim)
        self.encoder_level1 = stack(FeedForwardBlock, dim, num_blocks[0])
        self.down1_2 = Resample(dim, 2 * dim, down=2)
        self.encoder_level2 = stack(FeedForwardBlock, 2 * dim, num_blocks[1])
        self.down2_3 = Resample(2 * dim, 4 * dim, down=2)
        self.encoder_level3 = stack(FeedForwardBlock, 4 * dim, num_blocks[2])
        self.decoder_level3 = stack(TransformerBlock, 4 * dim, num_blocks[2])
        self.up3_2 = Resample(4 * dim, 2 * dim, up=2)
        self.reduce_chan_level2 = nn.Module()  # a convolution's place in the state dict: see above
        self.reduce_chan_level2.register_buffer("weight", torch.zeros(2 * dim, 4 * dim, 1, 1))
        self.decoder_level2 = stack(TransformerBlock, 2 * dim, num_blocks[1])
        self.up2_1 = Resample(2 * dim, dim, up=2)
        self.decoder_level1 = stack(TransformerBlock, dim, num_blocks[0])
        self.refinement = stack(TransformerBlock, dim, num_refinement_blocks)
        self.fuse2 = Fuse(2 * dim)
        self.fuse1 = Fuse(dim)
        self.output = nn.Conv2d(dim, 3, 3, padding=1, bias=False)

    def forward(self, x: Tensor, embed: Embed = identity) -> tuple[Tensor, ...]:
        level1 = self.encoder_level1(self.patch_embed(x))
        level2 = self.encoder_level2(self.down1_2(level1))
        level3 = self.encoder_level3(self.down2_3(level2))
        feature = self.decoder_level3(embed("bottleneck", level3))
        feature = self.fuse2(self.up3_2(feature), level2)
        feature = self.decoder_level2(embed("decoder2", feature))
        feature = self.fuse1(self.up2_1(feature), level1)
        return (self.output(self.refinement(self.decoder_level1(feature))) + x,)
