"""What was measured of pictures that no model had a part in, kept in a file.

Inputs and smoothed inputs are the same for every model that is evaluated on a set, and take most of the time of a small
one's evaluation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from train.evaluate.metrics import METRICS


class Baselines:
    """Metrics by the content of the two pictures, in lines of JSON that any process may add to.

    versions: of what computes them; values of other versions are not taken. A line that does not read is passed over.
    """

    def __init__(self, file: Path, versions: Mapping[str, str]) -> None:
        self._file, self._versions = file, json.dumps(dict(sorted(versions.items())))
        self._known: dict[str, dict[str, float]] = {}
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []:
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
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with open(self._file, "ab") as stream:  # one write, after an end of line: a torn line stays alone
                stream.write(b"\n" + json.dumps({"pair": pair, "metrics": known}).encode() + b"\n")
        return {name: known[name] for name in names}

    def _key(self, image: Tensor, sharp: Tensor) -> str:
        digest = hashlib.blake2b(self._versions.encode(), digest_size=16)
        for each in (image, sharp):
            digest.update(f"{image.device.type} {tuple(each.shape)}".encode())
            digest.update(each.cpu().numpy().tobytes())
        return digest.hexdigest()


def _values(found: Mapping[str, float]) -> dict[str, float]:
    return {name: float(found[name]) for name in METRICS if name in found}
