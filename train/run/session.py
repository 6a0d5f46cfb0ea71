"""A run in progress: its folder, data, model, average and checkpoints, put together in the one order that works."""

from __future__ import annotations

import contextlib
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from data.stream.crops import PAIRS_VERSION, margin_of
from model.pretrained import CONFIG
from train.checkpoint.copier import Copier
from train.checkpoint.far import FarFolder, far_folder
from train.checkpoint.folder import Checkpoints
from train.checkpoint.manifest import RunState, read_state
from train.checkpoint.resume import (
    check_computed_alike,
    check_fits,
    divided_anew,
    find_checkpoint,
    look_for_checkpoint,
)
from train.config.file import load_config
from train.config.identity import config_digest, git_commit, versions
from train.config.networks import build_model
from train.config.patches import check_crops_fit, pairs_before, phase_at
from train.config.schema import Config
from train.config.sources import data_sources, digest_of, open_sets, with_resolved_data
from train.engine.average import Ema
from train.engine.engine import Engine
from train.engine.ranks import rank_lines
from train.engine.zero import trainable
from train.evaluate.scores import Evaluation
from train.log import log, start_logging
from train.objective.task import DeblurTask
from train.run.facts import run_facts
from train.run.first import first_weights
from train.run.folder import RunFolder
from train.run.kernels import guard_kernels
from train.run.profile import StepProfile
from train.run.rates import Rates, peak_flops
from train.run.records import Records
from train.run.schedule import evaluation_due, learning_rates, logged, prior_learns, stage
from train.run.shares import StepShares
from train.run.stages import arrange, enter_stage
from train.run.step import StepResult
from train.run.stream import TrainingStream
from train.run.validation import Validation
from train.watch.heartbeat import beat
from train.watch.signals import StopRequest
from train.watch.traces import Traces
from train.watch.watchdog import Watchdog, stall_limit, watch


class StopAgreedError(Exception):
    """The ranks agreed to stop during an evaluation."""


