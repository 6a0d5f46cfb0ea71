"""Remote shards through fsspec: whole shards fetched into a bounded node-local folder, checksummed, read from there.

Files in the folder are named by their sha256, so every process of a node and every run shares them; one process fetches
a shard while the others wait on its lock. A fetch goes piece by piece and goes on where a cut connection stopped it.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import fsspec

from data.errors import DataError

log = logging.getLogger("sharpprior.data")
_PIECE = 8 << 20


class ShardCache:
    """A node-local folder of remote shards, at most `limit_bytes` of them; the least recently used go first.

    `attempts` is how often in a row a fetch may fail without a byte gained, `timeout_s` how long HTTP may be silent;
    `options` go to fsspec (credentials, endpoint). Files that a process still reads keep their disk space until closed.
    """

    def __init__(
        self,
        folder: str | Path,
        limit_bytes: int = 64 << 30,
        *,
        attempts: int = 6,
        timeout_s: float = 60.0,
        backoff_s: float = 0.5,
        piece_bytes: int = _PIECE,
        options: dict | None = None,
    ) -> None:
        self.folder, self.limit_bytes = Path(folder), int(limit_bytes)
        self.attempts, self.timeout_s, self.backoff_s = attempts, timeout_s, backoff_s
        self.piece_bytes, self.options = piece_bytes, dict(options or {})
        self._queue: queue.Queue | None = None
        self._asked: set[str] = set()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"{folder}: cannot hold the shard cache ({error.strerror}); choose another folder"
            ) from None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_queue": None, "_asked": set()}

    # -- fetching -----------------------------------------------------------------------------------------------------

    def _filesystem(self, url: str):
        options = dict(self.options)
        protocol = urlsplit(url).scheme
        try:
            if protocol in ("http", "https") and "client_kwargs" not in options:
                import aiohttp

                # No limit on the whole transfer, which may be slow; only on silence.
                limits = aiohttp.ClientTimeout(total=None, sock_connect=self.timeout_s, sock_read=self.timeout_s)
                options["client_kwargs"] = {"timeout": limits}
            # skip_instance_cache: a filesystem made before a fork must not be used after it.
            return fsspec.filesystem(protocol, skip_instance_cache=True, use_listings_cache=False, **options)
        except ImportError as error:
            raise DataError(f"{url}: {error}; install sharpprior[remote] (s3fs or gcsfs for s3:// or gs://)") from None
        except ValueError as error:
            raise DataError(f"{url}: {error}") from None

    def fetch_index(self, location: str) -> bytes:
        """Bytes of the set's index.json, tried as often as a shard is; DataError where it cannot be read."""
        url = location if location.endswith(".json") else location.rstrip("/") + "/index.json"
        filesystem, last = self._filesystem(url), None
        for attempt in range(self.attempts):
            try:
                return filesystem.cat_file(url)
            except FileNotFoundError:
                raise DataError(
                    f"{location}: no index.json there; make it with `sharpprior index` and upload it"
                ) from None
            except Exception as error:  # every protocol has its own errors for a cut connection
                last = error
                time.sleep(self.backoff_s * 2**attempt)
        raise DataError(
            f"{url}: cannot be read after {self.attempts} attempts ({_short(last)}); check address and network"
        )

    def _path(self, sha256: str) -> Path:
        return self.folder / f"{sha256}.tar"

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with open(self.folder / f"{name}.lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def fetch(self, location: str, shard) -> Path:
        """Path of the shard's local copy, fetched if it is not there; DataError where it cannot be had whole."""
        path = self._path(shard.sha256)
        if path.exists():
            os.utime(path)
            return path
        if shard.bytes > self.limit_bytes:
            raise DataError(
                f"{location}/{shard.name}: {shard.bytes} bytes exceed the cache's limit of {self.limit_bytes}; raise it"
            )
        with self._locked(shard.sha256):
            if path.exists():
                os.utime(path)
                return path
            self._make_room(shard.bytes)
            self._download(_shard_url(location, shard.name), shard, path)
            os.utime(path)
            self._make_room(0)  # others may have come meanwhile, for which there was room then
        return path

    def fetch_again(self, location: str, shard) -> None:
        """Fetch a shard anew whose copy here is damaged; said once a copy."""
        path = self._path(shard.sha256)
        with self._locked(shard.sha256):
            if path.exists() and _sha256(path) != shard.sha256:
                log.warning("%s: damaged since it was fetched; fetching %s again", path, shard.name)
                path.unlink()
        self.fetch(location, shard)

    def open(self, location: str, shard) -> int:
        """File descriptor of the shard's local copy; stays readable if the copy is evicted meanwhile."""
        for _ in range(10):
            with contextlib.suppress(FileNotFoundError):  # evicted between fetch and open: once more
                return os.open(self.fetch(location, shard), os.O_RDONLY)
        raise DataError(f"{self.folder}: shards are evicted as fast as they are fetched; raise the cache's limit")

    def _download(self, url: str, shard, path: Path) -> None:
        """Fetch into `<sha256>.part`, going on where an earlier attempt stopped, verify, rename."""
        part = path.with_suffix(".part")
        filesystem, failures, wrong = self._filesystem(url), 0, 0
        while True:
            have = part.stat().st_size if part.exists() else 0
            if have >= shard.bytes:
                if have == shard.bytes and _sha256(part) == shard.sha256:
                    os.replace(part, path)
                    return
                part.unlink()
                wrong += 1
                if wrong == 2:
                    raise DataError(f"{url}: its sha256 is not the index's, twice; upload the shard again")
                continue
            try:
                stop = min(have + self.piece_bytes, shard.bytes)
                piece = filesystem.cat_file(url, start=have, end=stop)
                if len(piece) > stop - have:  # a server without byte ranges sent the whole file
                    piece = piece[have:] if len(piece) == shard.bytes else b""
                if not piece:
                    raise OSError(f"no bytes at {have} of {shard.bytes}")
                with open(part, "ab") as file:
                    file.write(piece)
                failures = 0
            except FileNotFoundError:
                raise DataError(f"{url}: the shard is missing; upload it again") from None
            except Exception as error:  # every protocol has its own errors for a cut connection
                if isinstance(error, OSError) and error.errno in (28, 122):  # no space, quota
                    raise DataError(f"{self.folder}: disk full while fetching {url}; lower the cache's limit") from None
                failures += 1
                if failures >= self.attempts:
                    message = f"{url}: cannot be read after {failures} attempts ({_short(error)}); check the network"
                    raise DataError(message) from None
                time.sleep(self.backoff_s * 2 ** (failures - 1))

    def _make_room(self, needed: int) -> None:
        """Evict the least recently used shards until `needed` more bytes stay within the limit."""
        with self._locked("eviction"):
            files = sorted(
                ((p.stat().st_mtime_ns, p.stat().st_size, p) for p in self.folder.glob("*.tar")), reverse=True
            )
            total = sum(size for _, size, _ in files) + needed
            while files and total > self.limit_bytes:
                _, size, oldest = files.pop()
                oldest.unlink(missing_ok=True)
                total -= size

    # -- reading ahead ------------------------------------------------------------------------------------------------

    def ahead(self, location: str, shards) -> None:
        """Ask a background thread to fetch these shards; returns at once. What fails here is met again on reading."""
        new = [shard for shard in shards if shard.sha256 not in self._asked]
        if not new:
            return
        if self._queue is None:
            self._queue = queue.Queue()
            threading.Thread(target=self._fetch_ahead, args=(self._queue,), daemon=True).start()
        for shard in new:
            self._asked.add(shard.sha256)
            self._queue.put((location, shard))

    def _fetch_ahead(self, waiting: queue.Queue) -> None:
        while True:
            location, shard = waiting.get()
            try:
                self.fetch(location, shard)
            except (DataError, OSError) as error:  # the reader meets it again, and reports it
                log.warning("read-ahead: %s", error)
            # It may be evicted and wanted again an epoch later.
            self._asked.discard(shard.sha256)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shard_url(location: str, name: str) -> str:
    base = location.rsplit("/", 1)[0] if location.endswith(".json") else location.rstrip("/")
    return f"{base}/{name}"


def _short(error: Exception | None) -> str:
    return f"{type(error).__name__}: {error}"[:200]
