"""Which run it is: what of a configuration decides its losses, and the code that computes them."""

from __future__ import annotations

import hashlib
import json
import subprocess
from importlib.metadata import version
from typing import Any

from train import ROOT
from train.config.schema import Config

OTHER_SECTIONS = ("kernels", "checkpoint", "eval", "profile")  # that decide no losses


def differences(a: dict, b: dict, prefix: str = "") -> list[str]:
    """Dotted names of the values in which two configurations differ."""
    names = []
    for key in a.keys() | b.keys():
        left, right = a.get(key), b.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            names += differences(left, right, f"{prefix}{key}.")
        elif left != right:
            names.append(f"{prefix}{key} {left} → {right}")
    return sorted(names)


def deciding(config: Config) -> dict[str, Any]:
    """What of a configuration decides the losses of a run: not its name, nor what is written when, nor who computes
    (of the engine only the precision, and what goes to DeepSpeed as it is, count; of a batch its whole size). The data
    themselves are known by their index's digest; a cached feature equals a computed one in its stored form."""
    facts = config.model_dump(mode="json", exclude={"run": {"name", "root"}} | dict.fromkeys(OTHER_SECTIONS, True))
    facts["data"]["weights"] = [source["weight"] for source in facts["data"]["train"] or [{"weight": 1.0}]]
    for section, keys in (
        ("data", ("workers", "train", "val", "cache", "stall_minutes")),
        ("train", ("log_every", "accumulation", "max_bad_steps")),
        ("features", ("cache", "folder", "limit_gib", "check_every")),
    ):
        for key in keys:
            del facts[section][key]
    facts["engine"] = {key: facts["engine"][key] for key in ("precision", "deepspeed")}
    return facts


def config_digest(config: Config) -> str:
    """Hash of `deciding`, to compare runs by."""
    return hashlib.blake2b(json.dumps(deciding(config), sort_keys=True).encode(), digest_size=16).hexdigest()


def git_commit() -> str | None:
    """Commit of the checkout, with `+` if files differ from it; None outside git."""
    try:
        run = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 10, "check": True}
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **run).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **run).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed else "")


def versions() -> dict[str, str]:
    """Versions of the packages that compute a run."""
    return {name: version(name) for name in ("torch", "deepspeed", "accelerate", "timm", "numpy")}
