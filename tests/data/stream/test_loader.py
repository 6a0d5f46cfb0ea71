"""The stream of pairs: one order for any ranks and workers, whole pairs only, clear errors, a clean end."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import webdataset as wds

from data.blur import TIERS, BlurConfig, pair_of_plan, plan_pair
from data.errors import DataError
from data.image import decode_image, encode_jpeg, encode_png
from data.shards.set import ShardSet
from data.shards.write import ShardWriter
from data.stream.batch import Batch
from data.stream.config import StreamConfig
from data.stream.crops import margin_of
from data.stream.validation import validation_pairs
from data.workers import init_worker
from tests.data.pictures import picture
from tests.data.streams import loader

pytestmark = pytest.mark.slow

BLUR = BlurConfig()
TENSORS = ("blurry", "sharp", "box", "crop", "flip", "epoch", "source", "position", "extent", "input_psnr")
NAMES = ("key", "image", "tier", "generator", "seed")
SAMPLES = Path(__file__).parents[3] / "data" / "samples"


def merged(parts: list[list[dict]]) -> list[dict]:
    """Global batches of the ranks' batches, ranks in order."""
    return [
        {name: torch.cat([batch[name] for batch in batches]) for name in TENSORS}
        | {name: [value for batch in batches for value in batch[name]] for name in NAMES}
        for batches in zip(*parts, strict=True)
    ]


def assert_same(one: list[dict], two: list[dict]) -> None:
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        for name in TENSORS:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=0, equal_nan=True)
        for name in NAMES:
            assert a[name] == b[name]


@pytest.fixture
def one_process(make_set):
    root = make_set([3, 2])
    return root, list(loader(root))


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_ranks_and_workers_make_the_same_global_batches_bit_for_bit(one_process, world, workers):
    root, expected = one_process
    parts = [list(loader(root, rank=rank, world=world, workers=workers)) for rank in range(world)]
    assert_same(merged(parts), expected)


def test_accumulation_cuts_the_same_global_batches(one_process):
    root, expected = one_process
    batches = list(loader(root, accumulation=2))
    assert [len(batch["key"]) for batch in batches] == [2] * 8
    assert_same(merged([batches[0::2], batches[1::2]]), expected)
    assert [batch["samples_consumed"] for batch in batches] == [0, 4, 4, 8, 8, 12, 12, 16]


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_from_samples_consumed_goes_on_exactly(one_process, workers):
    root, expected = one_process
    state = next(iter(loader(root)))["samples_consumed"]
    assert state == 4
    assert_same(list(loader(root, start=state, batches=3, workers=workers)), expected[1:])


def test_batches_hold_what_they_say(one_process):
    root, batches = one_process
    assert torch.cat([batch["position"] for batch in batches]).tolist() == list(range(16))
    for batch in batches:
        assert batch["blurry"].shape == batch["sharp"].shape == (4, 3, 32, 32)
        assert batch["blurry"].dtype == batch["sharp"].dtype == torch.uint8
        # The order in memory decides the last bits of a CPU's convolutions, so of every loss.
        assert batch["blurry"].stride() == batch["sharp"].stride() == (3 * 32 * 32, 1, 3 * 32, 3)
        assert batch["extent"].dtype == torch.float32
        for i, key in enumerate(batch["key"]):
            sharp = ShardSet(root).read(int(key[1:]), "jpg")
            from data.image import decode_image

            top, left, size = batch["box"][i].tolist()
            crop = decode_image(sharp)[top : top + size, left : left + size]
            crop = crop[:, ::-1] if batch["flip"][i] else crop
            np.testing.assert_array_equal(batch["sharp"][i].numpy().transpose(1, 2, 0), crop)