class Session:
    """Everything of a run beside its loop. All ranks make one and call the same methods in the same order.

    step: optimizer steps done. Use as a context manager: leaving it closes what is open.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        stop: StopRequest,
        *,
        resume: str | None,
        init: str | None,
        extend: bool = False,
    ) -> None:
        if resume and init and resume != "auto":
            raise ValueError("--resume and --init exclude each other: a resumed run has its weights")
        self.engine, self.stopping, self._extend = engine, stop, extend
        self.copier: Copier | None = None
        self.records: Records | None = None
        self._profile: StepProfile | None = None
        with contextlib.ExitStack() as opened:  # what is open is closed, the last first, also where opening fails
            opened.push(self._close_copier)  # last of all: the other ranks are let go by then
            self._open_folder(config, resumed=resume is not None)
            self._open_watch(opened)
            self._open_data()
            checkpoint, far = self._checkpoint_to_resume(resume)
            if checkpoint is not None and init is not None:
                log.info("--init %s is not used: the run goes on from its own checkpoint", init)
            guard_kernels(self.config, engine)  # while the GPU is empty
            self._open_model(checkpoint, init)
            self._open_records(opened, far)
            opened.callback(self._close_targets)
            self._opened = opened.pop_all()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *failure) -> None:
        self._opened.__exit__(*failure)

    # -- opening ------------------------------------------------------------------------------------------------------

    def _open_folder(self, config: Config, *, resumed: bool) -> None:
        """The run's folder, which rank 0 holds from now on, and its log."""
        engine = self.engine
        self.console = Console()
        with engine.agreed():
            self._sources = data_sources(config)
            # Paths as they are now: the environment that chose them may not be there tomorrow.
            self.config = with_resolved_data(config)
            self.folder = RunFolder.of(self.config)
            self.checkpoints = Checkpoints(self.folder.checkpoints, self.config.checkpoint.keep)
            if engine.main:
                self.folder.claim(resume=resumed)
                self.folder.lock()
                self.stopping.claim(self.folder.path)
                shutil.rmtree(self.folder.path / "heartbeat", ignore_errors=True)
                start_logging(self.folder.log, self.console)
                log.info("ranks:\n%s", rank_lines(engine.ranks))
                for line in engine.unused:
                    log.warning(line)

    def _open_watch(self, opened: contextlib.ExitStack) -> None:
        """Heartbeats and traces; the folder is ours by now, and every rank comes here."""
        engine, run = self.engine, self.engine.gather(uuid.uuid4().hex)[0]
        watchdog = Watchdog(
            self.folder.path,
            engine.rank,
            engine.world,
            run=run,
            stall_s=stall_limit(self.config),
            silent_s=60 * self.config.engine.silent_minutes,
            on_stopped=self.stopping.mark,
        )
        watch(watchdog, engine.agreed)
        self.traces = Traces(self.folder.path, engine.rank, engine.world, engine.device)

        def let_go(kind: type | None, *_: object) -> None:
            if kind is None:  # a failure is told to the other ranks by `failure.explained`
                watchdog.close()
                engine.close()

        opened.push(let_go)

    def _open_data(self) -> None:
        with self.engine.agreed():
            self.train_sets, self.val_set = open_sets(self.config)
            check_crops_fit(self.config, self.train_sets)
        self._stream = TrainingStream(self.config, self.train_sets, self.engine)
        train, val = self._sources
        for source, shards in zip(train, self.train_sets, strict=True):
            log.info("training data: %s, %d samples", source, len(shards))
        if self.val_set is not None:
            log.info("validation data: %s, %d samples", val, len(self.val_set))
            self._validation = Validation(self.config, self.folder, self.engine, self.train_sets, self.val_set)
        else:
            log.info("no validation: eval is off")

    def _checkpoint_to_resume(self, resume: str | None) -> tuple[Path | None, FarFolder | None]:
        """The checkpoint to go on from, the same on every rank, and on rank 0 where copies are kept."""
        engine = self.engine
        found: Path | None = None
        far: FarFolder | None = None
        with engine.agreed():
            if engine.main:
                far = far_folder(self.config, fresh=resume is None)
                if resume is not None:
                    self.checkpoints.tidy()
        damaged: list[str] = []
        if resume is not None:
            found, damaged = look_for_checkpoint(resume, self.checkpoints, engine)
        with engine.agreed():
            if engine.main and resume is not None:
                found = find_checkpoint(found, damaged, self.checkpoints, far)
                if found is not None:
                    digests = {"training": digest_of(self.train_sets), "validation": self._val_digest}
                    check_fits(found, self.config, digests, extend=self._extend)
                    self.checkpoints.set_aside_newer(read_state(found).step)
                log_every = load_config(found / CONFIG).train.log_every if found else 1
                self.folder.rewind_metrics(read_state(found).step if found else -1, log_every)
        return engine.gather(found)[0], far

    def _open_model(self, checkpoint: Path | None, init: str | None) -> None:
        """The network under the engine, its average, and where the run stands."""
        config, engine = self.config, self.engine
        with engine.agreed():
            self.task = DeblurTask(config, engine.device)
            if checkpoint is None:
                module, self._origins = first_weights(config, engine, self.task, self.train_sets, init)
            else:
                module = build_model(config, read_weights=False)
        beat("start")
        engine.wrap(module.to(engine.device))
        if self.task.teacher is not None:
            engine.replayed(self.task.teacher, "teacher", trained=False)
        self.ema = Ema(engine, config.train.ema)
        trained, where = trainable(engine.module), f"{engine.world} ranks on {engine.device.type}"
        log.info("%d trained parameters, %s, ZeRO %d, %s", trained, where, config.engine.zero, config.engine.precision)
        share, batch = config.micro_batch(engine.world), config.train.batch
        log.info(
            "a step: %d pairs over all ranks, whatever their number (%d ranks × %d accumulation × %d); the learning "
            "rate belongs to it", batch, engine.world, config.train.accumulation, share,
        )  # fmt: skip
        self.step, self._stage = 0, ""
        self.evaluation: Evaluation | None = None
        self._evaluated: int | None = None  # steps of the newest evaluation and checkpoint
        self._saved: int | None = None
        if checkpoint is not None:
            self._resume_at(checkpoint)

    def _resume_at(self, checkpoint: Path) -> None:
        config, engine = self.config, self.engine
        beat("start")
        self.task.load_state_dict(self.checkpoints.restore(checkpoint, engine, self.ema))
        self.step, self._origins = read_state(checkpoint).step, read_state(checkpoint).origins
        if self.step > 0:
            self._stage = arrange(self.step - 1, engine, self.task)
        if checkpoint.resolve() == self.checkpoints.path(self.step).resolve():
            self._saved = self.step
        log.info("resumed %s at step %d of %d", checkpoint, self.step, config.train.steps)
        if self._extend:
            was, now = (learning_rates(self.step, each)[0] for each in (load_config(checkpoint / CONFIG), config))
            log.info("extended: learning rate %.2e here by the old schedule, %.2e by that of all the steps", was, now)
        if (packages := check_computed_alike(checkpoint, self.task.teacher_digest, versions())) is not None:
            log.warning("computed by other versions from here on: %s", packages)
        if read_state(checkpoint).pairs_version != PAIRS_VERSION and self._drawn_otherwise():
            log.warning("crops and blur are drawn by newer rules from here on: not the pairs that the run began with")
        changed = divided_anew(checkpoint, config, engine.world)
        if changed is not None:
            batch = phase_at(config, self.step).batch
            log.info("its state was divided anew: %s; a step stays %d pairs", changed, batch)

    def _drawn_otherwise(self) -> bool:
        """Whether the rules of version 1 would have drawn other pairs of this run's sets."""
        data, sets = self.config.data, [*self.train_sets, *([self.val_set] if self.val_set is not None else [])]
        moved = any(margin_of(shards, self.config.blur, data.margin) != data.margin for shards in sets)
        return moved or len(self.train_sets) > 1

    def _open_records(self, opened: contextlib.ExitStack, far: FarFolder | None) -> None:
        """What rank 0 writes: copies of checkpoints, metrics, TensorBoard, the bar."""
        self._commit, self._cache_fingerprint = git_commit(), self.task.cache_fingerprint
        if far is not None:
            self.copier = Copier(far, self.checkpoints)
            if self._saved is not None:  # a killed run may not have come to it
                self.copier.submit(self.checkpoints.path(self._saved))
        if self.engine.main:
            engine, graphs = self.engine, self.engine.graphs
            shares = StepShares(engine.module, self.task.teacher, lambda: graphs is not None and graphs.recording)
            peak = peak_flops(engine.device, self.config.engine.precision, engine.world)
            rates = Rates(self.config, engine.world, peak, self.step)
            records = Records(self.folder, self.config, self.console, self.step, shares, rates, self._facts)
            engine.timed = records.timed
            self.records = opened.enter_context(records)

    def _facts(self, records: Sequence[Mapping]) -> dict[str, str]:
        """What a report says of the run beside its scores."""
        train, val = self._sources
        sources = {"training data": "; ".join(map(str, train)), "validation data": str(val)}
        return run_facts(self.config, self.engine, records, sources, self._commit)

    # -- the loop's calls ---------------------------------------------------------------------------------------------

    def loader(self) -> Iterator[dict]:
        """The training stream from where the run stands to its end."""
        engine = self.engine
        with engine.agreed():
            if prior_learns(self.step, self.config):
                self.task.open_targets(engine.rank, engine.sum)
        if self.records is not None:
            self.records.begin_bar()
            if self.config.profile is not None:
                self._profile = StepProfile(self.folder.path, self.config.profile, self.step, engine.device)
                self._opened.callback(self._profile.close)
        targets = self.task.targets
        return self._stream.batches(self.step, targets.attach if targets is not None else None)

    def begin(self, step: int) -> None:
        """Enter the stage of the 0-based `step`, where it is another than that of the step before."""
        if stage(step, self.config) != self._stage:
            self._stage = enter_stage(step, self.engine, self.task, self.ema)
            resting = self.engine.module.prior is not None and self.engine.module.prior.resting
            log.info("step %d: stage %s%s", step + 1, self._stage, ", the prior rests" if resting else "")

    def record(self, step: int, result: StepResult) -> None:
        """Count, show and write down a step."""
        self.step = step
        if logged(step, self.config):
            self.traces.write(step, result.total_s, result.wait_s)
        slow = self.traces.slow_ranks()
        if result.overflowed:
            log.info("step %d: a gradient overflowed in fp16; no update; loss scale now %g", step, result.loss_scale)
        if self.records is not None:
            for line in slow:
                log.warning(line)
            self.records.step(step, result)
        if self._profile is not None:
            self._profile.between(step)

    def catch_up(self) -> None:
        """The evaluation that belongs to where the run stands, if none was made: before the first step, and after a
        stop that broke it off."""
        made = self.records is not None and self.records.evaluated(self.step)
        if evaluation_due(self.step, self.config) and not self.engine.gather(made)[0]:
            self.evaluate(self.step)
            if self.step > 0 and not self.stopping.agreed:
                self.save(self.step)  # with its gain, which chooses the best

    def evaluate(self, step: int) -> None:
        """Score the validation list with the averaged weights; every rank takes part, rank 0 writes. Broken off, and
        left to `catch_up`, where the ranks agree to stop."""
        started = time.perf_counter()
        try:
            self._go_on()
            self._share_batch_norm()
            with self.ema.in_place_of_weights():
                evaluation = self._validation.scores(self.task, self._go_on)
        except StopAgreedError:
            log.info("step %d: evaluation broken off", step)
            return
        self.evaluation, self._evaluated = evaluation, step
        if self.records is not None:
            self.records.evaluation(step, evaluation, time.perf_counter() - started)

    def _go_on(self) -> None:
        """All ranks at the same place: go on, or stop together."""
        beat("evaluate")
        if self.stopping.agreed or self.stopping.agree(self.engine):
            raise StopAgreedError

    def save(self, step: int) -> Path:
        """Write a checkpoint of the step just done."""
        beat("save")
        self._stream.check_bad()  # each rank has met its own
        self._share_batch_norm()
        state = RunState(
            step=step,
            samples_consumed=pairs_before(self.config, step),
            world=self.engine.world,
            zero=self.config.engine.zero,
            seed=self.config.run.seed,
            config_digest=config_digest(self.config),
            index_digest=digest_of(self.train_sets),
            val_digest=self._val_digest,
            git_commit=self._commit,
            gain=self.evaluation.severe_gain() if self.evaluation is not None and self._evaluated == step else None,
            cache_fingerprint=self._cache_fingerprint,
            teacher_digest=self.task.teacher_digest,
            versions=versions(),
            pairs_version=PAIRS_VERSION,
            origins=self._origins,
        )
        if self.engine.main:
            self.folder.sync_metrics()
        path = self.checkpoints.save(self.engine, self.ema, state, self.config, self.task.state_dict())
        log.info("checkpoint %s", path)
        if self.copier is not None:
            self.copier.submit(path)
        self._saved = step
        self.stopping.agree(self.engine)  # asked while saving: not one step more
        return path

    @property
    def _val_digest(self) -> str:
        return self.val_set.digest if self.val_set is not None else ""

    def _share_batch_norm(self) -> None:
        if self.config.model.student.batch_norm == "batch":
            self.engine.share_buffers()

    # -- the end ------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """End a run whose ranks agreed to stop: a checkpoint of where it stands, then the marker."""
        self._end_bar()
        if self._saved != self.step:
            self.save(self.step)
        self.stopping.step = self.step
        self.stopping.mark(self.stopping.agreed or "")
        log.info("stopped at step %d as asked (%s); go on with --resume auto", self.step, self.stopping.agreed)

    def finish(self) -> None:
        """The report and its pictures."""
        self._end_bar()
        beat("finish")
        if self.val_set is None:
            if self.engine.main:
                self.checkpoints.forget_replaced()
            if self.records is not None:
                self.records.curve()
            return
        complete = all(path.exists() for path in (self.folder.report, self.folder.panel, self.folder.curve))
        if self.evaluation is None and all(self.engine.gather(complete)):
            log.info("%s is finished: nothing to do", self.folder.path)
            return
        if self.evaluation is None:  # killed between its last checkpoint and its report
            self.evaluate(self.step)
        if self.engine.main and not self.stopping.agreed:
            self.checkpoints.forget_replaced()
        if self.records is not None and self.evaluation is not None and not self.stopping.agreed:
            self.records.report(self.evaluation)

    def _end_bar(self) -> None:
        if self.records is not None:
            self.records.end_bar()

    def _close_targets(self) -> None:
        """Let the feature cache finish its writing, and say what it did."""
        targets = self.task.targets
        if targets is not None:
            targets.close()
            log.info("feature cache, rank %d: %s", self.engine.rank, targets.summary())

    def _close_copier(self, kind: type | None, *_: object) -> None:
        if self.copier is not None:
            self.copier.close(self.config.checkpoint.copy_wait if kind is None else 0.0)
