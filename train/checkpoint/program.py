"""A model as a program that needs nothing of ours: `torch.export` or ONNX, for pictures of any size."""

from __future__ import annotations

import copy
import io
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from torch import Tensor, nn

from data.files import write_atomically
from kernels.routes import composed
from model.deblurrer import Deblurrer
from train.checkpoint.saved import load_model
from train.config.patches import largest_crop

SUFFIXES = {"torch": ".pt2", "onnx": ".onnx"}
OPSET = 18
MOST_PIXELS = 1 << 16  # of a side
INPUT, OUTPUT = "blurry", "restored"


class Program(nn.Module):
    """blurry [1, 3, H, W] float32 in [0, 1], sRGB, sides of more than `multiple` px → restored, clamped, same shape.

    The same as the deblurrer, padding included (`model.padding`), which is written so that every size is one program:
    how many multiples a side has is a number the exporter knows nothing of, else it would reason about it for minutes.
    """

    def __init__(self, network: Deblurrer) -> None:
        super().__init__()
        self.network, self.multiple = _with_fixed_padding(network), network.multiple

    def forward(self, blurry: Tensor) -> Tensor:
        height, width = blurry.shape[-2:]
        padded = blurry.index_select(2, self._mirrored(height)).index_select(3, self._mirrored(width))
        return self.network(padded).restored[-1][..., :height, :width].clamp(0, 1)

    def _mirrored(self, size: int) -> Tensor:
        """Indices of a side, mirrored at its end up to the next multiple, the edge not repeated."""
        count = ((torch.ones(size, dtype=torch.int64).sum() + self.multiple - 1) // self.multiple).item()
        torch._check(count >= 2)  # of sides of 1 networks ask for their layout, which nobody knows here
        torch._check(count <= MOST_PIXELS // self.multiple)
        places = torch.arange(count * self.multiple)
        return torch.where(places < size, places, 2 * (size - 1) - places)


class _FixedSame(nn.Module):
    """timm's convolution with TensorFlow's padding, on sides that its stride divides: then the padding is constant."""

    def __init__(self, convolution: Conv2dSame) -> None:
        super().__init__()
        self.convolution = convolution
        sizes = zip(convolution.kernel_size, convolution.dilation, convolution.stride, strict=True)
        down, right = (max((kernel - 1) * dilation + 1 - stride, 0) for kernel, dilation, stride in sizes)
        self.padding = (right // 2, right - right // 2, down // 2, down - down // 2)

    def forward(self, x: Tensor) -> Tensor:
        c = self.convolution
        return F.conv2d(F.pad(x, self.padding), c.weight, c.bias, c.stride, 0, c.dilation, c.groups)


def _with_fixed_padding(network: Deblurrer) -> Deblurrer:
    """A copy whose student pads by constants: all its sides are multiples here."""
    twin = copy.deepcopy(network).cpu().eval().requires_grad_(False)
    for name, module in list(twin.named_modules()):
        if type(module) is Conv2dSame:
            parent, _, last = name.rpartition(".")
            setattr(twin.get_submodule(parent), last, _FixedSame(module))
    return twin


def export_program(run: Path, out: Path, kind: str, *, which: str = "latest", overwrite: bool = False) -> Path:
    """Write the model of a run, checkpoint or export as `kind` ("torch": torch.export's .pt2; "onnx") and return the
    folder or file it was read from. ValueError for a wrong suffix, a file that exists, or a network that cannot be
    written so."""
    out = out.expanduser()
    if out.suffix.lower() != SUFFIXES[kind]:
        raise ValueError(f"{out}: give a file whose name ends in {SUFFIXES[kind]}")
    if out.exists() and not overwrite:
        raise ValueError(f"{out}: exists: choose another place, or --overwrite")
    network, config, source = load_model(run, torch.device("cpu"), which)
    exported = traced(network)
    facts = {
        "multiple": str(network.multiple),
        "crop": str(largest_crop(config)),
        "model": json.dumps(config.model.model_dump(mode="json")),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    if kind == "torch":
        file = io.BytesIO()
        torch.export.save(exported, file, extra_files={f"sharpprior_{key}.txt": text for key, text in facts.items()})
        write_atomically(out, file.getvalue())
    else:
        write_atomically(out, _onnx(exported, facts))
    return source


def traced(network: Deblurrer) -> torch.export.ExportedProgram:
    """The network's program, of one picture of any size from `multiple` px a side on."""
    program = Program(network)
    side = 4 * program.multiple
    image = torch.rand(1, 3, side, side + 2 * program.multiple + 5)
    sizes = {
        axis: torch.export.Dim(name, min=program.multiple + 1, max=MOST_PIXELS)
        for axis, name in ((2, "height"), (3, "width"))
    }
    try:
        with torch.no_grad(), composed(), _quiet():
            return torch.export.export(program, (image,), dynamic_shapes={INPUT: sizes}, strict=False)
    except Exception as error:  # of many types, pages long
        raise ValueError(
            f"the network cannot be exported for any size ({type(error).__name__}: {str(error).splitlines()[0][:200]})"
        ) from error


def _onnx(exported: torch.export.ExportedProgram, facts: dict[str, str]) -> bytes:
    try:
        import onnx  # noqa: F401 - torch's exporter needs both
        import onnxscript  # noqa: F401
    except ImportError:
        raise ValueError("ONNX needs two packages more: pip install 'sharpprior[onnx]'") from None
    with _quiet():
        program = torch.onnx.export(
            exported,
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            optimize=False,
            verbose=False,
        )
    model = program.model_proto
    for key, text in facts.items():
        model.metadata_props.add(key=f"sharpprior_{key}", value=text)
    return model.SerializeToString()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' remarks on their own insides."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export", "torch._export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
