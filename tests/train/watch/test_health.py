"""Health check before training and traces during it: what is slow or wrong is named, in files that do not grow."""

import json
import types

import pytest
import torch

from train.watch import health, traces
from train.watch.health import Health, check_numbers, matmul_seconds, slow_lines
from train.watch.traces import WINDOW, Traces, memory_mib

CPU = torch.device("cpu")


def test_a_slow_rank_is_named_with_its_host():
    ranks = [
        Health(rank, f"node{rank // 2}", seconds, 0.0) for rank, seconds in enumerate([0.010, 0.011, 0.012, 0.025])
    ]
    (line,) = slow_lines(ranks)
    assert "rank 3 on node1 takes 25.00 ms" in line
    assert slow_lines(ranks[:3]) == []


def test_a_device_that_computes_nonsense_is_an_error(monkeypatch):
    assert matmul_seconds(CPU) > 0
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: torch.full_like(b, 3.0))
    with pytest.raises(ValueError, match="a matrix product came out wrong"):
        matmul_seconds(CPU)


def test_numbers_that_arrive_wrong_are_named():
    right = torch.arange(10.0)
    check_numbers("an all-reduce", right, right.clone())
    wrong = right.clone()
    wrong[7] = 4
    with pytest.raises(ValueError, match=r"an all-reduce .* 4.0 instead of 7.0 at 7 \(1 of 10 differ\)"):
        check_numbers("an all-reduce", wrong, right)


@pytest.mark.parametrize("broken", ["all-reduce", "broadcast"])
def test_collectives_that_deliver_nothing_are_found(monkeypatch, broken):
    def sums(numbers):
        if broken != "all-reduce":
            numbers.mul_(2).add_(1)  # of ranks 0 and 1

    stub = types.SimpleNamespace(all_reduce=sums, barrier=lambda: None, broadcast=lambda numbers, source: None)
    monkeypatch.setattr(health, "dist", stub)
    with pytest.raises(ValueError, match=f"{broken}.* of known numbers arrived wrong"):
        health._check_collectives(types.SimpleNamespace(device=CPU, rank=0, world=2))


def step(one: Traces, compute: list[float], wait: list[float]) -> list[str]:
    one.begin()
    one.end(0.0)
    one.take([*compute, *wait])
    return one.slow_ranks()


def test_a_rank_that_keeps_the_others_waiting_is_named_once(tmp_path):
    one = Traces(tmp_path, 0, 3, CPU)
    lines = [line for _ in range(3 * WINDOW) for line in step(one, [0.1, 0.3, 0.11], [0.0, 0.0, 0.05])]
    assert len(lines) == 2
    assert lines[0].startswith("rank 1 computes 300 ms a step, the median of the ranks is 110 ms")
    assert lines[1].startswith("rank 2 waits for data 50 ms a step")
    assert [line for _ in range(WINDOW) for line in step(one, [0.1, 0.1, 0.11], [0.0, 0.0, 0.0])] == []
    again = [line for _ in range(WINDOW) for line in step(one, [0.1, 0.3, 0.11], [0.0, 0.0, 0.0])]
    assert len(again) == 1


def test_waits_that_nobody_notices_are_no_slowness(tmp_path):
    one = Traces(tmp_path, 0, 2, CPU)
    assert [line for _ in range(2 * WINDOW) for line in step(one, [0.1, 0.12], [0.0001, 0.001])] == []


def test_own_seconds_ride_in_own_places(tmp_path):
    one = Traces(tmp_path, 1, 3, CPU)
    one.begin()
    one.end(0.25)
    one.take([0.0] * 6)
    flags = one.flags()
    assert flags[4] == 0.25
    assert flags[1] == one.compute_s > 0
    assert [flags[place] for place in (0, 2, 3, 5)] == [0.0] * 4


def test_a_trace_is_bounded_and_keeps_the_newest(tmp_path, monkeypatch):
    monkeypatch.setattr(traces, "LIMIT_BYTES", 2000)
    one = Traces(tmp_path, 2, 3, CPU)
    for number in range(200):
        one.write(number, 0.5, 0.1)
    files = sorted(path.name for path in (tmp_path / "traces").iterdir())
    assert files == ["rank-2.1.jsonl", "rank-2.jsonl"]
    rows = [json.loads(line) for name in files for line in (tmp_path / "traces" / name).read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(200 - len(rows), 200))
    assert len(rows) > 15
    assert rows[-1]["rss"] > 10
    assert sum((tmp_path / "traces" / name).stat().st_size for name in files) < 5000


def test_memory_counts_loader_workers_apart():
    before = memory_mib(CPU)
    assert before["rss"] > 10
    assert before["rss_workers"] >= 0
    assert "gpu_peak" not in before
