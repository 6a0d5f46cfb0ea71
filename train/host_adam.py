"""AdamW on the host, for `engine.offload: cpu`: DeepSpeed's, which is compiled once on a machine."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


def host_adam(groups: list[dict[str, Any]], **settings: Any) -> Any:
    """DeepSpeed's AdamW on the CPU. Compiled at the first use on a machine (a minute), then found in the system's
    temporary folder, or where TORCH_EXTENSIONS_DIR says. ValueError where that does not work."""
    import deepspeed
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    try:
        with _extensions(f"{deepspeed.__version__} {torch.__version__} {platform.python_version()}"):
            return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    except Exception as error:  # compilers fail in many ways
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"engine.offload cpu: DeepSpeed's CPU Adam does not compile here ({reason}): install a C++ compiler and "
            "ninja, or set engine.offload to none"
        ) from error


@contextlib.contextmanager
def _extensions(versions: str) -> Iterator[None]:
    """torch's folder of compiled extensions for the block: one a machine, user and set of versions.

    On the machine's own disk, for what is compiled fits its CPU. One process builds or loads at a time, under a lock
    that ends with the process: the file that torch leaves when a build is killed would hang every later one.
    """
    if "TORCH_EXTENSIONS_DIR" in os.environ:
        yield
        return
    name = hashlib.blake2b(f"{versions} {_cpu()}".encode(), digest_size=6).hexdigest()
    folder = Path(tempfile.gettempdir()) / f"sharpprior-extensions-{os.getuid()}" / name
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.parent.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder.parent} belongs to another user; set TORCH_EXTENSIONS_DIR to a folder of yours")
    file = os.open(folder / "building", os.O_RDWR | os.O_CREAT, 0o600)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        for left in folder.glob("*/lock"):
            left.unlink(missing_ok=True)
        yield
    finally:
        del os.environ["TORCH_EXTENSIONS_DIR"]
        os.close(file)


def _cpu() -> str:
    """What the compiler can tell this CPU from others by."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return " ".join(sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))}))
    return platform.processor()
