"""A window of training steps under torch's profiler: a trace to look at, and a table of what took how long."""

from __future__ import annotations

from pathlib import Path

import torch

from train.config.schema import ProfileSection
from train.log import log

AFTER = 10  # steps of a process before the window, where the configuration names no step: all is warm by then
ROWS = 60


class StepProfile:
    """Writes `profile/step-N.json.gz` (open it with Perfetto or chrome://tracing) and `profile/step-N.txt` (kernels on
    a GPU, operators on a CPU, by their own time) into the run's folder. N: the window's first step, from 1.

    done: the steps that a run has done when it starts.
    """

    def __init__(self, folder: Path, settings: ProfileSection, done: int, device: torch.device) -> None:
        self.first = settings.step if settings.step is not None else done + AFTER + 1
        self.steps, self._folder = settings.steps, folder / "profile"
        self._gpu, self._open = device.type == "cuda", None
        if self.first <= done:
            log.warning("profile.step %d lies before step %d, where this run goes on: no profile", self.first, done + 1)
        self.between(done)

    def between(self, done: int) -> None:
        """Call between steps, with how many are done."""
        if done == self.first - 1:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            kinds += [torch.profiler.ProfilerActivity.CUDA] if self._gpu else []
            self._open = torch.profiler.profile(activities=kinds)
            self._open.start()
        elif self._open is not None and done == self.first - 1 + self.steps:
            self.close()

    def close(self) -> None:
        """Write what was profiled, also of a window that the run's end cut short."""
        if self._open is None:
            return
        profiler, self._open = self._open, None
        profiler.stop()  # waits for the GPU
        path = self._folder / f"step-{self.first}"
        try:
            self._folder.mkdir(exist_ok=True)
            profiler.export_chrome_trace(f"{path}.json.gz")
            order = "self_device_time_total" if self._gpu else "self_cpu_time_total"
            table = profiler.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=90)
            path.with_suffix(".txt").write_text(table)
        except OSError as error:
            log.warning("%s: the profile cannot be written (%s): the run goes on without", self._folder, error.strerror)
            return
        log.info("profile of %d steps: %s.json.gz and .txt", self.steps, path)
