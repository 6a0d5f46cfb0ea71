"""A run in progress: its folder, data, model, average and checkpoints, put together in the one order that works."""

from __future__ import annotations

import math
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from data.blur import TIERS
from data.stream.validation import validation_count, validation_pairs
from model.deblurrer import Deblurrer
from model.pretrained import load_pretrained
from train.checkpoint.copier import Copier
from train.checkpoint.far import far_folder
from train.checkpoint.folder import Checkpoints
from train.checkpoint.manifest import RunState, read_state
from train.checkpoint.resume import check_fits, divided_anew, find_checkpoint
from train.checkpoint.saved import model_folder
from train.config.identity import config_digest, git_commit
from train.config.networks import build_model
from train.config.schema import Config
from train.config.sources import data_sources, digest_of, open_sets, pair_loader, with_resolved_data
from train.engine.average import averages_of
from train.engine.engine import Engine
from train.engine.ranks import rank_lines
from train.engine.zero import trainable
from train.evaluate.report import draw_curve, draw_panel, draw_similarity, tier_lines, write_report
from train.evaluate.scores import VALIDATION_SEED, evaluate_pairs, merge, panel_numbers
from train.log import log, start_logging
from train.objective.task import DeblurTask
from train.run.facts import run_facts, run_notes
from train.run.folder import RunFolder
from train.run.progress import TrainingProgress
from train.run.shares import StepShares
from train.run.step import StepResult
from train.watch.heartbeat import beat
from train.watch.signals import StopRequest
from train.watch.traces import Traces
from train.watch.watchdog import Watchdog, stall_limit, watch


