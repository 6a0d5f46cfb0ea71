"""The records of one folder of the cache, in one SQLite file: written and read by any number of a node's processes.

A record is a crop's key, its payload (`codec`), and a crc32 of both that starts from the folder's fingerprint. SQLite
brings back the last whole transaction after a kill, and says so where a file is damaged or cut off, instead of dying of
it; the crc32 finds what it cannot know of. Nothing is pushed to the disk: a machine that crashes may lose the file.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np

try:
    from isal.isal_zlib import crc32  # zlib's numbers, 14 times as fast
except ImportError:
    from zlib import crc32

from data.feature_cache.spec import OVERHEAD_BYTES

FILE, LOCK = "records.sqlite", "writing.lock"
_PRAGMAS = {
    "page_size": 8192,  # files are .1 to 14 % larger than the records in them; with pages of 64 KiB up to 102 %
    "journal_mode": "wal",  # readers and the writer do not wait for each other
    "synchronous": "off",
    "wal_autocheckpoint": 256,  # pages: 16 MiB
    "cache_size": -2048,  # kB: the system's page cache does as well
    "cell_size_check": "on",
    "trusted_schema": "off",
}
_TABLE = "create table if not exists records (id integer primary key, key blob unique, crc integer, payload blob)"
_CONNECTION = {"timeout": 30.0, "isolation_level": None, "check_same_thread": False}
_INHERITED: list[sqlite3.Connection] = []


class Store:
    """Records of one fingerprint and payload size. Connects when it is used, in the process that uses it, and again
    where the file was deleted. Raises sqlite3.Error and OSError as the file and the disk do."""

    def __init__(self, folder: Path, fingerprint: str, payload_bytes: int) -> None:
        self.path, self.payload_bytes = folder / FILE, payload_bytes
        self._seed = crc32(fingerprint.encode())
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple = ()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_connection": None, "_identity": ()}

    def _connect(self, *, make: bool = False) -> sqlite3.Connection | None:
        """The connection; None where there is no file and none is to be made."""
        identity = self._identity_now()
        if self._connection is not None and identity == self._identity:
            return self._connection
        self.close()
        if identity[1] is None and not make:
            return None
        # SQLite does not wait for another process that turns a new file to its journal mode: one at a time.
        with _locked(self.path.parent) if make else contextlib.nullcontext():
            connection = sqlite3.connect(self.path, **_CONNECTION)
            try:
                for name, value in _PRAGMAS.items():
                    connection.execute(f"pragma {name} = {value}")
                if make:
                    connection.execute(_TABLE)
            except sqlite3.OperationalError:
                connection.close()
                if make or self._has_wal():
                    raise
                # Another's file, or a read-only disk: the journal cannot be opened, and what is whole needs none.
                connection = sqlite3.connect(f"file:{quote(str(self.path))}?immutable=1", uri=True, **_CONNECTION)
        self._connection, self._identity = connection, self._identity_now()
        return connection

    def _has_wal(self) -> bool:
        """Whether a part of the records may lie in the journal, or the file is simply busy."""
        try:
            return self.files()[1].stat().st_size > 0 or os.access(self.path.parent, os.W_OK)
        except FileNotFoundError:
            return os.access(self.path.parent, os.W_OK) and os.access(self.path, os.W_OK)

    def _identity_now(self) -> tuple:
        """Process and file: a connection belongs to both."""
        try:
            facts = self.path.stat()
            return os.getpid(), facts.st_dev, facts.st_ino
        except OSError:
            return os.getpid(), None

    def _crc(self, key: bytes, payload: bytes | np.ndarray) -> int:
        return crc32(payload, crc32(key, self._seed))

    def get(self, key: bytes) -> bytes | None:
        """The payload of a key, None where there is no record; ValueError for one that is damaged."""
        connection = self._connect()
        row = connection and connection.execute("select crc, payload from records where key = ?", (key,)).fetchone()
        if row is None:
            return None
        self._check(key, *row)
        return row[1]

    def _check(self, key: bytes, crc: object, payload: object) -> None:
        whole = isinstance(payload, bytes) and len(payload) == self.payload_bytes
        if not whole or crc != self._crc(key, payload):
            raise ValueError("the record is damaged")

    def put(self, keys: Sequence[bytes], payloads: Sequence[np.ndarray]) -> None:
        """Write records (payloads uint8 [P]) in one transaction, over those of the same keys."""
        connection = self._connect(make=True)
        rows = [(key, self._crc(key, payload), payload.data) for key, payload in zip(keys, payloads, strict=True)]
        connection.execute("begin immediate")
        try:
            connection.executemany("insert or replace into records (key, crc, payload) values (?, ?, ?)", rows)
            connection.execute("commit")
        except sqlite3.Error:
            with contextlib.suppress(sqlite3.Error):
                connection.execute("rollback")
            raise

    def __len__(self) -> int:
        connection = self._connect()
        return connection.execute("select count(*) from records").fetchone()[0] if connection is not None else 0

    def room(self, limit: int) -> int:
        """How many records more the file can take without growing beyond `limit` bytes."""
        connection = self._connect()
        size, pages = (
            (connection.execute(f"pragma {name}").fetchone()[0] for name in ("page_size", "page_count"))
            if connection is not None
            else (_PRAGMAS["page_size"], 0)
        )
        record = self.payload_bytes + OVERHEAD_BYTES
        # At most: a large one has pages of its own. What is really taken is asked for again at the next batch.
        on_disk = 2 * record if 4 * record < size else size * (record // (size - 4) + 1)
        return max(0, (limit - size * pages) // on_disk)

    def every_record(self) -> Iterator[tuple[int, bool]]:
        """(number, sound) of every record that can be reached."""
        connection = self._connect()
        for number, key, crc, payload in connection.execute("select id, key, crc, payload from records order by id"):
            try:
                self._check(key, crc, payload)
                yield number, True
            except (ValueError, TypeError):
                yield number, False

    def problem(self) -> str | None:
        """What SQLite finds wrong with the file's structure, None where it is sound."""
        connection = self._connect()
        found = connection.execute("pragma quick_check(1)").fetchone()[0] if connection is not None else "ok"
        return None if found == "ok" else found

    def files(self) -> list[Path]:
        """The database and what SQLite keeps beside it."""
        return [self.path.with_name(self.path.name + end) for end in ("", "-wal", "-shm")]

    def drop_from_memory(self) -> None:
        """Write the files to the disk and take them out of the page cache, so that they are read from the disk."""
        self.close()
        for path in self.files()[:2]:
            with contextlib.suppress(OSError), open(path, "rb") as file:
                os.fdatasync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the connection; it is made again when it is needed."""
        if self._connection is not None and self._identity[0] == os.getpid():
            self._connection.close()
        elif self._connection is not None:
            _INHERITED.append(self._connection)  # of a process that forked this one: SQLite must not close it here
        self._connection, self._identity = None, ()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time in a folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


class WritingLock:
    """Held, with others, by the writers of a folder, and gone with their processes."""

    def __init__(self, folder: Path) -> None:
        self._file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def close(self) -> None:
        """Let go."""
        os.close(self._file)


def being_written(folder: Path) -> bool:
    """Whether a living process writes into a folder."""
    try:
        file = os.open(folder / LOCK, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(file)
    return False
