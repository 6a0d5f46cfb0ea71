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
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from torch import Tensor, nn

from data.files import write_atomically
from kernels.routes import composed
from model.deblurrer import Deblurrer
from train.checkpoint.saved import load_model, refuse_oracle
from train.config.patches import largest_crop

SUFFIXES = {"torch": ".pt2", "onnx": ".onnx"}
OPSET = 18
MOST_PIXELS = 1 << 16  # of a side
INPUT, OUTPUT = "blurry", "restored"


class Core(nn.Module):
    """padded [1, 3, H, W] float32 in [0, 1], sRGB, sides multiples of `multiple` → restored, clamped, same shape."""

    def __init__(self, network: Deblurrer) -> None:
        super().__init__()
        self.network, self.multiple = _with_fixed_padding(network), network.multiple

    def forward(self, padded: Tensor) -> Tensor:
        return self.network(padded).restored[-1].clamp(0, 1)


class Program(Core):
    """blurry [1, 3, H, W] float32 in [0, 1], sRGB, sides of more than `multiple` px → restored, clamped, same shape.

    The same as the deblurrer, padding included (`model.padding`), which is written so that every size is one program:
    how many multiples a side has is a number the exporter knows nothing of, else it would reason about it for minutes.
    """

    def forward(self, blurry: Tensor) -> Tensor:
        height, width = blurry.shape[-2:]
        padded = blurry.index_select(2, self._mirrored(height)).index_select(3, self._mirrored(width))
        return super().forward(padded)[..., :height, :width]

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
    refuse_oracle(config.model.oracle, source, f"--format {kind} makes no program of it")
    facts = {
        "multiple": str(network.multiple),
        "crop": str(largest_crop(config)),
        "model": json.dumps(config.model.model_dump(mode="json")),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    if kind == "torch":
        file = io.BytesIO()
        extra = {f"sharpprior_{key}.txt": text for key, text in facts.items()}
        torch.export.save(traced(Program(network)), file, extra_files=extra)
        write_atomically(out, file.getvalue())
    else:
        write_atomically(out, onnx_program(network, facts))
    return source


def traced(program: Core) -> torch.export.ExportedProgram:
    """The exported program, of one picture of any size that it takes. ValueError where the network cannot be."""
    multiple, core = program.multiple, type(program) is Core
    image = torch.rand(1, 3, 4 * multiple, 6 * multiple + (0 if core else 5))
    if core:
        most = MOST_PIXELS // multiple
        height, width = (multiple * torch.export.Dim(name, min=2, max=most) for name in ("rows", "columns"))
    else:
        height, width = (torch.export.Dim(name, min=multiple + 1, max=MOST_PIXELS) for name in ("height", "width"))
    name = "padded" if core else INPUT
    try:
        with torch.no_grad(), composed(), _quiet():
            return torch.export.export(program, (image,), dynamic_shapes={name: {2: height, 3: width}}, strict=False)
    except Exception as error:  # of many types, pages long
        raise ValueError(f"the network cannot be exported for any size ({_reason(error)})") from error


def _reason(error: BaseException) -> str:
    """The root of an exporter's error, in one line: its type and the first words that it says."""
    while error.__cause__ is not None:
        error = error.__cause__
    words = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}{': ' + words[:200] if words else ''}"


def onnx_program(network: Deblurrer, facts: dict[str, str]) -> bytes:
    """The bytes of an ONNX model that takes what `Program` takes; `facts` become its metadata. ValueError without the
    packages, or where ONNX lacks what the network computes."""
    try:
        import onnx
        import onnxscript  # noqa: F401 - torch's exporter needs it
    except ImportError:
        raise ValueError("ONNX needs three packages more: pip install 'sharpprior[onnx]'") from None
    exported = traced(Core(network))
    try:
        with _quiet():
            # Its optimizer takes minutes over sizes that are not known; ONNX Runtime does the same when it loads.
            program = torch.onnx.export(
                exported, dynamo=True, opset_version=OPSET, input_names=["padded"], output_names=["whole"],
                optimize=False, verbose=False,
            )  # fmt: skip
    except Exception as error:  # of many types, pages long
        raise ValueError(f"the network cannot be written as ONNX ({_reason(error)}): --format torch may do") from error
    model = program.model_proto
    _pad_and_crop(model.graph, network.multiple)
    for key, text in facts.items():
        model.metadata_props.add(key=f"sharpprior_{key}", value=text)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _pad_and_crop(graph: Any, multiple: int) -> None:
    """Put the padding to multiples before a graph padded → whole, and the crop behind it: written by hand, because the
    exporter would have to reason about rounded sizes."""
    from onnx import TensorProto, helper

    values = {
        "sp_multiple": [multiple],
        "sp_less": [multiple - 1],
        "sp_none": [0] * 6,
        "sp_zeros": [0, 0],
        "sp_axes": [2, 3],
    }
    for name, numbers in values.items():
        graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [len(numbers)], numbers))
    before = [
        helper.make_node("Shape", [INPUT], ["sp_size"], start=2, end=4),
        helper.make_node("Add", ["sp_size", "sp_less"], ["sp_more"]),
        helper.make_node("Div", ["sp_more", "sp_multiple"], ["sp_count"]),
        helper.make_node("Mul", ["sp_count", "sp_multiple"], ["sp_whole"]),
        helper.make_node("Sub", ["sp_whole", "sp_size"], ["sp_end"]),
        helper.make_node("Concat", ["sp_none", "sp_end"], ["sp_pads"], axis=0),
        helper.make_node("Pad", [INPUT, "sp_pads"], ["padded"], mode="reflect"),
    ]
    after = helper.make_node("Slice", ["whole", "sp_zeros", "sp_size", "sp_axes"], [OUTPUT])
    nodes = [*before, *graph.node, after]
    del graph.node[:], graph.input[:], graph.output[:]
    graph.node.extend(nodes)
    shape = [1, 3, "height", "width"]
    graph.input.append(helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, shape))
    graph.output.append(helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, shape))


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
