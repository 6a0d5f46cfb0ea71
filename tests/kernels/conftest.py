"""Fixtures of the kernel tests. The same tests run twice: here with the PyTorch reference, and in a second process with
TRITON_INTERPRET=1 with the Triton kernels (test_lanes.py starts it)."""

import pytest
import torch

from kernels.runtime import INTERPRETING


@pytest.fixture
def impl() -> str:
    """The implementation under test in this process."""
    return "triton" if INTERPRETING else "reference"


@pytest.fixture
def poisoned():
    """Memory from torch.empty holds NaN: an element that nobody writes shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def fences(monkeypatch):
    """Every torch.empty buffer lies between two fences; the returned function fails if one was overwritten."""
    made, plain, margin = [], torch.empty, 64

    def fenced(*size, **options):
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        layout = options.pop("memory_format", torch.contiguous_format)
        count = torch.Size(shape).numel()
        store = plain(count + 2 * margin, **options).fill_(12345)
        made.append(store)
        inner = store[margin : margin + count]
        if layout == torch.channels_last:
            B, C, H, W = shape
            return inner.view(B, H, W, C).permute(0, 3, 1, 2)
        return inner.view(torch.Size(shape))

    def check():
        assert made, "nothing was allocated through torch.empty"
        for store in made:
            assert bool((store[:margin] == 12345).all() and (store[-margin:] == 12345).all()), "written out of bounds"

    monkeypatch.setattr(torch, "empty", fenced)
    return check
