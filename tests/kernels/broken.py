"""Kernels broken on purpose. A process that judges imports this by SHARPPRIOR_CHECK_PRELOAD; BROKEN names the faults,
with commas between. The faults are Triton kernels, or happen where one has run."""

import os
import signal
import time

import torch
import triton
import triton.language as tl

import kernels.aggregation.triton as aggregation
import kernels.attention.triton as attention

calls = 0


@triton.jit
def negate(target, count, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    tl.store(target + offsets, -tl.load(target + offsets, mask=mask, other=0.0), mask=mask)


@triton.jit
def add(target, amount):
    tl.store(target, tl.load(target) + amount)


@triton.jit
def add_nothing_of(target, scratch):
    tl.store(target, tl.load(target) + 0.0 * tl.load(scratch))


@triton.jit
def stray(target, count):
    tl.store(target + count + 3, 1.0)


def wrong_sign(dp):
    negate[(triton.cdiv(dp.numel(), 256),)](dp, dp.numel(), BLOCK=256)


def race(y):
    """Far below every tolerance: only that two calls differ tells."""
    global calls
    calls += 1
    add[(1,)](y, 1e-6 * calls)


def store_out_of_bounds(y):
    stray[(1,)](y, y.numel())


def unwritten(out):
    """Depends on memory that nobody wrote."""
    add_nothing_of[(1,)](out, torch.empty(4, device=out.device))


def die_by_width(y):
    """16 channels die by a signal, 24 abort, 32 hang."""
    match y.shape[1]:
        case 16:
            os.kill(os.getpid(), signal.SIGSEGV)
        case 24:
            os.abort()
        case 32:
            time.sleep(600)


# Module and pass that a fault follows, and the fault: it is given the pass's last argument, which is a result.
FAULTS = {
    "wrong_sign": (attention, "gradient_pass", wrong_sign),
    "race": (attention, "apply_pass", race),
    "out_of_bounds": (attention, "apply_pass", store_out_of_bounds),
    "unwritten": (aggregation, "forward_pass", unwritten),
    "raises": (attention, "apply_pass", lambda y: [][0]),
    "die_by_width": (attention, "apply_pass", die_by_width),
}


def break_kernels(names, put=setattr):
    """Let the named faults follow their passes; `put` sets an attribute, as monkeypatch.setattr does."""
    for module, name, fault in map(FAULTS.__getitem__, names):
        put(module, name, _followed(getattr(module, name), fault))


def _followed(plain, fault):
    def broken(*arguments):
        returned = plain(*arguments)
        fault(arguments[-1])
        return returned

    return broken


if "BROKEN" in os.environ:
    break_kernels(os.environ["BROKEN"].split(","))
