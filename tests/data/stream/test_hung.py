"""A loader that hangs is no endless wait: it ends in one line that says what each worker is doing."""

import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from multiprocessing import connection
from pathlib import Path

import pytest
import torch

from data.blur import BlurConfig
from data.errors import DataError
from data.shards.set import ShardSet
from data.stream.config import StreamConfig
from data.stream.hung import describe
from data.stream.loader import PairLoader, make_folder
from tests.data.stream.hanging import sleep_at_second_batch
from tests.train.small_sets import small_set


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return small_set(tmp_path_factory.mktemp("hung") / "set", "train", 3)


def loader(photographs, **changes) -> PairLoader:
    stream = StreamConfig(crop=64, margin=16, workers=2)
    return PairLoader([ShardSet(photographs)], BlurConfig(), stream, global_batch=2, batches=40, **changes)


def begun(pairs: PairLoader, stall_s: float) -> tuple[Iterator[dict], list]:
    """The stream after its first batch, which waits for workers to start, and the workers."""
    batches = iter(pairs)
    next(batches)
    pairs.stall_s = stall_s
    return batches, torch.multiprocessing.active_children()


def test_a_worker_that_sleeps_is_described_with_its_stack_and_sample(photographs):
    batches, _ = begun(loader(photographs, attach=sleep_at_second_batch), stall_s=1.0)
    with pytest.raises(DataError) as caught:
        list(batches)
    text = str(caught.value)
    assert text.startswith("no batch came for 1 s: worker 0 (process ")
    assert "sleep_at_second_batch" in text
    assert "sample photo_" in text
    assert "data.stall_minutes" in text
    assert not torch.multiprocessing.active_children()


def test_stopped_workers_are_named_and_ended(photographs):
    batches, workers = begun(loader(photographs), stall_s=1.0)
    for worker in workers:
        os.kill(worker.pid, signal.SIGSTOP)
    with pytest.raises(DataError) as caught:
        list(batches)
    for worker in workers:
        line = str(caught.value).partition(f"(process {worker.pid}) ")[2].partition(";")[0]
        assert "is stopped by a signal" in line  # also where it had not come to its first sample
    assert not torch.multiprocessing.active_children()


def test_a_worker_that_stops_while_it_hands_a_batch_over_is_no_endless_wait(photographs, monkeypatch):
    """The batch was announced, but its memory is asked of the worker: torch waits there without a timeout."""
    pairs = loader(photographs)
    batches, workers = begun(pairs, stall_s=1.0)
    pairs.look_s = 0.5

    def asked(*_) -> None:
        connection.wait([worker.sentinel for worker in workers], timeout=30)  # without a guard it ends red, not never
        raise EOFError

    monkeypatch.setattr("torch.multiprocessing.reductions.rebuild_storage_fd", asked)
    for worker in workers:
        os.kill(worker.pid, signal.SIGSTOP)
    with pytest.raises(DataError, match=r"no batch came for 1 s: worker 0 .* is stopped by a signal"):
        list(batches)
    assert not torch.multiprocessing.active_children()


def test_a_wait_that_ends_in_time_is_no_failure(photographs):
    batches, workers = begun(loader(photographs), stall_s=60.0)
    for worker in workers:
        os.kill(worker.pid, signal.SIGSTOP)
    timer = threading.Timer(6.0, lambda: [os.kill(worker.pid, signal.SIGCONT) for worker in workers])
    timer.start()  # after one look at least
    assert len(list(batches)) == 39


def test_signals_of_a_scheduler_do_not_end_workers(photographs):
    batches, workers = begun(loader(photographs), stall_s=60.0)
    for worker in workers:
        for name in ("TERM", "USR1", "USR2", "INT"):
            subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    assert len(list(batches)) == 39
    assert not torch.multiprocessing.active_children()


def test_workers_end_when_the_main_process_ends_them(photographs):
    batches, workers = begun(loader(photographs), stall_s=60.0)
    next(batches)  # of the second worker: one that is still starting is deaf to the signal
    for worker in workers:
        worker.terminate()
        worker.join(30)
        assert worker.exitcode is not None
    batches.close()


def test_a_process_that_is_gone_is_said_to_be(tmp_path):
    assert describe(tmp_path, [2**22 + 1]) == f"worker 0 (process {2**22 + 1}) is gone"


def test_folders_of_killed_processes_are_removed_and_held_ones_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder, held = make_folder()
    left = tmp_path / "sharpprior-loader-left"
    left.mkdir()
    for path in (left, Path(folder)):
        os.utime(path, (1, 1))
    other, held_too = make_folder()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(Path(path).name for path in (folder, other))
    os.close(held)
    os.close(held_too)
