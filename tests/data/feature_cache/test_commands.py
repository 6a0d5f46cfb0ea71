"""`sharpprior cache stats|verify|clear` on real folders of the feature cache."""

import pytest
import torch

from data.feature_cache.cache import FeatureCache
from data.feature_cache.codec import quantise
from data.feature_cache.folders import default_root
from data.feature_cache.spec import CacheSpec, crop_key

KEYS = [crop_key("a", (n, 0, 64), False) for n in range(3)]


@pytest.fixture
def caches(tmp_path) -> list[FeatureCache]:
    """Two folders below one root, fp16 and int8, three records each."""
    found = []
    for dtype in ("fp16", "int8"):
        spec = CacheSpec("efficientnet_lite0-1234", ((2, 3, 4), (5, 1, 1)), {"boxes": 16}, dtype)
        found.append(FeatureCache(tmp_path / "cache", spec, limit_bytes=1 << 20))
        with found[-1].writer("w") as writer:
            writer.put(KEYS, quantise([torch.randn(3, *level) for level in spec.levels], dtype))
    return found


def test_stats_name_teacher_form_and_size_of_every_folder(caches, sharpprior):
    status, out, _ = sharpprior("cache", "stats", caches[0].root)
    assert status == 0
    for cache in caches:
        assert f"{cache.spec.fingerprint}: 3 records, 0." in out
    assert "efficientnet_lite0-1234" in out
    assert "fp16, levels 2×3×4 5×1×1" in out
    assert '{"boxes": 16}' in out
    assert "2 folders" in out
    with caches[0].writer("running") as writer:
        writer.put(
            [crop_key("b", (0, 0, 64), False)], quantise([torch.randn(1, *x) for x in ((2, 3, 4), (5, 1, 1))], "fp16")
        )
        writer.flush()
        assert ", a run writes to it" in sharpprior("cache", "stats", caches[0].root)[1]


def test_verify_names_what_is_damaged(caches, sharpprior):
    root = caches[0].root
    assert sharpprior("cache", "verify", root)[:2] == (0, f"{root}: 6 records, sound\n")
    store = caches[1].reader().store
    whole = store.path.read_bytes()
    payload = store.get(KEYS[1])
    store.close()
    assert whole.count(payload) == 1
    store.path.write_bytes(whole.replace(payload, b"x" + payload[1:]))
    status, out, error = sharpprior("cache", "verify", root)
    assert (status, out) == (1, f"{store.path}: record 2 is damaged\n")
    assert error == f"error: {root}: 1 problem\n"


def test_a_damaged_meta_file_is_reported_and_can_be_cleared(caches, sharpprior):
    meta = caches[0].folder / "meta.json"
    meta.write_text(meta.read_text().replace("1234", "1235"))
    assert "describes another folder" in sharpprior("cache", "stats", caches[0].root)[1]
    status, out, _ = sharpprior("cache", "verify", caches[0].root)
    assert (status, out.count("meta.json")) == (1, 1)
    assert sharpprior("cache", "clear", caches[0].root, "--only", caches[0].folder.name)[0] == 0
    assert sharpprior("cache", "verify", caches[0].root)[0] == 0


def test_clear_deletes_the_cache_and_nothing_else(caches, sharpprior):
    root = caches[0].root
    keep = [root / "notes.txt", root / "0123456789abcdef0123456789abcdef" / "photo.jpg", root / "more" / "x.seg"]
    for path in keep:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    assert sharpprior("cache", "clear", root, "--only", caches[0].folder.name[:8])[0] == 0
    assert [cache.folder.exists() for cache in caches] == [False, True]
    status, out, _ = sharpprior("cache", "clear", root)
    assert (status, "1 folder deleted" in out) == (0, True)
    assert not caches[1].folder.exists()
    assert all(path.read_text() == "mine" for path in keep)
    assert "0 folders" in sharpprior("cache", "stats", root)[1]


def test_clear_keeps_a_folder_that_holds_other_files(caches, sharpprior):
    (caches[0].folder / "photo.jpg").write_text("mine")
    status, _, error = sharpprior("cache", "clear", caches[0].root, "--only", caches[0].folder.name)
    assert status == 1
    assert "delete the folder by hand" in error
    assert [path.name for path in caches[0].folder.iterdir()] == ["photo.jpg"]


def test_clear_leaves_a_running_writer_alone(caches, sharpprior):
    root, spec = caches[0].root, caches[0].spec
    more = quantise([torch.randn(1, *level) for level in spec.levels], "fp16")
    with caches[0].writer("running") as writer:
        writer.put([crop_key("b", (0, 0, 64), False)], more)
        writer.flush()
        status, _, error = sharpprior("cache", "clear", root)
        assert (status, "a running writer holds it" in error) == (1, True)
        assert caches[0].folder.exists()
        assert sharpprior("cache", "clear", root, "--force")[0] == 0
        writer.put([crop_key("c", (0, 0, 64), False)], more)
        writer.flush()
        assert writer.stopped is None
    assert FeatureCache(root, spec, limit_bytes=1 << 20).reader().get(crop_key("c", (0, 0, 64), False)) is not None


@pytest.mark.parametrize("command", ["stats", "verify", "clear"])
def test_a_folder_that_is_not_there_is_an_error_of_one_line(tmp_path, sharpprior, command):
    status, _, error = sharpprior("cache", command, tmp_path / "nowhere")
    assert status == 1
    assert error.startswith(f"error: {tmp_path / 'nowhere'}: no such folder")
    assert error.count("\n") == 1
    assert sharpprior("cache", "clear", tmp_path, "--only", "abc")[0] == 1


def test_without_a_folder_the_runs_default_is_meant(sharpprior, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert sharpprior("cache", "stats")[:2] == (0, f"{default_root()}: 0 folders, 0.0 MiB\n")


def test_a_folder_of_the_first_version_is_told_and_can_be_cleared(tmp_path, sharpprior):
    folder = tmp_path / ("0" * 32)
    folder.mkdir()
    (folder / "meta.json").write_text('{"format": "sharpprior-features", "version": 1}')
    for name in (f"{'1' * 20}-host-1-0-rank0.seg", f"{'1' * 20}-host-1-0-rank0.idx", "eviction.lock"):
        (folder / name).write_bytes(b"old")
    said = sharpprior("cache", "stats", tmp_path)[1]
    assert "this version reads sharpprior-features 2; no run uses this folder" in said
    assert sharpprior("cache", "clear", tmp_path)[0] == 0
    assert not folder.exists()
