"""A trained model as files that need nothing but this package: `model.safetensors`, which holds its configuration too,
and `config.yaml` beside it for reading; or one .safetensors file of any name.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

WEIGHTS, CONFIG = "model.safetensors", "config.yaml"
SINGLE = ".safetensors"  # the suffix of a model that is one file
SHIPPED = Path(__file__).parent / "shipped" / f"sharpprior{SINGLE}"  # the model that comes with the program
SHIPPED_NAME = "shipped"  # by which it is named where a path would be
CONFIG_KEY = "config"  # of the metadata in the weights' file: the YAML text
CONFIG_TENSOR = "sharpprior.config"  # the same text as a tensor of bytes, for programs that read tensors alone
DIGEST_KEY, _NO_DIGEST = "blake2b", "0" * 32  # of the metadata: the digest of the file
_FLOATS = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_WHOLES = {torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"}
_DTYPES = {**_FLOATS, **_WHOLES, torch.bool: "BOOL"}


class SafetensorsWriter:
    """Writes a .safetensors file tensor by tensor, so that no more than one of them is in memory.

    layout: (name, shape, dtype) of every tensor, in the order in which `write` will get them. The file appears under
    its name when the block ends without an error.
    """

    def __init__(
        self,
        path: Path,
        layout: Sequence[tuple[str, Sequence[int], torch.dtype]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path, self._layout, self._written = Path(path), list(layout), 0
        header: dict[str, Any] = {"__metadata__": {"format": "pt", DIGEST_KEY: _NO_DIGEST, **(metadata or {})}}
        end = 0
        for name, shape, dtype in self._layout:
            start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._header = len(text).to_bytes(8, "little") + text
        self._digest = _hash(self._header)

    def __enter__(self) -> "SafetensorsWriter":
        self._opened = self._open()
        return self._opened.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)

    @contextlib.contextmanager
    def _open(self) -> Iterator["SafetensorsWriter"]:
        with _replacing(self.path) as self._file:
            self._file.write(self._header)
            yield self
            if self._written != len(self._layout):
                raise ValueError(f"{self.path}: {self._written} of {len(self._layout)} tensors were written")
            self._file.seek(self._header.index(_NO_DIGEST.encode()))
            self._file.write(self._digest.hexdigest().encode())

    def write(self, tensor: torch.Tensor) -> None:
        """The next tensor, cast to the dtype that the layout names."""
        name, shape, dtype = self._layout[self._written]
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{name}: shape {tuple(tensor.shape)} instead of {tuple(shape)}")
        flat = tensor.detach().to("cpu", dtype).contiguous().reshape(-1)
        data = memoryview(flat.view(torch.uint8).numpy())
        self._file.write(data)
        self._digest.update(data)
        self._written += 1


def _hash(start: bytes) -> Any:
    return hashlib.blake2b(start, digest_size=16)


def check_digest(file: Path) -> None:
    """ValueError where a file's bytes are not those that were written (files without a digest are let through).

    The digest is of the whole file with zeros in its own place.
    """
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > file.stat().st_size:
            return  # safetensors says it better
        header = length.to_bytes(8, "little") + stream.read(length)
        found = re.search(rb'"%s":"(.{32})"' % DIGEST_KEY.encode(), header)
        if found is None:
            return
        digest = _hash(header[: found.start(1)] + _NO_DIGEST.encode() + header[found.end(1) :])
        while piece := stream.read(1 << 22):
            digest.update(piece)
    if digest.hexdigest().encode() != found[1]:
        raise ValueError(f"{file} is damaged (its digest is not that of its bytes): copy or save the model again")


def config_text(config: Mapping[str, Any]) -> str:
    """The YAML text of a resolved configuration."""
    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)


def config_tensor(config: Mapping[str, Any]) -> torch.Tensor:
    """A resolved configuration as a uint8 tensor: the bytes of its YAML text."""
    return torch.frombuffer(bytearray(config_text(config).encode()), dtype=torch.uint8)


def config_of_tensor(tensor: torch.Tensor) -> dict[str, Any]:
    """The configuration in such a tensor; ValueError for any other."""
    try:
        config = yaml.safe_load(bytes(tensor.cpu().to(torch.uint8).tolist()).decode())
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{CONFIG_TENSOR} is damaged: {str(error).splitlines()[0]}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{CONFIG_TENSOR} is damaged: a mapping of settings is expected")
    return config


def save_pretrained(path: str | Path, state: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """Write a full state dict and its resolved config into a folder, or, where `path` ends in .safetensors, into that
    one file; each file appears whole or not at all.

    The tensors keep their dtype (fp32 or bf16). The config is written last: a folder with a config has its weights.
    Raises ValueError when it cannot be written.
    """
    path = Path(path)
    single = path.suffix == SINGLE
    text = config_text(config)
    layout = [(name, value.shape, value.dtype) for name, value in sorted(state.items(), key=_widest_first)]
    try:
        (path.parent if single else path).mkdir(parents=True, exist_ok=True)
        with SafetensorsWriter(path if single else path / WEIGHTS, layout, {CONFIG_KEY: text}) as file:
            for name, *_ in layout:
                file.write(state[name])
        if not single:
            write_config(path, text)
    except OSError as error:
        raise ValueError(f"cannot write the model to {path}: {error.strerror or error}") from error


def write_config(folder: Path, text: str) -> None:
    """Put config.yaml into a folder, whole or not at all."""
    with _replacing(folder / CONFIG) as file:
        file.write(text.encode())


def _widest_first(item: tuple[str, torch.Tensor]) -> tuple[int, str]:
    """The format wants every tensor aligned to its dtype."""
    return -item[1].dtype.itemsize, item[0]


def _weights_file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == SINGLE else path / WEIGHTS


def load_config(path: str | Path) -> dict[str, Any]:
    """Return the config saved with a folder's or file's model; ValueError if it is absent or no YAML mapping."""
    path = Path(path)
    place = path if path.suffix == SINGLE else path / CONFIG
    try:
        text = _embedded_config(place) if place == path else place.read_text(encoding="utf-8")
        config = yaml.safe_load(text)
    except FileNotFoundError as error:
        raise ValueError(f"no model in {path}: {place.name} is absent (name a folder written by training)") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, SafetensorError) as error:
        raise ValueError(f"{place} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{place} is damaged: a mapping of settings is expected")
    return config


def _embedded_config(file: Path) -> str:
    with safe_open(file, framework="pt") as opened:
        text = (opened.metadata() or {}).get(CONFIG_KEY)
    if text is None:
        raise ValueError(f"{file}: was not written by this program: it says no configuration")
    return text


def load_state(path: str | Path) -> dict[str, torch.Tensor]:
    """Return the saved state dict of a folder or file, on the CPU; ValueError if it is absent or damaged."""
    file = _weights_file(path)
    if not file.is_file():
        raise ValueError(f"no model in {path}: {file.name} is absent (name a folder written by training)")
    check_digest(file)
    try:
        return {name: value for name, value in load_file(file).items() if name != CONFIG_TENSOR}
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({str(error).splitlines()[0]}): save the model again") from error


def tensor_names(path: str | Path) -> list[str]:
    """The names of a folder's or file's tensors, without reading them; ValueError if they cannot be read."""
    file = _weights_file(path)
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error


def load_pretrained(model: nn.Module, path: str | Path) -> None:
    """Load a folder's or file's state dict into `model`, strictly; ValueError names the keys and shapes that do not
    fit."""
    refusal, advice = f"{_weights_file(path)} does not fit this model", ": build it from the config saved with it"
    load_strictly(model, load_state(path), refusal, advice)


def load_strictly(model: nn.Module, state: Mapping[str, torch.Tensor], refusal: str, advice: str = "") -> None:
    """Load `state` into `model`, casting to the model's dtypes.

    Nothing is loaded unless every key and shape fits; the ValueError, between `refusal` and `advice`, names the first
    of what is missing, unexpected, or of another shape, and how many there are.
    """
    wanted = model.state_dict()
    missing = [key for key in wanted if key not in state]
    unexpected = [key for key in state if key not in wanted]
    shapes = [
        f"{key} ({list(state[key].shape)}, not {list(value.shape)})"
        for key, value in wanted.items()
        if key in state and state[key].shape != value.shape
    ]
    problems = [
        f"{what} {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
        for what, keys in (("lacks", missing), ("has the unexpected", unexpected), ("has another shape for", shapes))
        if keys
    ]
    if problems:
        raise ValueError(f"{refusal}: it {'; '.join(problems)}{advice}")
    model.load_state_dict(dict(state), strict=True)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file under a temporary name beside `path`, which takes its name, and is on the disk, when the block ends."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
