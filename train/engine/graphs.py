"""Forward and backward pass of a network as two CUDA graphs a call signature: one launch each in place of thousands.

A step of small batches waits for launches, not for the GPU (measured: 17 of 91 ms were work). The passes have static
shapes, so they are captured once and replayed. To autograd a replayed call is one node whose inputs are the trained
parameters: their gradients arrive as ever, and with them DeepSpeed's hooks, accumulation and reductions.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from train.engine.capture import Captured, Recorder
from train.log import log

EAGER_CALLS = 3  # of a signature, before it is captured: they warm up its kernels, and their parts can be timed
WARM_UP = 2  # passes on the capture's own stream
MOST_SIGNATURES = 4  # that are captured; each keeps memory of its own for inputs, outputs and gradients
MOST_MOVES = 3  # captures of one signature because its parameters moved
ALIGNED = 32  # elements: where a gradient may start in the memory that is handed out


class NotCapturedError(RuntimeError):
    """A call cannot be captured; the message says why."""


class Graphs:
    """Replays a module's training calls: `module.forward` goes through it from now on; hooks of the module itself stay
    outside.

    A signature is the inputs' shapes, types and layouts, the keywords, training or not, and autocast. Its first
    `eager_calls` calls run eagerly. Calls without grad mode (evaluation) always do. trained: whether gradients are
    wanted, else the forward pass alone is captured (a frozen teacher).
    strict: what cannot be captured is an error, not eager. tell: say what happens, on one rank. agree: a rank's reason
    or None → the first reason of all ranks: they replay together or not at all, because the order in which gradients
    arrive decides what shares a bucket.
    recording: whether the module's code is being recorded now, and what it tells is no step.
    """

    def __init__(
        self,
        module: nn.Module,
        recorder: Recorder,
        *,
        what: str = "network",
        trained: bool = True,
        strict: bool = False,
        eager_calls: int = EAGER_CALLS,
        tell: bool = True,
        agree: Callable[[str | None], str | None] = lambda reason: reason,
    ) -> None:
        self.module, self.recorder, self.what, self.trained = module, recorder, what, trained
        self.plain: Callable[..., Any] = module.forward
        self.recording = False
        self.replays = 0
        self.newest: object = None  # the ticket of the forward pass whose intermediate results are still there
        self._strict, self._eager_calls, self._tell, self._agree = strict, eager_calls, tell, agree
        self._seen: Counter[tuple] = Counter()
        self._calls: dict[tuple, _Call] = {}
        self._moves: Counter[tuple] = Counter()
        self._used: dict[tuple, dict[int, tuple[int, ...]]] = {}
        self._off = self._full = False
        module.forward = self._forward

    def _forward(self, *inputs: Any, **keywords: Any) -> Any:
        if self._off or not torch.is_grad_enabled():
            return self.plain(*inputs, **keywords)
        key = self._signature(inputs, keywords)
        if (call := self._calls.get(key)) is None:
            if self._full:
                return self.plain(*inputs, **keywords)
            if self._seen[key] < self._eager_calls:
                self._seen[key] += 1
                return self._watched(key, self.plain(*inputs, **keywords))
            if len(self._calls) == MOST_SIGNATURES:
                self._full = True
                self._say(f"more than {MOST_SIGNATURES} shapes of calls: the others run eagerly")
                return self.plain(*inputs, **keywords)
            call = self._first_capture(key, inputs, keywords)
            if call is None:
                return self.plain(*inputs, **keywords)
        elif call.moved():
            call = self._capture_again(key, inputs, keywords)
        self.replays += 1
        return call(inputs)

    def forget(self) -> None:
        """Between two steps: capture anew from here on, because other parts of the module learn than until now."""
        for kept in (self._seen, self._calls, self._moves, self._used):
            kept.clear()
        self._full, self.newest = False, None
        self.recorder.renew()

    def _watched(self, key: tuple, result: Any) -> Any:
        """The result of an eager call, whose backward pass tells which tensors of it get gradients of which strides."""
        used = self._used[key] = {}
        leaves, form = tree_flatten(result)
        for place, tensor in enumerate(_tensors(leaves)):
            if tensor.requires_grad:
                alias = tensor.view_as(tensor)  # of its own: a tensor inside the network has a gradient anyway
                alias.register_hook(lambda gradient, place=place: used.update({place: gradient.stride()}))
                leaves = [alias if leaf is tensor else leaf for leaf in leaves]
        return tree_unflatten(leaves, form)

    def _first_capture(self, key: tuple, inputs: tuple, keywords: dict) -> _Call | None:
        """The captured call, or None on every rank where one could not."""
        reason, call = None, None
        try:
            call = self._capture(key, inputs, keywords)
        except Exception as error:  # whatever torch, a kernel or a driver says
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            if isinstance(error, NotCapturedError):
                reason = str(error)
        reason = self._agree(reason)
        if reason is not None:
            self._off = True
            self._calls.clear()
            self._say(reason)
            return None
        self._calls[key] = call
        if self._tell:
            log.info("%s: replayed as CUDA graphs from here on: %s", self.what, _described(inputs, keywords))
        return call

    def _capture_again(self, key: tuple, inputs: tuple, keywords: dict) -> _Call:
        """For parameters that moved in memory. Not asked of the other ranks: they stay with their graphs."""
        self._moves[key] += 1
        if self._moves[key] > MOST_MOVES:
            raise RuntimeError(f"{self.what}: its parameters move in memory again and again: set engine.graphs to off")
        if self._tell:
            log.warning("%s: its parameters moved in memory: CUDA graphs are captured again", self.what)
        self._calls[key] = call = self._capture(key, inputs, keywords)
        return call

    def _capture(self, key: tuple, inputs: tuple, keywords: dict) -> _Call:
        self._refuse_hooks()
        with self.quiet(), kept_buffers(self.module), _kept_generators(inputs):
            return _Call(self, inputs, keywords, self._used.get(key))

    def _refuse_hooks(self) -> None:
        """A hook runs while it is captured, and never again."""
        for name, part in self.module.named_modules():
            own = [] if part is self.module else [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
            own += [*part._backward_hooks.values(), *part._backward_pre_hooks.values()]
            if any(not getattr(hook, "may_rest", False) for hook in own):
                raise NotCapturedError(f"{name or 'the network'} has a hook, which replays would not call")
        for name, parameter in self.module.named_parameters():
            if parameter._backward_hooks:
                raise NotCapturedError(f"the gradient of {name} has a hook, which the capture would call")

    def _signature(self, inputs: tuple, keywords: dict) -> tuple:
        facts = tuple(
            (x.shape, x.stride(), x.dtype, x.device, x.requires_grad) if isinstance(x, Tensor) else x for x in inputs
        )
        return facts, tuple(sorted(keywords.items())), self.module.training, _autocast_state(_device(inputs))

    def _say(self, reason: str) -> None:
        if self._strict:
            raise ValueError(f"engine.graphs on: {self.what}: {reason}; set it to auto, or mend that")
        if self._tell:
            log.warning("%s: no CUDA graphs: %s", self.what, reason)

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """What runs in the block is no step that anyone measures."""
        before, self.recording = self.recording, True
        try:
            yield
        finally:
            self.recording = before


class _Call:
    """One captured signature. Values go in and out by copies: what the caller holds is never overwritten.

    strides: of the gradients of those tensors of the result that get one, by their place, as the eager calls showed
    (None: all that may, laid out as the results). Zeros in place of none, or another layout, would make sums go through
    memory in another order, and give other last bits.
    """

    def __init__(
        self, owner: Graphs, inputs: tuple, keywords: dict, strides: dict[int, tuple[int, ...]] | None
    ) -> None:
        self.owner, self.keywords, self._strides = owner, keywords, strides
        device = _device(inputs)
        enabled, dtype = _autocast_state(device)
        # Weights cast by autocast are not kept between captures: the copies would lie in memory that is used again.
        self._autocast = lambda: torch.autocast(device.type, dtype, enabled=enabled, cache_enabled=False)
        self._placed = [
            _like(x).copy_(x.detach()).requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in inputs
        ]
        self._memory = _addresses(owner.module)
        places = [i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.requires_grad] if owner.trained else []
        parameters = [p for p in owner.module.parameters() if p.requires_grad] if owner.trained else []
        self._surface: list[Tensor] = [*(self._placed[place] for place in places), *parameters]
        self._results: list[Tensor] = []
        with owner.recorder.side():
            for _ in range(WARM_UP):
                self._run_forward()
                self._gradient_places()
                gradients = self._run_backward()
        # Those without a gradient are no inputs of the node: autograd, and DeepSpeed's hooks, never hear of them.
        reached = [gradient is not None for gradient in gradients]
        self._surface = [x for x, there in zip(self._surface, reached, strict=True) if there]
        self._input_places = [i for i, there in zip(places, reached, strict=False) if there]
        self._parameters = [p for p, there in zip(parameters, reached[len(places) :], strict=True) if there]
        self._others = [p for p, there in zip(parameters, reached[len(places) :], strict=True) if not there]
        del gradients
        self._results = self._leaves = []  # of the warm-up: nothing is freed while capturing
        self._outputs: Captured = owner.recorder.capture(self._run_forward)
        self._gradient_places()
        self._gradients: Captured | None = owner.recorder.capture(self._run_backward) if self._surface else None
        self._differentiable = [tensor.requires_grad for tensor in self._results]
        # What led to them would tie the parameters' gradients to the capture's stream.
        self._leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        self._results = []
        self._fresh = _FreshMemory(self._gradients.tensors if self._gradients is not None else [])

    # -- what is captured ---------------------------------------------------------------------------------------------

    def _run_forward(self) -> list[Tensor | None]:
        with torch.set_grad_enabled(self.owner.trained), self._autocast():
            self._leaves, self._form = tree_flatten(self.owner.plain(*self._placed, **self.keywords))
        self._results = _tensors(self._leaves)
        return [tensor.detach() for tensor in self._results]

    def _gradient_places(self) -> None:
        """Where gradients of the results are put before the backward pass."""
        strides = self._strides
        if strides is None:
            strides = {place: x.stride() for place, x in enumerate(self._results) if x.requires_grad}
        self._given = {place: _memory(self._results[place], strides[place]) for place in sorted(strides)}
        self.used = set(strides)

    def _run_backward(self) -> list[Tensor | None]:
        results = [self._results[place] for place in self._given]
        if not results or not self._surface:
            return [None] * len(self._surface)
        return list(torch.autograd.grad(results, self._surface, list(self._given.values()), allow_unused=True))

    # -- replaying ----------------------------------------------------------------------------------------------------

    def moved(self) -> bool:
        """Whether a parameter or buffer lies elsewhere than when it was captured, or is trained now and was not."""
        return self._memory != _addresses(self.owner.module)

    def __call__(self, inputs: tuple) -> Any:
        if self._gradients is None:
            values = self.replayed_forward(inputs)
        else:
            wanted = [inputs[place] for place in self._input_places]
            values = _Replayed.apply(self, inputs, *wanted, *self._parameters)
        values = iter(values)
        leaves = [next(values) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        return tree_unflatten(leaves, self._form)

    @torch.no_grad()
    def replayed_forward(self, inputs: tuple) -> list[Tensor]:
        """Fresh results of the inputs."""
        self._place(inputs)
        with self.owner.quiet():
            self._outputs.replay()
        return [_like(value).copy_(value) for value in self._outputs.tensors]

    @torch.no_grad()
    def replayed_backward(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """Fresh gradients of the surface; the graph's own memory is overwritten by the next replay, while autograd may
        keep what it is given as a parameter's `grad`, and DeepSpeed in its buckets."""
        for place, memory in self._given.items():
            memory.copy_(gradients[place])
        with self.owner.quiet():
            self._gradients.replay()
        return self._fresh.copies(self._gradients.tensors)

    def computed_again(self, inputs: tuple, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The same gradients from an eager pass, where a later call's replay has taken the memory of this one's, or
        other results are used than when it was captured."""
        inputs = tuple(x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in inputs)
        with self.owner.quiet(), kept_buffers(self.owner.module), torch.enable_grad(), self._autocast():
            results = _tensors(tree_flatten(self.owner.plain(*inputs, **self.keywords))[0])
            pairs = [(t, g) for t, g in zip(results, gradients, strict=True) if g is not None and t.requires_grad]
            surface = [*(inputs[place] for place in self._input_places), *self._parameters]
            used, given = zip(*pairs, strict=True)
            found = torch.autograd.grad(used, [*surface, *self._others], given, allow_unused=True)
        if any(gradient is not None for gradient in found[len(surface) :]):
            raise RuntimeError(
                f"{self.owner.what}: a loss reaches parameters that none reached when CUDA graphs were captured: set "
                "engine.graphs to off"
            )
        return list(found[: len(surface)])

    def _place(self, inputs: tuple) -> None:
        for place, value in zip(self._placed, inputs, strict=True):
            if isinstance(place, Tensor):
                place.detach().copy_(value)

    def marked(self, values: list[Tensor]) -> list[Tensor]:
        """Those of the results that have no gradient."""
        return [value for value, wanted in zip(values, self._differentiable, strict=True) if not wanted]


class _Replayed(torch.autograd.Function):
    """A replayed call, whose inputs are what gets a gradient: inputs that want one, and trained parameters."""

    @staticmethod
    def forward(ctx: Any, call: _Call, inputs: tuple, *surface: Tensor) -> tuple[Tensor, ...]:
        values = call.replayed_forward(inputs)
        ctx.call, ctx.inputs = call, inputs
        ctx.ticket = call.owner.newest = object()
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*call.marked(values))
        return tuple(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        call, owner = ctx.call, ctx.call.owner
        used = {place for place, gradient in enumerate(gradients) if gradient is not None}
        if owner.newest is ctx.ticket and used == call.used:
            owner.newest = None  # its intermediate results are used up
            return None, None, *call.replayed_backward(gradients)
        return None, None, *call.computed_again(ctx.inputs, gradients)


class _FreshMemory:
    """Copies of many tensors by one allocation and few launches a type."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._sizes: dict[torch.dtype, int] = {}
        self._places: list[tuple[torch.dtype, tuple, tuple, int]] = []
        for tensor in tensors:
            start = self._sizes.get(tensor.dtype, 0)
            dense = torch.empty(tensor.shape, device="meta").stride()
            self._places.append((tensor.dtype, tuple(tensor.shape), dense, start))
            self._sizes[tensor.dtype] = start + -(-tensor.numel() // ALIGNED) * ALIGNED

    def copies(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies of tensors shaped like those given at first, each dense."""
        device = tensors[0].device
        whole = {dtype: torch.empty(size, dtype=dtype, device=device) for dtype, size in self._sizes.items()}
        fresh = [whole[dtype].as_strided(shape, stride, start) for dtype, shape, stride, start in self._places]
        torch._foreach_copy_(fresh, list(tensors))
        return fresh


@contextlib.contextmanager
def kept_buffers(module: nn.Module) -> Iterator[None]:
    """Buffers that the block changed (running statistics) are as before afterwards."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                if not torch.equal(buffer, value):  # written where it must be: a pending backward pass may need it
                    buffer.copy_(value)


@contextlib.contextmanager
def _kept_generators(inputs: tuple) -> Iterator[None]:
    device = _device(inputs)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def _device(inputs: tuple) -> torch.device:
    return next(x.device for x in inputs if isinstance(x, Tensor))


def _autocast_state(device: torch.device) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)


def _addresses(module: nn.Module) -> list[tuple[int, bool]]:
    found = [(p.data_ptr(), p.requires_grad) for p in module.parameters()]
    return found + [(b.data_ptr(), False) for b in module.buffers()]


def _tensors(leaves: Sequence[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _like(tensor: Tensor) -> Tensor:
    """Memory with the same strides, gaps included: reductions of it go through the elements in the same order."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def _memory(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Zeros like a tensor, with these strides where its elements then have a place each (an expanded gradient has
    fewer)."""
    largest = sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
    expanded = any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, strides, strict=True))
    if expanded or largest + 1 != tensor.numel():
        return torch.zeros_like(tensor)
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).zero_()


def _described(inputs: tuple, keywords: dict) -> str:
    shapes = ["×".join(map(str, x.shape)) for x in inputs if isinstance(x, Tensor)]
    return ", ".join([*shapes, *(f"{name} {value}" for name, value in keywords.items())])
