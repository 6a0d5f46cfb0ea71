"""Accelerate + DeepSpeed: one process per rank, ZeRO 0–3, with or without a GPU, and nothing else in between.

Facts this file rests on (measured with accelerate 1.15, deepspeed 0.19.8): `--cpu` turns DeepSpeed off without a word;
a single process started without RANK makes DeepSpeed ask for mpi4py; without an explicit gloo backend every CPU rank
believes that it is alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.config.schema import Config
from train.engine.capture import RECORDERS
from train.engine.graphs import EAGER_CALLS, Graphs
from train.engine.launch import settle, world_size
from train.engine.network import shape_network
from train.engine.precision import autocast, refuse_precision, use_sixteen_bit_parameters
from train.engine.ranks import meet, my_facts
from train.engine.settings import bucket_elements, deepspeed_settings, parameter_groups
from train.log import log

LET_GO_S = 0.2


def set_launch_defaults() -> list[str]:
    """Environment of this process as its launcher (or none) means it; what of it is not used, and why."""
    return settle(os.environ, torch.cuda.device_count() if torch.cuda.is_available() else 0)


class Engine:
    """The ranks of a run, and (after `wrap`) the trained module on them.

    rank, world, device: this process's place. ranks: what every rank is. unused: settings of the launcher that are not
    used, and why. module: the trained nn.Module itself. engine: DeepSpeed's engine.
    """

    def __init__(self, config: Config) -> None:
        gpu = torch.cuda.is_available()
        self.unused = set_launch_defaults()
        settings = deepspeed_settings(config, world_size())
        # Before the libraries below, which take seconds to load: a rank that is missing or unlike is told at once.
        self.ranks = meet(my_facts(_digest(config)), world_size(), timedelta(minutes=config.engine.timeout_minutes))
        import deepspeed.ops
        from accelerate import Accelerator
        from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs
        from deepspeed.utils import logger as deepspeed_logger

        deepspeed_logger.setLevel(logging.WARNING)
        # DeepSpeed still calls collectives by names that newer torch versions announce to drop: not the user's to mend.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")
        if not gpu:
            # It only speeds up collectives inside a node, and needs a compiler at run time.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.config = config
        self._accelerator = Accelerator(
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings, zero3_init_flag=False),
            kwargs_handlers=[
                InitProcessGroupKwargs(
                    backend="nccl" if gpu else "gloo", timeout=timedelta(minutes=config.engine.timeout_minutes)
                )
            ],
        )
        self.rank: int = self._accelerator.process_index
        self.world: int = self._accelerator.num_processes
        self.device: torch.device = self._accelerator.device
        if self.world != world_size():
            raise RuntimeError(f"the launcher announced {world_size()} ranks, {self.world} came together")
        if not gpu:
            local = int(os.environ["LOCAL_WORLD_SIZE"])
            torch.set_num_threads(config.engine.cpu_threads or max(1, len(os.sched_getaffinity(0)) // local))
        refuse_precision(config.engine, self.device)
        if config.engine.graphs == "on" and self.device.type not in RECORDERS:
            raise ValueError("engine.graphs on: CUDA graphs need a GPU, and this is a CPU: set it to auto")
        self.engine: Any = None
        self.graphs: Graphs | None = None  # of the trained module, where its passes are replayed
        self._replayed: list[Graphs] = []  # of all modules
        self.timed: Callable[[str], contextlib.AbstractContextManager] = contextlib.nullcontext  # of parts of a step
        self._norm: float | None = None
        self._gradients_bad = False

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which writes and prints."""
        return self.rank == 0

    @property
    def module(self) -> nn.Module:
        """The trained module, without wrappers."""
        return self.engine.module

    def wrap(self, module: nn.Module) -> None:
        """Hand the module and a new AdamW to DeepSpeed. Only these two: the loader is sharded by its own plan."""
        groups = parameter_groups(module, self.config)
        optim = self.config.optim
        use_sixteen_bit_parameters(module, self.config.engine, self.device)
        shape_network(module, self.config.engine, self.device)
        # Fused on the host too, where offloading has it step: DeepSpeed's own is no faster and wants a compiler.
        fused = self.device.type == "cuda" or self.config.engine.offload == "cpu"
        optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, fused=fused)
        trained = sum(parameter.numel() for group in groups for parameter in group["params"])
        zero = self._accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        zero["reduce_bucket_size"] = bucket_elements(self.config.engine, trained)
        self.engine, _ = self._accelerator.prepare(module, optimizer)
        self.graphs = self.replayed(self.module, "network", agree=self._first_reason)

    def replayed(self, module: nn.Module, what: str, *, trained: bool = True, **more: Any) -> Graphs | None:
        """Have a module's training calls replayed as CUDA graphs, where the configuration and the device allow it. A
        frozen one (`trained` False) may be captured under ZeRO 3 too, which does not touch it."""
        engine, kind = self.config.engine, self.device.type
        if engine.graphs == "off" or kind not in RECORDERS:
            return None
        if trained and engine.no_graphs is not None:
            if self.main:
                log.warning("%s: no CUDA graphs: %s", what, engine.no_graphs)
            return None
        calls = EAGER_CALLS * self.config.train.accumulation
        more |= {"trained": trained, "strict": engine.graphs == "on", "eager_calls": calls, "tell": self.main}
        self._replayed.append(Graphs(module, RECORDERS[kind](self.device), what=what, **more))
        return self._replayed[-1]

    def forget_graphs(self) -> None:
        """Between two steps: capture all modules anew, because crops have another size from here on."""
        for graphs in self._replayed:
            graphs.forget()

    def _first_reason(self, reason: str | None) -> str | None:
        return next((each for each in self.gather(reason) if each is not None), None)

    def set_learning_rates(
        self, restorer: float, prior: float, spe: float | None = None, gate: float | None = None
    ) -> None:
        """Learning rates of the coming step; spe, gate None: the restorer's."""
        rates = {"restorer": restorer, "prior": prior}
        rates |= {part: restorer if given is None else given for part, given in (("spe", spe), ("gate", gate))}
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rates[group["part"]]

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        """Training forward, under the run's precision."""
        with self.timed("forward"):
            return self.engine(*inputs, **keywords)

    def backward_and_step(self, loss: Tensor) -> None:
        """Backward of one micro-batch's mean loss; DeepSpeed steps at the accumulation boundary. ValueError where
        gradients overflow in fp16 even with a loss scale of 1."""
        with self.timed("backward"):
            self.engine.backward(loss)
        if self.config.engine.zero == 0 and self.engine.is_gradient_accumulation_boundary():
            self._guard_gradients()
        try:
            with self.timed("update"):
                self.engine.step()
        except Exception as error:  # DeepSpeed raises no type of its own
            if "loss scale already at minimum" not in str(error):
                raise
            raise ValueError(
                "gradients overflow in fp16 even without a loss scale: the run diverged; lower optim.lr, or set "
                "engine.precision to bf16 or fp32"
            ) from error

    def _guard_gradients(self) -> None:
        """Without ZeRO, DeepSpeed 0.19.8 looks at no gradient, and clipping by a norm of NaN makes all weights NaN. The
        gradients are summed over the ranks by now, so all come to the same verdict."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        self._norm = float(torch.nn.utils.get_total_norm(gradients))
        self._gradients_bad = not math.isfinite(self._norm)
        if self._gradients_bad:
            torch._foreach_zero_(gradients)
            self.set_learning_rates(0.0, 0.0)

    @property
    def left_out(self) -> bool:
        """Whether DeepSpeed left out the step just done because a gradient was not finite (in fp16 because the loss
        scale was too large; it is then halved). The same on every rank."""
        return self._gradients_bad or not self.engine.was_step_applied()

    @property
    def loss_scale(self) -> float | None:
        """The loss scale of fp16, None in other precisions."""
        return float(self.engine.optimizer.loss_scale) if self.config.engine.precision == "fp16" else None

    def autocast(self) -> contextlib.AbstractContextManager:
        """The run's precision for what runs outside the engine (teacher, evaluation)."""
        return autocast(self.config.engine, self.device)

    def grad_norm(self) -> float | None:
        """Global gradient norm of the last step before clipping, where DeepSpeed knows it."""
        norm = self._norm if self.config.engine.zero == 0 else self.engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the ranks, fp64, same shape, on the CPU; deterministic for a given number of ranks."""
        total = values.detach().to(self.device, torch.float64)
        if self.world > 1:
            dist.all_reduce(total)
        return total.cpu()

    def gather(self, thing: Any) -> list[Any]:
        """Any picklable object of every rank, in rank order, on every rank."""
        if self.world == 1:
            return [thing]
        things: list[Any] = [None] * self.world
        dist.all_gather_object(things, thing)
        return things

    def share_buffers(self) -> None:
        """Rank 0's buffers on every rank: BatchNorm on batch statistics lets them differ, and only one set is saved."""
        if self.world > 1:
            for buffer in (b for b in self.module.buffers() if b.is_floating_point()):
                dist.broadcast(buffer, 0)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """An exception in the block on any rank ends it on every rank, instead of leaving the others waiting."""
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        texts = self.gather(None if failure is None else str(failure))
        if failure is not None:
            raise failure
        for rank, text in enumerate(texts):
            if text is not None:
                raise ValueError(f"rank {rank} stopped: {text}")

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()
            # Gloo's threads outlive the group. One that lets go of the last collective's tensors while Python shuts
            # down ends the process by SIGABRT after all is done (seen with torch 2.14): it needs the lock for a moment.
            time.sleep(LET_GO_S)


def _digest(config: Config) -> str:
    """Short hash of the whole configuration: the ranks of a run must have been given the same."""
    return hashlib.blake2b(config.model_dump_json().encode(), digest_size=4).hexdigest()
