"""torch.compile of the composed forms: one graph for each signature of inputs, never a silent run without a graph."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def run(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Call `function` (tensors, and sequences of tensors or plain values in any order) through torch.compile.

    Shapes are static: every new signature compiles, which takes seconds. Inside a graph that is being compiled the
    function is simply part of it. Raises what torch.compile raises, such as for a missing compiler.
    """
    if torch.compiler.is_compiling():
        return function(*arguments)
    return _compiled(function, _signature(arguments), torch.is_grad_enabled())(*arguments)


def _signature(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype, value.device, value.requires_grad)
    if isinstance(value, (tuple, list)):
        return tuple(map(_signature, value))
    return value


@functools.lru_cache(maxsize=256)
def _compiled(function: Callable, signature: Any, grad: bool) -> Callable:
    # Dynamo counts compilations by code object and, past a limit, would refuse the next: each has a copy of its own.
    own = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    return torch.compile(own, fullgraph=True, dynamic=False)
