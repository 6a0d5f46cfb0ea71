"""Second script for a GPU: tiles and warps of each pass, then whole training steps. Rows into $OUT/two_sweep.jsonl.

    python -m tests.gpu.two_sweep [--seconds 240] [--dry]

The sweep prints the launch table's rows to paste; a tile that `configs.refusal` excludes is never tried. Steps are
those of `train/main.py` itself, without the prior, with it and its student at rest, and with all of it learning, and
how many times as long as without: the goal for a student at rest is 1.5. `--dry` calls each pass once in Triton's
interpreter and takes two steps on the CPU.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from tests.gpu.rows import Rows, process

SHAPES = ((8, 64, 128, 128), (8, 128, 64, 64), (8, 32, 256, 256), (8, 256, 32, 32))
DRY_SHAPES = ((1, 16, 3, 4), (1, 144, 3, 4))  # the fused route and the wide one
TILES = ((64, 4), (64, 8), (128, 4), (128, 8), (256, 8))
PASSES = ("gradient", "gram", "apply", "reduce", "feature_gradient", "prior_gradient")
UNET = "{name: unet, width: 32, blocks: [2, 2, 4, 8]}"
# (network, global batch, engine.graphs, ways), the most telling first: the time may be up before the last.
STEPS = (
    (UNET, 16, "on", ("bare", "frozen")),
    (UNET, 64, "on", ("bare", "frozen")),
    ("{name: nafnet-64}", 16, "on", ("bare", "frozen")),
    (UNET, 16, "off", ("bare", "frozen")),
    (UNET, 64, "off", ("bare", "frozen")),
    (UNET, 16, "on", ("learning",)),
)
DRY_STEPS = (("{name: unet, width: 8, blocks: [1, 1]}", 2, "off", ("bare", "frozen")),)


# -- the sweep --------------------------------------------------------------------------------------------------------


def call_of(kernel: str, shape: tuple[int, ...], prior: int, dtype: torch.dtype, device: str) -> Callable[[], object]:
    """A call of the pass that launches a kernel, on random maps and coefficients."""
    from kernels.attention import triton as passes
    from kernels.attention.algebra_launch import Coefficients

    B, C, H, W = shape
    D, N = prior, H * W
    x, p = (torch.randn(B, N, c, device=device).to(dtype).mT for c in (C, D))
    mean, rstd = torch.zeros(B, N, device=device), torch.ones(B, N, device=device)
    gain, shift, cross = torch.randn(3, B, C, D, device=device).to(dtype).unbind()
    hzz, hpp = (torch.randn(B, c, c, device=device).to(dtype) for c in (C, D))
    dzs, dps = (torch.randn(B, c, device=device) for c in (C, D))
    units = torch.ones(5, B, device=device)
    coefficients = Coefficients(gain, shift, units, cross, hzz, hpp, dzs, dps)
    dx, dp = torch.empty_like(x), torch.empty_like(p)
    if kernel == "gram":
        return lambda: passes.gram_pass(x, p, 1e-6)
    if kernel == "apply":
        return lambda: passes.apply_pass(x, p, mean, rstd, coefficients, dx)
    if kernel == "reduce":
        return lambda: passes.reduce_pass(x, x, p, mean, rstd)
    return lambda: passes.gradient_pass(x, x, p, mean, rstd, coefficients, dx, dp)


def sweep_one(rows: Rows, kernel: str, shape: tuple[int, ...]) -> None:
    """µs of every permitted tile of one pass at one shape, this process; best first in the last row."""
    from kernels.attention import configs

    C, D, dtype = shape[1], 16 if rows.dry else 64, torch.float32 if rows.dry else torch.bfloat16
    wide = kernel in ("feature_gradient", "prior_gradient")
    if wide == configs.fused("gradient", C, D, dtype) or (kernel == "gram" and not configs.fused("gram", C, D, dtype)):
        return  # another route serves this width
    run = call_of(kernel, shape, D, dtype, rows.device)
    if rows.dry:
        try:
            run()
        except Exception as error:  # said in the row, and by the status of this process
            rows.write("sweep", kernel=kernel, shape=shape, error=repr(error)[:300])
            raise
        rows.write("sweep", kernel=kernel, shape=shape, us="called once")
        return
    widths = configs.tile_width(C), configs.tile_width(D)
    general, found = configs.GENERAL[(kernel, 2)], {}
    configs.BY_ARCHITECTURE.clear()
    for tile in TILES:
        if configs.refusal(kernel, 2, widths, tile, True):
            continue
        configs.GENERAL[(kernel, 2)] = {512: tile}
        try:
            run()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                for _ in range(20):
                    run()
                torch.cuda.synchronize()
            spent = [e.device_time for e in profile.events() if e.name.startswith(f"{kernel}_kernel")]
            if not spent:
                raise RuntimeError(f"no {kernel}_kernel was launched")
            found[tile] = sum(spent) / 20
        except Exception as error:  # a tile that does not fit is an answer too; its process ends with it
            rows.write("sweep", kernel=kernel, shape=shape, tile=tile, error=repr(error)[:300])
    configs.GENERAL[(kernel, 2)] = general
    best = sorted(found, key=found.get)
    loud = {} if best else {"error": "NO TILE WAS MEASURED"}
    rows.write("sweep", kernel=kernel, shape=shape, us={f"{n}/{w}": round(found[n, w], 1) for n, w in best}, **loud)
    if best:
        print(f'    ("{kernel}", 2): {{{max(widths)}: {best[0]}}},', flush=True)


def sweep(rows: Rows) -> None:
    """Each pass at each shape in a process of its own; in the interpreter all in one."""
    shapes = [",".join(map(str, shape)) for shape in (DRY_SHAPES if rows.dry else SHAPES)]
    words = [([kernel], [shape]) for kernel in PASSES for shape in shapes]
    for kernels, sizes in [(list(PASSES), shapes)] if rows.dry else words:
        if rows.left() <= 0.6 * rows.seconds:
            rows.write("sweep", stopped=f"the time was up at {kernels[0]} {sizes[0]}")
            return
        command = [sys.executable, "-m", "tests.gpu.two_sweep", "+".join(kernels), "+".join(sizes)]
        command += ["--out", str(rows.out), *(["--dry"] if rows.dry else [])]
        status, output = process(command, 90.0 if rows.dry else 40.0, **({"TRITON_INTERPRET": "1"} if rows.dry else {}))
        if status:
            rows.write("sweep", kernel=kernels, shape=sizes, status=status, error=output[-400:])


# -- steps ------------------------------------------------------------------------------------------------------------


def settings(backbone: str, batch: int, graphs: str, way: str) -> dict[str, object]:
    """Overrides of configs/large.yaml for a short run. way: bare, without the prior; frozen, with it, its student at
    rest from the first step on; learning, with all of it."""
    values = {"train.steps": 60, "train.distill_steps": 0, "train.batch": batch, "train.log_every": 5}
    values |= {"model.backbone": backbone, "model.prior": str(way != "bare").lower()}
    values |= {"train.student_frozen": str(way == "frozen").lower(), "model.student.width": 64, "model.spe.dim": 64}
    values |= {"engine.graphs": graphs, "engine.channels_last": "true", "eval.enabled": "false"}
    # The check of the kernels has a script of its own and would take this one's minute.
    return values | {"kernels.check": "false", "checkpoint.every": 1000, "data.workers": min(12, os.cpu_count() or 1)}


def steps(rows: Rows) -> None:
    """The last records of `metrics.jsonl` of each run, the median seconds of a step, and how they compare."""
    for backbone, batch, graphs, ways in DRY_STEPS if rows.dry else STEPS:
        bare = None
        for way in ways:
            name = f"{backbone.split(':')[1].strip(' }').split(',')[0]}-b{batch}-{way}-graphs-{graphs}"
            if rows.left() < 25:
                rows.write("step", stopped=f"the time was up at {name}")
                return
            seconds = step_seconds(rows, name, settings(backbone, batch, graphs, way))
            bare = seconds if way == "bare" else bare
            if way == "frozen":
                times = round(seconds / bare, 3) if seconds and bare else None
                rows.write("step", name=name, times_bare=times, goal=1.5)


def step_seconds(rows: Rows, name: str, values: dict[str, object]) -> float | None:
    """Median seconds of the steps in the second half of a run, None where it failed; writes its row."""
    root = tempfile.mkdtemp()
    values = values | {"run.root": root, "run.name": name}
    if rows.dry:
        values |= {"train.steps": 2, "train.log_every": 1, "data.crop": 64, "data.workers": 1, "model.levels": 3}
        values |= {"engine.precision": "fp32", "engine.zero": 0, "model.student.width": 16, "model.spe.dim": 16}
    command = [sys.executable, "train/main.py", "--config", "configs/large.yaml"]
    command += [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    status, output = process(command, min(150.0 if rows.dry else 60.0, rows.left() - 5))
    metrics = Path(root) / name / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    half = [line["seconds"] for line in lines if "seconds" in line and line["step"] > values["train.steps"] / 2]
    seconds = median(half) if half and status == 0 else None
    loud = {} if seconds is not None else {"error": output[-800:] or "it said nothing"}
    rows.write("step", name=name, status=status, seconds=seconds, metrics=lines[-1:], **loud)
    return seconds


def main() -> None:
    if len(sys.argv) > 2 and sys.argv[1].split("+")[0] in PASSES:  # passes at shapes, in this process
        kernels, shapes = (word.split("+") for word in sys.argv[1:3])
        del sys.argv[1:3]
        rows = Rows("two_sweep", __doc__)
        for kernel in kernels:
            for shape in shapes:
                sweep_one(rows, kernel, tuple(map(int, shape.split(","))))
        return
    rows = Rows("two_sweep", __doc__)
    rows.machine()
    sweep(rows)
    steps(rows)
    rows.write("end")


if __name__ == "__main__":
    main()
