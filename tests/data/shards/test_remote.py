"""Remote sets over HTTP: cut connections and slow reads are survived, damage is refused, the cache stays bounded."""

import http.server
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

pytest.importorskip("aiohttp")

from data.errors import DataError
from data.shards.remote import ShardCache
from data.shards.set import ShardSet
from data.shards.verify import verify
from tests.data.streams import loader


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder with byte ranges; `cuts` answers break off half-way, `stalls` fall silent half-way."""

    def __init__(self, root: Path) -> None:
        self.root, self.cuts, self.stalls, self.ranges, self.pause = root, 0, 0, True, 0.0
        self.asked: list[str] = []
        self.lock, self.over = threading.Lock(), threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.server.root / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        data, status = path.read_bytes(), 200
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted and self.server.ranges:
            data, status = data[int(wanted[1]) : int(wanted[2]) + 1], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not body:
            return
        with self.server.lock:
            self.server.asked.append(self.path)
            cut, stall = self.server.cuts > 0, self.server.stalls > 0
            self.server.cuts -= cut
            self.server.stalls -= stall and not cut
        time.sleep(self.server.pause)
        if cut or stall:
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            if not cut:
                self.server.over.wait(600)
            self.close_connection = True
            return
        self.wfile.write(data)


@pytest.fixture
def server(make_set):
    root = make_set([3, 3, 3, 3])
    server = Server(root)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def cache(tmp_path):
    return ShardCache(tmp_path / "cache", timeout_s=0.5, backoff_s=0.01, piece_bytes=4096)


def batches(sets, **options) -> list[dict]:
    return list(loader(sets, batches=6, seed=2, **options))


def test_remote_set_streams_the_same_pairs_as_the_local_one(server, cache):
    local = batches(server.root)
    for workers in (0, 2):
        remote = batches(ShardSet(server.url, cache=cache), workers=workers)
        assert all(torch.equal(a["blurry"], b["blurry"]) for a, b in zip(local, remote, strict=True))


def test_index_file_url_and_folder_url_are_the_same_set(server, cache):
    assert ShardSet(server.url + "/index.json", cache=cache).digest == ShardSet(server.url + "/", cache=cache).digest
    assert ShardSet(server.url + "/index.json", cache=cache).read(0, "jpg") == ShardSet(server.root).read(0, "jpg")


def test_cut_connections_are_survived_without_fetching_anew_what_arrived(server, cache):
    shards = ShardSet(server.url, cache=cache)
    server.cuts = 3
    assert shards.read(4, "jpg") == ShardSet(server.root).read(4, "jpg")
    assert server.cuts == 0
    pieces = -(-shards.shards[1].bytes // 4096)
    assert sum("s_00001" in path for path in server.asked) == pieces + 3


def test_silent_connections_are_given_up_and_tried_again(server, cache):
    server.stalls = 2
    assert ShardSet(server.url, cache=cache).read(0, "jpg") == ShardSet(server.root).read(0, "jpg")
    assert server.stalls == 0


def test_slow_servers_are_waited_for(server, cache):
    server.pause = 0.1
    assert ShardSet(server.url, cache=cache).read(0, "jpg") == ShardSet(server.root).read(0, "jpg")


def test_server_without_byte_ranges_works(server, cache):
    server.ranges = False
    assert ShardSet(server.url, cache=cache).read(0, "jpg") == ShardSet(server.root).read(0, "jpg")


def test_server_that_is_gone_is_one_clear_line(server, tmp_path):
    cache = ShardCache(tmp_path / "c", attempts=2, backoff_s=0.01, timeout_s=0.3)
    with pytest.raises(DataError, match=r"cannot be read after 2 attempts"):
        ShardSet("http://127.0.0.1:9", cache=cache)
    shards = ShardSet(server.url, cache=cache)
    server.cuts = 1000
    with pytest.raises(DataError, match=r"s_00000\.tar: cannot be read after 2 attempts"):
        shards.read(0, "jpg")


def test_missing_index_and_missing_shard_are_named(server, cache):
    with pytest.raises(DataError, match=r"no index\.json there"):
        ShardSet(server.url + "/nowhere", cache=cache)
    shards = ShardSet(server.url, cache=cache)
    (server.root / "s_00002.tar").unlink()
    with pytest.raises(DataError, match=r"s_00002\.tar: the shard is missing"):
        shards.read(6, "jpg")


def test_damaged_remote_shard_is_refused_and_not_kept(server, cache):
    shards = ShardSet(server.url, cache=cache)
    path = server.root / "s_00000.tar"
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"s_00000\.tar: its sha256 is not the index's"):
        shards.read(0, "jpg")
    assert not list(cache.folder.glob("*.tar"))
    assert any("s_00000.tar" in problem for problem in verify(server.url, cache=cache))


def test_shards_that_are_fetched_at_once_do_not_exceed_the_limit_together(server, tmp_path, monkeypatch):
    largest = max(path.stat().st_size for path in server.root.glob("*.tar"))
    cache = ShardCache(tmp_path / "small", limit_bytes=2 * largest, backoff_s=0.01)
    shards = ShardSet(server.url, cache=cache)
    together, download = threading.Barrier(3), cache._download

    def downloads(*arguments) -> None:
        together.wait(30)  # all have made room by now
        download(*arguments)

    monkeypatch.setattr(cache, "_download", downloads)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda shard: cache.fetch(shards.location, shard), shards.shards[:3]))
    assert sum(path.stat().st_size for path in cache.folder.glob("*.tar")) <= 2 * largest


def test_cache_keeps_its_limit_and_the_stream_goes_on(server, tmp_path):
    largest = max(path.stat().st_size for path in server.root.glob("*.tar"))
    cache = ShardCache(tmp_path / "small", limit_bytes=2 * largest, backoff_s=0.01)
    shards = ShardSet(server.url, cache=cache)
    remote = batches(shards, window=1)
    local = batches(server.root, window=1)
    assert all(torch.equal(a["blurry"], b["blurry"]) for a, b in zip(local, remote, strict=True))
    assert sum(path.stat().st_size for path in cache.folder.glob("*.tar")) <= 2 * largest
    tiny = ShardSet(server.url, cache=ShardCache(tmp_path / "tiny", limit_bytes=100))
    with pytest.raises(DataError, match="exceed the cache's limit"):
        tiny.read(0, "jpg")


def test_shards_are_fetched_once_whoever_asks(server, cache):
    for shards in (ShardSet(server.url, cache=cache), ShardSet(server.url, cache=ShardCache(cache.folder))):
        for number in range(len(shards)):
            shards.read(number, "jpg")
    total = sum(-(-shard.bytes // 4096) for shard in shards.shards)
    assert sum(path.endswith(".tar") for path in server.asked) == total


def test_next_shards_are_fetched_ahead(server, cache):
    shards = ShardSet(server.url, cache=cache)
    stream = iter(loader(shards, global_batch=1, batches=1, window=1))
    next(stream)
    deadline = time.monotonic() + 20
    while len(list(cache.folder.glob("*.tar"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(list(cache.folder.glob("*.tar"))) == 2


def test_remote_set_without_a_cache_is_refused(server):
    with pytest.raises(DataError, match="cache"):
        ShardSet(server.url)


def test_memory_and_file_urls_work(make_set, cache):
    import fsspec

    root = make_set([2], name="m")
    memory = fsspec.filesystem("memory")
    for path in root.iterdir():
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    assert ShardSet("memory://bucket", cache=cache).read(1, "jpg") == ShardSet(f"file://{root}").read(1, "jpg")
    with pytest.raises(DataError, match="nonsense"):
        ShardSet("nonsense://bucket", cache=cache)


def test_a_copy_that_was_damaged_on_the_node_is_fetched_again(server, cache, caplog):
    shards = ShardSet(server.url, cache=cache)
    before = shards.read(0, "jpg")
    copy = shards.shard_path(0)
    data = bytearray(copy.read_bytes())
    offset = int(shards.shards[0].members["jpg"][0][0])
    data[offset + 5] ^= 1
    copy.write_bytes(data)
    assert shards.read(0, "jpg") == before
    assert "damaged since it was fetched; fetching" in caplog.text
    assert ShardSet(server.url, cache=cache).read(0, "jpg") == before
