"""What was measured of each picture, kept at once: a kill loses the picture in work, and ranks need no other link."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from data.files import write_atomically
from train.config.identity import differences
from train.evaluate.pairs import Item

SETTINGS = "evaluation.json"  # what the folder's measurements are of
RESULTS = "results.json"


class Book:
    """Records of an evaluation's folder: a file of JSON lines a rank, read whole whoever wrote them.

    identity: what decides the numbers (model, data, settings, code). A folder that holds measurements of another
    identity is refused, naming the differences; `overwrite` begins anew, which several ranks cannot agree on by
    themselves. content: a digest of an item's files, read where their stamp is not the recorded one, as of a copy:
    the same content was measured before, whatever its date. ValueError, OSError.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        items: Sequence[Item],
        *,
        rank: int,
        world: int,
        overwrite: bool,
        content: Callable[[Item], str] = lambda item: "",
    ) -> None:
        self.folder, self.items, self._rank = folder, list(items), rank
        self._content = cache(content)
        if overwrite and world > 1:
            raise ValueError(f"--overwrite with {world} ranks: remove {folder} first, then start them without it")
        foreign = (folder / "report.md").exists() and not (folder / SETTINGS).exists()
        if foreign and not overwrite:
            raise ValueError(f"{folder / 'report.md'}: exists: choose another folder, or --overwrite")
        folder.mkdir(parents=True, exist_ok=True)
        if overwrite:
            # The seal first: what a kill leaves must not look finished.
            for path in (
                folder / RESULTS,
                folder / SETTINGS,
                folder / "yardsticks.json",
                *folder.glob("pictures-rank-*.jsonl"),
            ):
                path.unlink(missing_ok=True)
        begun = any(folder.glob("pictures-rank-*.jsonl"))  # asked before: other ranks write their settings first
        # As JSON has it: tuples are lists there.
        identity = json.loads(json.dumps(identity))
        try:
            before = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        except FileNotFoundError:
            if begun:
                raise ValueError(
                    f"{folder}: holds measurements without {SETTINGS}: --overwrite, or restore it"
                ) from None
            write_atomically(folder / SETTINGS, json.dumps(identity, indent=1, ensure_ascii=False) + "\n")
            before = identity
        except ValueError:
            raise ValueError(f"{folder / SETTINGS}: damaged: --overwrite begins anew") from None
        if before != identity:
            lines = differences(before, identity)
            more = f" and {len(lines) - 4} more" if len(lines) > 4 else ""
            raise ValueError(
                f"{folder}: holds an evaluation of something else ({'; '.join(lines[:4])}{more}): choose another "
                "folder with -o, or --overwrite"
            )
        self._file = None

    def share(self, world: int) -> list[Item]:
        """What is left to do of this rank's part of the list; what failed before is tried again."""
        done = self.records()
        return [item for item in self.items[self._rank :: world] if "failed" in done.get(item.key, {"failed": ""})]

    def records(self) -> dict[str, dict[str, Any]]:
        """The newest record of every picture, in the list's order; of failed ones {key, failed: why}."""
        items = {item.key: item for item in self.items}
        found: dict[str, dict[str, Any]] = {}
        for path in sorted(self.folder.glob("pictures-rank-*.jsonl")):
            for record in _lines(path):
                key = record.get("key")
                if key not in items or not self._same(items[key], record):
                    continue  # of a file that was replaced since
                if "failed" not in record or "failed" in found.get(key, {"failed": ""}):
                    found[key] = record
        return {item.key: found[item.key] for item in self.items if item.key in found}

    def _same(self, item: Item, record: Mapping[str, Any]) -> bool:
        if item.stamp == record.get("stamp"):
            return True
        return bool(record.get("content")) and record["content"] == self._content(item)

    def add(self, item: Item, record: Mapping[str, Any]) -> None:
        """Write a picture's record to the disk before the next one is begun."""
        whole = {"key": item.key, "scene": item.scene, "tier": item.tier, "stamp": item.stamp, **record}
        if self._file is None:
            path = self.folder / f"pictures-rank-{self._rank}.jsonl"
            torn = path.exists() and path.stat().st_size and path.read_bytes()[-1:] != b"\n"
            self._file = open(path, "ab")  # noqa: SIM115 - open while pictures come
            if torn:
                self._file.write(b"\n")  # what a killed writer left becomes a line of its own, which does not parse
        self._file.write(json.dumps(whole, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close this rank's file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file; a torn line, which a kill leaves, is none."""
    records = []
    for line in path.read_bytes().split(b"\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records