def test_crops_come_from_a_finite_plan_and_blur_varies(make_set):
    root = make_set([2])
    batches = list(loader(root, boxes_per_photo=2, batches=12))
    boxes, blurs = {}, set()
    for batch in batches:
        for i, image in enumerate(batch["image"]):
            place = (image, int(batch["crop"][i]))
            found = (*batch["box"][i].tolist(), bool(batch["flip"][i]))
            assert boxes.setdefault(place, found) == found
            blurs.add(batch["blurry"][i].numpy().tobytes())
    assert len(boxes) == 4
    assert len(blurs) == 48


def test_several_crops_a_decode_are_different_crops_of_one_photograph(make_set):
    root = make_set([3, 2])
    batches = list(loader(root, crops_per_decode=2))
    for batch in batches:
        assert batch["key"][0::2] == batch["key"][1::2]
        assert (batch["crop"][0::2] != batch["crop"][1::2]).all()
    parts = [list(loader(root, crops_per_decode=2, rank=rank, world=4)) for rank in range(4)]
    assert_same(merged(parts), batches)


def test_recorded_pairs_are_cut_not_synthesized(make_set):
    root = make_set([3], kind="pairs")
    for batch in loader(root):
        assert torch.equal(batch["blurry"], 255 - batch["sharp"])
        for i, crop in enumerate(batch["sharp"]):
            top, left, size = batch["box"][i].tolist()
            cut = picture(int(batch["key"][i][1:]))[top : top + size, left : left + size]
            assert np.array_equal(crop.permute(1, 2, 0).numpy(), cut[:, ::-1] if batch["flip"][i] else cut)
        assert batch["tier"] == ["paired"] * 4
        assert batch["extent"].isnan().all()
        assert torch.isfinite(batch["input_psnr"]).all()


def test_crops_of_recorded_pairs_reach_every_pixel_and_synthesized_ones_keep_what_blur_needs(make_set):
    pairs, sharp = ShardSet(make_set([3], kind="pairs", name="p")), ShardSet(make_set([3], name="s"))
    mild = BlurConfig(tiers={name: {"share": float(name == "mild")} for name in TIERS})
    assert [margin_of(each, BlurConfig(), 80) for each in (pairs, sharp)] == [0, 80]
    assert margin_of(sharp, mild, 80) == math.ceil(mild.tiers.mild.extent[1] / 2) < 9
    corners = {
        tuple(box[:2].tolist()) for batch in loader(pairs, batches=400, boxes_per_photo=999) for box in batch["box"]
    }
    seen = np.zeros((64, 64), bool)
    for top, left in corners:
        seen[top : top + 32, left : left + 32] = True
    assert seen.mean() > 0.99
    assert {0, 32} <= {top for top, _ in corners}


def test_an_extent_that_the_set_s_maker_knew_is_in_the_batch(tmp_path):
    facts = [b'{"extent_px": 12.5}', b"[]", b"no json", b'{"extent_px": "?"}']
    with ShardWriter(tmp_path / "set") as writer:
        for number, each in enumerate(facts):
            image = encode_png(picture(number))
            writer.add(f"k{number}", {"sharp.png": image, "blurry.png": image, "json": each})
    batch = next(iter(loader(tmp_path / "set")))
    extents = dict(zip(batch["key"], batch["extent"].tolist(), strict=True))
    assert extents.pop("k0") == 12.5
    assert all(map(math.isnan, extents.values()))
    assert next(validation_pairs(ShardSet(tmp_path / "set"), BlurConfig(), crop=32, margin=0, seed=0))["extent"] == 12.5


def test_a_batch_s_seeds_make_its_pairs_again(make_set):
    batch = next(iter(loader(make_set())))
    for i, seed in enumerate(batch["seed"]):
        photo = decode_image(encode_jpeg(picture(int(batch["key"][i][1:]))))
        plan = plan_pair(photo, tuple(batch["box"][i].tolist()), seed, BlurConfig(), flip=bool(batch["flip"][i]))
        assert np.array_equal(pair_of_plan(plan).blurry, batch["blurry"][i].permute(1, 2, 0).numpy())


