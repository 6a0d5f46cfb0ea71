"""What was found right and wrong on this kind of machine, kept in the user's cache folder, one file a kind.

The kind is the GPU, its driver, Triton, torch, the source of this package and what the environment tells compilers: a
change of any is another file, and everything is checked anew. A file is replaced whole; two processes that write at
once may lose a finding, which is then made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from kernels.routes import ROUTES, Case, case_from_json, case_to_json

Results = dict[Case, dict[str, dict[str, Any]]]
"""Case → route → what `kernels.judge` said."""
# Other code or other arithmetic of the same source.
SETTINGS = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH", "TRITON_DEFAULT_FP_FUSION", "NVIDIA_TF32_OVERRIDE")


def machine(device: torch.device, preload: str | None = None) -> dict[str, str]:
    """The kind of machine and software that a finding belongs to. preload: what tests break kernels with."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    kind = {"gpu": gpu, "driver": _driver(device), "triton": triton, "torch": torch.__version__, "source": _source()}
    kind["environment"] = " ".join(f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ)
    return kind | ({"preload": preload} if preload else {})


def _driver(device: torch.device) -> str:
    """Version of the GPU's driver as its kernel module tells it, else what CUDA makes of it."""
    if device.type != "cuda":
        return "none"
    for place in ("/sys/module/nvidia/version", "/sys/module/amdgpu/version"):
        try:
            return Path(place).read_text().strip()
        except OSError:
            continue
    return f"CUDA {torch._C._cuda_getDriverVersion()}" if torch.version.cuda else "unknown"


def _source() -> str:
    """Digest of all Python files of this package."""
    root, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def cache_folder() -> Path:
    """`sharpprior/kernels` below XDG_CACHE_HOME, or below ~/.cache; RuntimeError where nobody knows a home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sharpprior" / "kernels"


class Verdict:
    """The findings for one kind of machine. tell: takes a line about a file that cannot be used."""

    def __init__(self, kind: dict[str, str], tell: Callable[[str], None], *, again: bool = False) -> None:
        self._kind, self._tell, self._writable = kind, tell, True
        name = re.sub(r"[^A-Za-z0-9]+", "-", kind["gpu"]).strip("-")
        file = f"{name}-{hashlib.sha256(json.dumps(kind).encode()).hexdigest()[:16]}.json"
        try:
            self.path = cache_folder() / file
        except RuntimeError as error:
            self.path, self._writable = Path(file), False
            tell(f"kernels: there is no folder for findings ({error}): the next run checks again")
        self.results: Results = {} if again or not self._writable else self._read()

    def add(self, case: Case, route: str, result: dict[str, Any]) -> None:
        """Keep a finding, here and in the file."""
        self.results.setdefault(case, {})[route] = result
        if result.get("passing") or not self._writable:
            return
        kept = self._read(quiet=True)
        for each, found in self.results.items():
            lasting = {route: result for route, result in found.items() if not result.get("passing")}
            kept[each] = kept.get(each, {}) | lasting
        findings = [{"case": case_to_json(case), "routes": found} for case, found in kept.items()]
        temporary = self.path.with_name(f"{self.path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps({"machine": self._kind, "findings": findings}, indent=1), encoding="utf-8")
            os.replace(temporary, self.path)
        except OSError as error:
            self._writable = False
            self._tell(f"kernels: {self.path} cannot be written ({error.strerror}): the next run checks again")

    def _read(self, quiet: bool = False) -> Results:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["machine"] != self._kind:
                raise ValueError("it belongs to another machine")
            return {case_from_json(each["case"]): _checked(each["routes"]) for each in content["findings"]}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if not quiet:
                self._tell(f"kernels: {self.path} is not used, and made again: {type(error).__name__}: {error}")
            return {}


def _checked(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    for route, result in found.items():
        if route not in ROUTES or type(result["right"]) is not bool:
            raise ValueError(f"finding of route {route!r}")
        numbers = all(isinstance(result.get(key, 0.0), (int, float)) for key in ("ms", "gpu_ms", "mib"))
        if not (numbers and (result["right"] or isinstance(result["why"], str))):
            raise ValueError(f"finding of route {route!r}")
    return found
