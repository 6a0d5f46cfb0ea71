"""Microbenchmarks of the kernels, forward + backward: `pytest --benchmark-only tests/benchmarks/test_kernels.py`.

CPU rows measure what a machine without a GPU really runs. GPU rows need a GPU and are skipped without one; the full GPU
report is `python -m kernels.bench`. extra_info holds the ratio of two things timed in the same run.
"""

import ctypes
import gc
import threading
import time

import psutil
import pytest
import torch

from kernels.aggregation.reference import composed_aggregation
from kernels.attention.algebra import Weights
from kernels.attention.reference import composed_attention
from kernels.cases import aggregation_case, attention_case, call_aggregation, call_attention

GPU = pytest.param("triton", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="Triton rows need a GPU"))
LEVELS = [(64, 64), (32, 32), (16, 16), (8, 8)]


def step(function, inputs):
    """One forward and backward over all inputs with a ready upstream gradient, synchronised."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    upstream = torch.ones_like(function(leaves).detach())

    def run():
        torch.autograd.grad(function(leaves), leaves, upstream)
        if upstream.is_cuda:
            torch.cuda.synchronize()

    return run


def peak_mib(run, device: str) -> float:
    """Memory that one step takes above what was there before, in MiB: allocator (GPU) or sampled RSS (CPU)."""
    run()
    gc.collect()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # freed heap that the process still holds would hide the peak
    process, samples, done = psutil.Process(), [], threading.Event()

    def watch():
        while not done.is_set():
            samples.append(process.memory_info().rss)
            time.sleep(2e-4)

    watcher = threading.Thread(target=watch)
    before = process.memory_info().rss
    watcher.start()
    run()
    done.set()
    watcher.join()
    return (max(samples) - before) / 2**20


def compare(benchmark, baseline, tested, device: str) -> None:
    """Times both, interleaved; the ratio of medians and both peaks go to extra_info."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        baseline()
        times.append(time.perf_counter() - start)
    benchmark.pedantic(tested, rounds=7, warmup_rounds=2)
    seconds = sorted(times)[len(times) // 2]
    benchmark.extra_info.update(
        composed_ms=round(seconds * 1e3, 2),
        ratio=round(seconds / benchmark.stats.stats.median, 2),
        peak_mib=round(peak_mib(tested, device), 1),
        composed_peak_mib=round(peak_mib(baseline, device), 1),
    )
    print(f"\n  {benchmark.name}: {benchmark.extra_info}")


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("impl", ["reference", GPU])
def test_attention_forward_backward(benchmark, impl, channels_last):
    """C = D = 64, 128², batch 4: Gram form against the composed form of semantic attention."""
    device = "cuda" if impl == "triton" else "cpu"
    dtype = torch.bfloat16 if impl == "triton" else torch.float32
    case = attention_case((4, 64, 128, 128), 64, 2, dtype=dtype, device=device, channels_last=channels_last)
    inputs = [case[0], case[1], *case[2]]
    composed = step(lambda t: composed_attention(t[0], t[1], Weights(*t[2:])), inputs)
    tested = step(lambda t: call_attention(t[0], t[1], Weights(*t[2:]), impl=impl), inputs)
    compare(benchmark, composed, tested, device)


@pytest.mark.parametrize("impl", ["reference", GPU])
def test_aggregation_forward_backward(benchmark, impl):
    """Four levels to 128², D = 64, G = 4, batch 4: aggregation against F.interpolate, softmax and sum."""
    device = "cuda" if impl == "triton" else "cpu"
    dtype = torch.bfloat16 if impl == "triton" else torch.float32
    values, logits = aggregation_case(4, 64, 4, LEVELS, dtype=dtype, device=device)
    composed = step(lambda t: composed_aggregation(t[:4], t[4:], (128, 128)), [*values, *logits])
    tested = step(lambda t: call_aggregation(t[:4], t[4:], (128, 128), impl=impl), [*values, *logits])
    compare(benchmark, composed, tested, device)