def test_equal_keys_in_two_sets_are_blurred_apart(make_set):
    roots = [make_set([4], name="a"), make_set([4], name="b")]
    seeds = {}
    for batch in loader(roots, batches=6):
        for key, source, epoch, seed in zip(*(batch[n] for n in ("key", "source", "epoch", "seed")), strict=True):
            seeds[key, int(epoch), int(source)] = seed
    both = [(key, epoch) for key, epoch, source in seeds if source == 0 and (key, epoch, 1) in seeds]
    assert len(both) > 3
    assert all(seeds[(*each, 0)] != seeds[(*each, 1)] for each in both)


def test_weighted_sources_mix_in_one_stream(make_set):
    roots = [make_set([3], name="a", prefix="a"), make_set([4], name="b", prefix="b", kind="pairs")]
    batches = list(loader(roots, weights=[1, 1], batches=8))
    sources = torch.cat([batch["source"] for batch in batches])
    assert 8 <= int(sources.sum()) <= 24
    assert_same(merged([list(loader(roots, batches=8, rank=rank, world=2)) for rank in range(2)]), batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_pairs_rendered_on_a_device_are_the_workers_pairs_up_to_rounding(make_set, workers):
    roots = [make_set([3], name="a", prefix="a"), make_set([2], name="b", prefix="b", kind="pairs")]
    # JPEG, which a phone always has, rounds 1 code of difference to another block; all else agrees to a code.
    blur = BlurConfig(photometry={"jpeg": {"probability": 0}, "isp": {"share": 0}})
    expected, found = (list(loader(roots, blur, workers=workers, device=device)) for device in (None, "cpu"))
    assert len(found) == len(expected) == 4
    for a, b in zip(expected, found, strict=True):
        assert set(a) == set(b)
        assert torch.equal(a["sharp"], b["sharp"])
        assert (a["blurry"].int() - b["blurry"].int()).abs().max() <= 1
        for name in (*NAMES, "samples_consumed"):
            assert a[name] == b[name]
        for name in ("box", "crop", "flip", "extent"):
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(a["input_psnr"], b["input_psnr"], rtol=0, atol=0.05)


def test_pipeline_is_a_webdataset_pipeline(make_set):
    assert isinstance(loader(make_set()).pipeline, wds.DataPipeline)


def test_waiting_and_pairs_are_counted(make_set):
    stream = loader(make_set())
    list(stream)
    assert stream.pairs == 16
    assert stream.wait_s > 0


# -- bad data ---------------------------------------------------------------------------------------------------------


def test_photographs_smaller_than_the_crop_are_refused_at_once(make_set):
    with pytest.raises(DataError, match=r"sample s000 of 64×64 px is smaller than the crop of 65 px \(5 of 5 are\)"):
        loader(make_set([3, 2]), crop=65)


def test_grey_sixteen_bit_and_transparent_photographs_stream(tmp_path):
    import cv2

    grey = cv2.imencode(".png", picture(1)[..., 0])[1].tobytes()
    deep = cv2.imencode(".png", picture(2).astype(np.uint16) * 257)[1].tobytes()
    clear = cv2.imencode(".png", np.dstack([picture(3), np.full((64, 64), 200, np.uint8)]))[1].tobytes()
    with ShardWriter(tmp_path / "set") as writer:
        for number, data in enumerate((grey, deep, clear, encode_png(picture(4)), encode_jpeg(picture(5)))):
            writer.add(f"k{number}", {"jpg" if data[:2] == b"\xff\xd8" else "png": data})
    assert sum(len(batch["key"]) for batch in loader(tmp_path / "set", batches=3)) == 12


@pytest.mark.parametrize("options", [{"workers": -1}, {"crop": 31}, {"stall_minutes": 0}, {"max_bad_fraction": 1.0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}\n.*should be"):
        StreamConfig(**options)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_holds_the_keys_that_its_type_says(make_set, workers):
    for batch in loader(make_set(), batches=2, workers=workers):
        assert set(batch) == Batch.__required_keys__


# -- ending -----------------------------------------------------------------------------------------------------------


def children() -> set[int]:
    """Processes whose parent is this one or its fork server."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] != "Z":
                found.add((int(fields[1]), int(entry.name)))
    mine = {child for parent, child in found if parent == os.getpid()}
    return {child for parent, child in found if parent in mine}


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="counts processes in /proc")
def test_leaving_the_loop_early_stops_the_workers(make_set):
    before = children()
    for _ in loader(make_set(), workers=2, batches=None):
        assert len(children() - before) == 2
        break
    assert wait_until(lambda: children() - before == set())


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes in /proc")
def test_a_killed_worker_is_one_clear_line(make_set):
    def run() -> None:
        before = children()
        for _ in loader(make_set(), workers=1, batches=None):
            for child in children() - before:
                os.kill(child, signal.SIGKILL)

    with pytest.raises(DataError, match=r"a loader worker died .*lower data\.workers"):
        run()


def wait_until(true, seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.05)
    return true()


SCRIPT = """
import signal
import sys
from data.blur import BlurConfig
from data.shards.set import ShardSet
from data.stream.config import StreamConfig
from data.stream.crops import margin_of
from data.stream.loader import check_bad
from data.stream.loader import PairLoader
assert __name__ == "__main__", "a worker imported the main script"
caught = []
if sys.argv[2] == "handled":
    signal.signal(signal.SIGINT, lambda *_: caught.append(number))
stream = StreamConfig(crop=32, margin=8, workers=2)
try:
    for number, batch in enumerate(PairLoader([ShardSet(sys.argv[1])], BlurConfig(), stream, global_batch=4)):
        if number == 3:
            print("going", flush=True)
        if caught and number == caught[0] + 20:
            print("20 batches later", flush=True)
            break
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.parametrize(("handler", "words"), [("default", "interrupted\n"), ("handled", "20 batches later\n")])
def test_ctrl_c_is_the_main_process_s_to_handle_and_everything_ends(make_set, tmp_path, handler, words):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, str(script), str(make_set()), handler]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    assert process.stdout.readline() == "going\n"
    for _ in range(12):
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
        try:
            out, err = process.communicate(timeout=180 if handler == "handled" else 15)  # all that hold the pipes ended
            break
        except subprocess.TimeoutExpired:
            # Python raises KeyboardInterrupt wherever the main process is, in a destructor too, which swallows it: a
            # user presses again.
            continue
    if handler == "default":
        assert out == words or "KeyboardInterrupt" in err
        return
    assert out == words
    assert "Traceback" not in err
    assert process.returncode == 0


KILLED = """
import sys
from data.blur import BlurConfig
from data.shards.set import ShardSet
from data.stream.config import StreamConfig
from data.stream.crops import margin_of
from data.stream.loader import check_bad
from data.stream.loader import PairLoader
stream = StreamConfig(crop=32, margin=8, workers=2)
for number, batch in enumerate(PairLoader([ShardSet(sys.argv[1])], BlurConfig(), stream, global_batch=4)):
    if number == 3:
        print("going", flush=True)
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes in /proc")
def test_workers_end_when_their_main_process_is_killed(make_set):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-c", KILLED, str(make_set())]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    assert process.stdout.readline() == "going\n"
    process.kill()
    process.wait()

    def group_is_gone() -> bool:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return True
        return False

    assert wait_until(group_is_gone, 60)


# -- validation -------------------------------------------------------------------------------------------------------


def test_a_worker_leaves_the_threads_to_the_others(monkeypatch):
    before = cv2.getNumThreads()
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process is no worker
    try:
        cv2.setNumThreads(3)
        init_worker()
        assert cv2.getNumThreads() == 1  # OpenCV's answer after setNumThreads(0): no pool
    finally:
        cv2.setNumThreads(before)