class Session:
    """Everything of a run beside its loop. All ranks make one and call the same methods in the same order.

    step: optimizer steps done. Use as a context manager: leaving it closes what is open.
    """

    def __init__(
        self, config: Config, engine: Engine, stop: StopRequest, *, resume: str | None, init: str | None
    ) -> None:
        if resume and init and resume != "auto":
            raise ValueError("--resume and --init exclude each other: a resumed run has its weights")
        self.console = Console()
        with engine.agreed():
            train, val = data_sources(config)
            # Paths as they are now: the environment that chose them may not be there tomorrow.
            config = with_resolved_data(config)
            self.config, self.engine, self.stopping = config, engine, stop
            self.folder = RunFolder.of(config)
            self.checkpoints = Checkpoints(self.folder.checkpoints, config.checkpoint.keep)
            if engine.main:
                self.folder.claim(resume=resume is not None)
                self.folder.lock()
                stop.claim(self.folder.path)
                shutil.rmtree(self.folder.path / "heartbeat", ignore_errors=True)
                start_logging(self.folder.log, self.console)
                log.info("ranks:\n%s", rank_lines(engine.ranks))
                for line in engine.unused:
                    log.warning(line)
        self._start_watching()
        with engine.agreed():
            self.train_sets, self.val_set = open_sets(config)
        for source, shards in zip(train, self.train_sets, strict=True):
            log.info("training data: %s, %d samples", source, len(shards))
        log.info("validation data: %s, %d samples", val, len(self.val_set))
        self.sources = {"training data": "; ".join(map(str, train)), "validation data": str(val)}
        with engine.agreed():
            self.far = far_folder(config, fresh=resume is None) if engine.main else None
        checkpoint = self._checkpoint_to_resume(resume)
        if checkpoint is not None and init is not None:
            log.info("--init %s is not used: the run goes on from its own checkpoint", init)
        with engine.agreed():
            module = self._build(checkpoint, init)
        beat("start")
        engine.wrap(module)
        self.shares = StepShares(engine.module, self.task.teacher) if engine.main else None
        self.ema = averages_of(engine, config.train.ema)
        log.info(
            "%d trained parameters, %d ranks on %s, ZeRO %d, %s",
            trainable(engine.module), engine.world, engine.device.type, config.engine.zero, config.engine.precision,
        )  # fmt: skip
        self.step, self.gain, self.evaluation = 0, None, None
        self._saved: int | None = None  # steps of the newest checkpoint and evaluation
        self._evaluated: int | None = None
        if checkpoint is not None:
            beat("start")
            self.task.load_state_dict(self.checkpoints.restore(checkpoint, engine, self.ema))
            self.step = read_state(checkpoint).step
            if checkpoint.resolve() == self.checkpoints.path(self.step).resolve():
                self._saved = self.step
            log.info("resumed %s at step %d of %d", checkpoint, self.step, config.train.steps)
            changed = divided_anew(checkpoint, config, engine.world)
            if changed is not None:
                log.info("its state was divided anew: %s; a step stays %d pairs", changed, config.train.batch)
        self.copier: Copier | None = None
        if self.far is not None:
            self.copier = Copier(self.far, self.checkpoints)
            if self._saved is not None:  # a killed run may not have come to it
                self.copier.submit(self.checkpoints.path(self._saved))
        self._open_writers()
        self._seconds = 0.0
        self.progress: TrainingProgress | None = None

    def _start_watching(self) -> None:
        """Heartbeats and traces; the folder is ours by now, and every rank comes here."""
        engine, run = self.engine, self.engine.gather(uuid.uuid4().hex)[0]
        self.watchdog = Watchdog(
            self.folder.path, engine.rank, engine.world, run=run,
            stall_s=stall_limit(self.config),
            silent_s=60 * self.config.engine.silent_minutes,
            on_stopped=self.stopping.mark,
        )  # fmt: skip
        watch(self.watchdog, engine.agreed)
        self.traces = Traces(self.folder.path, engine.rank, engine.world, engine.device)

    def _build(self, checkpoint: Path | None, init: str | None) -> Deblurrer:
        """The module with its first weights and scales; nothing here waits for other ranks."""
        config, engine = self.config, self.engine
        self.task = DeblurTask(config, engine.device)
        module = build_model(config, read_weights=checkpoint is None).to(engine.device)
        if checkpoint is None:
            if init is not None:
                folder = model_folder(init)
                load_pretrained(module, folder)
                log.info("weights start from %s", folder)
            self.task.calibrate(module, self._calibration_batches())
            if init is not None and module.prior is not None:
                load_pretrained(module, folder)  # with the scales that belong to these weights
        return module

    def _calibration_batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The first pairs of the plan, whatever the number of ranks: the same on every rank."""
        single = self.config.model_copy(
            update={
                "data": self.config.data.model_copy(update={"workers": 0, "canonical_groups": 1}),
                "train": self.config.train.model_copy(update={"accumulation": 1, "batch": 8}),
            }
        )
        batches = self.config.loss.statistics_crops // single.train.batch
        for batch in pair_loader(single, self.train_sets, start=0, batches=batches, rank=0, world=1):
            beat("start")
            yield batch["blurry"], batch["sharp"]

    # -- resuming -----------------------------------------------------------------------------------------------------

    def _checkpoint_to_resume(self, resume: str | None) -> Path | None:
        engine = self.engine
        found: Path | None = None
        with engine.agreed():
            if engine.main and resume is not None:
                self.checkpoints.tidy()
                found = find_checkpoint(resume, self.checkpoints, self.far)
                if found is not None:
                    digests = {"training": digest_of(self.train_sets), "validation": self.val_set.digest}
                    check_fits(found, self.config, digests)
                    self.checkpoints.set_aside_newer(read_state(found).step)
                self.folder.rewind_metrics(read_state(found).step if found else -1)
        return engine.gather(found)[0]

    # -- the loop's calls ---------------------------------------------------------------------------------------------

    def loader(self) -> Iterator[dict]:
        """The training stream from where the run stands to its end."""
        config, engine = self.config, self.engine
        left = config.train.steps - self.step
        with engine.agreed():
            self.task.open_targets(engine.rank)
        stream = pair_loader(
            config, self.train_sets, start=self.step * config.train.batch, batches=left, rank=engine.rank,
            world=engine.world, pin_memory=engine.device.type == "cuda", device=engine.device,
            attach=self.task.targets.attach if self.task.targets is not None else None,
        )  # fmt: skip
        if engine.main:
            self.progress = TrainingProgress(self.console, self.step, config.train.steps)
            self.progress.__enter__()
        return iter(stream)

    def record(self, step: int, result: StepResult) -> None:
        """Count, show and write down a step."""
        self.step = step
        self._seconds += result.total_s
        logged = step % self.config.train.log_every == 0 or step == self.config.train.steps
        if logged:
            self.traces.write(step, result.total_s, result.wait_s)
        slow = self.traces.slow_ranks()
        if result.overflowed:
            log.info("step %d: a gradient overflowed in fp16; no update; loss scale now %g", step, result.loss_scale)
        if not self.engine.main:
            return
        for line in slow:
            log.warning(line)
        if self.progress is not None:
            self.progress.update(step, result)
        shares = self.shares.take(result.total_s, result.wait_s)
        if logged:
            values = {"loss": result.loss, **result.parts, "lr": result.lr, "grad_norm": result.grad_norm}
            values |= {"wait_share": result.wait_s / result.total_s, "seconds": result.total_s}
            if result.loss_scale is not None:
                values["loss_scale"] = result.loss_scale
            self.folder.append_metrics({"step": step, **_finite(values), "shares": shares})
            for name, value in _finite(values).items():
                if value is not None:
                    self.writer.add_scalar(f"train/{name}", value, step)

    def catch_up(self) -> None:
        """The evaluation that belongs to where the run stands, if none was made: before the first step, and after a
        stop that broke it off."""
        due = self.step == 0 or self._evaluated_at(self.step)
        made = any(record["step"] == self.step and "tiers" in record for record in self.folder.read_metrics())
        if due and not self.engine.gather(made)[0]:
            self.evaluate(self.step)
            if self.step > 0 and not self.stopping.agreed:
                self.save(self.step)  # with its gain, which chooses the best

    def evaluate(self, step: int) -> None:
        """Score the validation list with the averaged weights; every rank takes part, rank 0 writes. Broken off, and
        left to `catch_up`, where the ranks agree to stop."""
        try:
            self._evaluate(step)
        except StopAgreedError:
            log.info("step %d: evaluation broken off", step)

    def _evaluate(self, step: int) -> None:
        engine, settings = self.engine, self.config.eval
        total = validation_count(self.val_set, TIERS, settings.per_tier)
        pairs = validation_pairs(
            self.val_set, self.config.blur, crop=settings.crop, crops=settings.per_tier, seed=VALIDATION_SEED,
            rank=engine.rank, world=engine.world, margin=self.config.data.margin,
        )  # fmt: skip
        started = time.perf_counter()
        self._go_on()
        self._share_batch_norm()
        with self.ema.in_place_of_weights(), engine.autocast():
            part = evaluate_pairs(
                engine.module,
                pairs,
                device=engine.device,
                teacher=self.task.teacher,
                similarity=self.task.similarity,
                keep=panel_numbers(settings.panels, self.val_set, settings.per_tier),
                forwards=math.ceil(total / engine.world),
                dummy_size=settings.crop,
                on_forward=self._go_on,
            )
        evaluation = merge(engine.gather(part))
        self.gain, self.evaluation, self._evaluated = evaluation.severe_gain(), evaluation, step
        if engine.main:
            self.folder.append_metrics({"step": step, **_finite(evaluation.record())})
            for row in evaluation.tiers():
                self.writer.add_scalar(f"gain/{row.tier}", row.gain, step)
                self.writer.add_scalar(f"psnr/{row.tier}", row.restored_psnr, step)
            for level, value in enumerate(evaluation.similarity):
                self.writer.add_scalar(f"similarity/level{level + 1}", value, step)
            self.writer.add_image("panel", draw_panel(evaluation.pictures), step, dataformats="HWC")
            gains = "  ".join(f"{row.tier} {row.gain:+.3f}" for row in evaluation.tiers())
            log.info("step %d: gain in dB: %s  (%d pairs, %.0f s)", step, gains, total, time.perf_counter() - started)

    def _go_on(self) -> None:
        """All ranks at the same place: go on, or stop together."""
        beat("evaluate")
        if self.stopping.agreed or self.stopping.agree(self.engine):
            raise StopAgreedError

    def save(self, step: int) -> Path:
        """Write a checkpoint of the step just done."""
        beat("save")
        self._share_batch_norm()
        state = RunState(
            step=step,
            samples_consumed=step * self.config.train.batch,
            world=self.engine.world,
            zero=self.config.engine.zero,
            seed=self.config.run.seed,
            config_digest=config_digest(self.config),
            index_digest=digest_of(self.train_sets),
            val_digest=self.val_set.digest,
            git_commit=self._commit,
            gain=self.gain if self._evaluated == step else None,
            cache_fingerprint=self._cache_fingerprint,
        )
        path = self.checkpoints.save(self.engine, self.ema, state, self.config, self.task.state_dict())
        log.info("checkpoint %s", path)
        if self.copier is not None:
            self.copier.submit(path)
        self._saved = step
        self.stopping.agree(self.engine)  # asked while saving: not one step more
        return path

    def _share_batch_norm(self) -> None:
        if self.config.model.student.batch_norm == "batch":
            self.engine.share_buffers()

    def _evaluated_at(self, step: int) -> bool:
        every = self.config.eval.every
        return step == self.config.train.steps or (every > 0 and step % every == 0)

    def stop(self) -> None:
        """End a run whose ranks agreed to stop: a checkpoint of where it stands, then the marker."""
        self._stop_progress()
        if self._saved != self.step:
            self.save(self.step)
        self.stopping.step = self.step
        self.stopping.mark(self.stopping.agreed or "")
        log.info("stopped at step %d as asked (%s); go on with --resume auto", self.step, self.stopping.agreed)

    def finish(self) -> None:
        """panel.png, curve.png, similarity.png, report.md."""
        self._stop_progress()
        beat("finish")
        complete = all((self.folder.path / name).exists() for name in ("report.md", "panel.png", "curve.png"))
        if self.evaluation is None and all(self.engine.gather(complete)):
            log.info("%s is finished: nothing to do", self.folder.path)
            return
        if self.evaluation is None:  # killed between its last checkpoint and its report
            self.evaluate(self.step)
        if self.stopping.agreed or not self.engine.main:
            return
        from PIL import Image

        records = self.folder.read_metrics()
        Image.fromarray(draw_panel(self.evaluation.pictures)).save(self.folder.path / "panel.png")
        draw_curve(records, self.folder.path / "curve.png")
        draw_similarity(records, self.folder.path / "similarity.png")
        first = next((record for record in records if record["step"] == 0 and "similarity" in record), {})
        write_report(
            self.folder.path / "report.md",
            self.evaluation,
            title=f"Run {self.config.run.name}",
            facts=run_facts(self.config, self.engine, records, self.sources, self._commit),
            before=first.get("similarity", []),
            notes=run_notes(self.config, records),
        )
        for line in tier_lines(self.evaluation):
            log.info(line)
        log.info("report: %s  pictures: %s", self.folder.path / "report.md", self.folder.path / "panel.png")

    # -- opening and closing ------------------------------------------------------------------------------------------

    def _open_writers(self) -> None:
        self._commit, self._cache_fingerprint = git_commit(), self.task.cache_fingerprint
        if not self.engine.main:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.folder.write_config(self.config)
        self.writer = SummaryWriter(str(self.folder.tensorboard), purge_step=self.step + 1)

    def _stop_progress(self) -> None:
        if self.progress is not None:
            self.progress.__exit__()
            self.progress = None

    def _close_targets(self) -> None:
        """Let the feature cache finish its writing, and say what it did."""
        targets = self.task.targets
        if targets is not None:
            targets.close()
            if (said := targets.summary()) is not None:
                log.info("feature cache, rank %d: %s", self.engine.rank, said)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        self._stop_progress()
        self._close_targets()
        if self.engine.main:
            self.writer.close()
        if kind is None:
            self.watchdog.close()
            self.engine.close()
        if self.copier is not None:  # after the other ranks are let go
            self.copier.close(self.config.checkpoint.copy_wait if kind is None else 0.0)


class StopAgreedError(Exception):
    """The ranks agreed to stop during an evaluation."""


def _finite(value: Any) -> Any:
    """The same value with None for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
