"""AdamW on the host, for `engine.offload: cpu`: DeepSpeed's, which is compiled once on a machine."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import stat
import sys
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

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_extensions(f"{deepspeed.__version__} {torch.__version__} {platform.python_version()}"))
        except OSError as error:
            raise ValueError(
                f"engine.offload cpu: no folder for DeepSpeed's compiled CPU Adam ({error}): set TORCH_EXTENSIONS_DIR "
                "to a folder of your own on this machine, or engine.offload to none"
            ) from error
        try:
            return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
        except Exception as error:  # compilers fail in many ways
            raise ValueError(
                f"engine.offload cpu: DeepSpeed's CPU Adam does not compile here ({_reason(error)}): install a C++ "
                "compiler and ninja, or set engine.offload to none"
            ) from error


def _reason(error: BaseException) -> str:
    """First line of what began it, or the first complaint of a compiler in it."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return next((line for line in lines if "error:" in line), lines[0]).strip()


@contextlib.contextmanager
def _extensions(versions: str) -> Iterator[None]:
    """torch's folder of compiled extensions for the block: one a machine, user, and set of versions and tools.

    On the machine's own disk, for what is compiled fits its CPU. One process builds or loads at a time, under a lock
    that ends with it: the file that older torch leaves when a build is killed would hang every later one. OSError for
    a folder that cannot be made, or in which others may write.
    """
    if os.environ.get("TORCH_EXTENSIONS_DIR"):
        yield
        return
    # ninja builds anew where another ninja, compiler or environment has built.
    tools = f"{sys.prefix} {shutil.which('ninja')} {os.environ.get('CXX')} {shutil.which('c++')}"
    name = hashlib.blake2b(f"{versions} {tools} {_cpu()}".encode(), digest_size=6).hexdigest()
    own = Path(tempfile.gettempdir()) / f"sharpprior-extensions-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        own.mkdir(mode=0o700)
    facts = own.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o022:
        raise PermissionError(f"{own} is not a folder of yours alone")
    folder = own / name
    folder.mkdir(exist_ok=True)
    file = os.open(folder / "building", os.O_RDWR | os.O_CREAT, 0o600)
    before = os.environ.get("TORCH_EXTENSIONS_DIR")
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        for left in folder.glob("*/lock"):
            left.unlink(missing_ok=True)
        yield
    finally:
        os.environ.pop("TORCH_EXTENSIONS_DIR")
        if before is not None:
            os.environ["TORCH_EXTENSIONS_DIR"] = before
        os.close(file)


def _cpu() -> str:
    """What the compiler can tell this CPU from others by."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return " ".join(sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))}))
    return platform.processor()
