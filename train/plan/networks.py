"""What every network costs on the machine at hand, with and without the prior: parameters, MACs, ms and memory.

Each is measured in a process of its own, so that peaks of memory are its own and a network too large for the machine
ends nothing but its row.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from model.backbones import BACKBONES, PRESETS
from model.config import ModelConfig
from model.deblurrer import Deblurrer, build_deblurrer
from model.summary import summarize

REPEATS, ENOUGH_S = 5, 3.0  # forward passes timed, and the seconds after which no further one is
MACS_AT = (256, 256)


@dataclass(frozen=True)
class Cost:
    """A network's row: MACs are of one image of 256²; ms and MiB of each size (height, width) px are None where they
    were not measured, and `why` says the reason."""

    name: str
    prior: bool
    parameters: int
    macs: int
    sizes: list[tuple[int, int]]
    ms: list[float | None]
    mib: list[float | None]
    why: str = ""


def network_names() -> list[str]:
    """Every backbone, under its presets' names where it has any."""
    preset = {settings["name"] for settings in PRESETS.values()}
    return [*(name for name in BACKBONES if name not in preset), *PRESETS]


def model_of(name: str, model: ModelConfig, prior: bool) -> Deblurrer:
    """The network `name` with random weights, with or without the prior of `model`, and without its gate, on the
    current device."""
    changes = {"backbone": {"name": name}, "prior": prior, "gate": False}
    return build_deblurrer(model.model_copy(update=changes), read_weights=False)


def costs(
    names: Sequence[str], model: ModelConfig, sizes: Sequence[tuple[int, int]], device: str, limit_s: float
) -> Iterator[Cost]:
    """Rows as they are measured: each network without and with the prior. A process that takes over `limit_s` s is
    ended, and its row says so."""
    for name in names:
        for prior in (False, True):
            with torch.device("meta"):
                counts = summarize(model_of(name, model, prior), MACS_AT)
            asked = {"name": name, "model": model.model_dump(mode="json"), "prior": prior, "device": device}
            ms: list[float | None] = []
            mib: list[float | None] = []
            why = ""
            for size in sizes:
                found, problem = _in_a_process({**asked, "size": size}, limit_s)
                ms.append(found[0])
                mib.append(found[1])
                why = why or (f"{size[1]}×{size[0]}: {problem}" if problem else "")
            yield Cost(name, prior, counts.parameters, counts.macs, list(sizes), ms, mib, why)


def _in_a_process(asked: dict, limit_s: float) -> tuple[tuple[float | None, float | None], str]:
    try:
        done = subprocess.run(
            [sys.executable, "-m", "train.plan.networks", json.dumps(asked)],
            capture_output=True, text=True, timeout=limit_s, cwd=Path(__file__).parents[2],
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return (None, None), f"over {limit_s:g} s"
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        return (None, None), said[-1][:200] if said else f"ended by signal {-done.returncode} (out of memory?)"
    found = json.loads(done.stdout.splitlines()[-1])
    return (found["ms"], found["mib"]), ""


def measure(asked: dict) -> dict[str, float]:
    """Median milliseconds and the peak of memory (MiB over what the weights take) of a forward pass of one image, fp32
    on a CPU, bf16 on a GPU, no gradients."""
    device = torch.device(asked["device"])
    network = model_of(asked["name"], ModelConfig.model_validate(asked["model"]), asked["prior"]).to(device).eval()
    image = torch.rand(1, 3, *asked["size"], generator=torch.Generator().manual_seed(0)).to(device)
    gpu = device.type == "cuda"

    def forward() -> None:
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=gpu):
            network(image)
        if gpu:
            torch.cuda.synchronize()

    if gpu:
        forward()  # compiles and tunes
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds = _timed(forward)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        seconds = _timed(forward)
        peak = _resident("VmHWM") - before
    return {"ms": 1e3 * statistics.median(seconds), "mib": peak / 2**20}


def _timed(work: Callable[[], None]) -> list[float]:
    seconds: list[float] = []
    while not seconds or (len(seconds) < REPEATS and sum(seconds) < ENOUGH_S):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return seconds[1:] if len(seconds) > 2 else seconds


def _resident(what: str) -> int:
    """Bytes of this process that are, or at most were, in memory."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what + ":"))
    return int(line.split()[1]) * 1024


def as_json(rows: Sequence[Cost], device: str) -> str:
    """The rows and what they were measured on."""
    on = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    return json.dumps({"device": on, "torch": torch.__version__, "rows": [asdict(row) for row in rows]}, indent=1)


def plot(rows: Sequence[Cost], out: Path) -> None:
    """MACs against milliseconds at the first size, a line from each network without the prior to it with it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name in dict.fromkeys(row.name for row in rows):
        found = [row for row in rows if row.name == name and row.ms[0]]
        if not found:
            continue
        drawn = axes.plot([row.macs / 1e9 for row in found], [row.ms[0] for row in found], "-", lw=1)[0]
        for row in found:
            face = drawn.get_color() if row.prior else "white"
            axes.plot(row.macs / 1e9, row.ms[0], "o", color=drawn.get_color(), mfc=face)
        axes.annotate(name, (found[0].macs / 1e9, found[0].ms[0]), (5, -9), textcoords="offset points", fontsize=8)
    height, width = rows[0].sizes[0]
    axes.set(xscale="log", yscale="log", xlabel="GMACs at 256×256 px", ylabel=f"ms at {width}×{height} px")
    axes.set_title("Cost of the networks: hollow without, filled with the prior", fontsize=10)
    axes.margins(x=0.16)  # names stand to the right of their marks
    axes.grid(True, which="both", alpha=0.3)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
