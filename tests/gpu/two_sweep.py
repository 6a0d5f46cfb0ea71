"""Second script for a GPU: tiles and warps of each pass, then whole training steps. Rows into $OUT/two_sweep.jsonl.

    python -m tests.gpu.two_sweep [--seconds 240] [--dry]

The sweep prints the launch table's rows to paste; a tile that `configs.refusal` excludes is never tried. Steps are
those of `train/main.py` itself, without and with the prior, with `engine.graphs` off and on where the configuration
has that key.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import torch

from tests.gpu.rows import Rows, process

SHAPES = ((8, 64, 128, 128), (8, 128, 64, 64), (8, 32, 256, 256), (8, 256, 32, 32))
TILES = ((64, 4), (64, 8), (128, 4), (128, 8), (256, 8))
PASSES = ("gradient", "gram", "apply", "reduce", "feature_gradient", "prior_gradient")
PRIOR = 64


def sweep_one(rows: Rows, kernel: str, shape: tuple[int, ...]) -> None:
    """µs of every permitted tile of one pass at one shape, this process; best first in the last row."""
    from kernels.attention import configs
    from kernels.attention import triton as passes
    from kernels.attention.algebra import Modulation, gram_size, split_grams

    B, C, H, W = shape
    D, N, dtype = PRIOR, H * W, torch.bfloat16
    x, p = (torch.randn(B, N, c, dtype=dtype, device="cuda").mT for c in (C, PRIOR))
    mean, rstd = torch.zeros(B, N, device="cuda"), torch.ones(B, N, device="cuda")
    modulation = Modulation(*torch.randn(2, B, C, D, device="cuda").unbind())
    grams = split_grams(torch.randn(B, gram_size(C, D), device="cuda"), C, D)
    dx, dp = torch.empty_like(x), torch.empty_like(p)

    def run() -> None:
        if kernel == "gram":
            passes.gram_pass(x, p, 1e-6)
        elif kernel == "apply":
            passes.apply_pass(x, p, mean, rstd, modulation, dx)
        elif kernel == "reduce":
            passes.reduce_pass(x, x, p, mean, rstd)
        else:
            passes.gradient_pass(x, x, p, mean, rstd, modulation, grams, dx, dp)

    wide = kernel in ("feature_gradient", "prior_gradient")
    if wide == configs.fused("gradient", C, D, dtype) or (kernel == "gram" and not configs.fused("gram", C, D, dtype)):
        return  # another route serves this width
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
            found[tile] = sum(spent) / 20
        except Exception as error:  # a tile that does not fit is an answer too; its process ends with it
            rows.write("sweep", kernel=kernel, shape=shape, tile=tile, error=repr(error)[:120])
    configs.GENERAL[(kernel, 2)] = general
    best = sorted(found, key=found.get)
    rows.write("sweep", kernel=kernel, shape=shape, us={f"{n}/{w}": round(found[n, w], 1) for n, w in best})
    if best:
        print(f'    ("{kernel}", 2): {{{max(widths)}: {best[0]}}},', flush=True)


def steps(rows: Rows) -> None:
    """Rows of `metrics.jsonl` of short runs of train/main.py: small UNet, batch 16 and 64."""
    from train.config.schema import EngineSection

    modes = ("off", "on") if "graphs" in EngineSection.model_fields else (None,)
    variants = [(b, p, g, cl) for b in (16, 64) for p in (True, False) for g in modes for cl in (True,)]
    variants += [(16, p, modes[0], False) for p in (True, False)]
    if rows.dry:
        variants = [(2, False, None, False)]
    for batch, prior, graphs, channels_last in variants:
        if rows.left() < 25:
            rows.write("step", stopped="the time was up")
            return
        name = f"b{batch}-{'prior' if prior else 'bare'}-{graphs}-{'cl' if channels_last else 'nchw'}"
        root = tempfile.mkdtemp()
        values = {"run.root": root, "run.name": name, "train.steps": 60, "train.distill_steps": 0, "train.batch": batch}
        values |= {"eval.enabled": "false", "checkpoint.every": 1000, "data.workers": min(12, os.cpu_count() or 1)}
        values |= {"model.prior": str(prior).lower(), "engine.channels_last": str(channels_last).lower()}
        values |= {"model.backbone.width": 32, "model.student.width": 64, "model.spe.dim": 64, "engine.graphs": graphs}
        if rows.dry:
            values |= {"train.steps": 2, "data.crop": 64, "model.backbone": "{name: unet, width: 8, blocks: [1, 1]}"}
            values |= {"data.workers": 1, "engine.precision": "fp32", "engine.zero": 0}
            values.pop("model.backbone.width")
        fields = EngineSection.model_fields
        command = [sys.executable, "train/main.py", "--config", "configs/large.yaml"]
        for key, value in values.items():
            if value is not None and (not key.startswith("engine.") or key.split(".")[1] in fields):
                command += ["--set", f"{key}={value}"]
        status, output = process(command, min(150.0 if rows.dry else 60.0, rows.left() - 5))
        metrics = Path(root) / name / "metrics.jsonl"
        lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
        rows.write("step", name=name, status=status, metrics=lines[-2:], end="" if lines else output[-800:])


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] in PASSES:  # one pass at one shape, in this process
        kernel, shape = sys.argv[1], tuple(map(int, sys.argv[2].split(",")))
        del sys.argv[1:3]
        sweep_one(Rows("two_sweep", __doc__), kernel, shape)
        return
    rows = Rows("two_sweep", __doc__)
    rows.machine()
    for kernel in () if rows.dry else PASSES:
        for shape in SHAPES:
            if rows.left() > 0.6 * rows.seconds:
                words = [sys.executable, "-m", "tests.gpu.two_sweep", kernel, ",".join(map(str, shape))]
                status, output = process([*words, "--out", str(rows.out)], 40.0)
                if status:
                    rows.write("sweep", kernel=kernel, shape=shape, status=status, end=output[-300:])
    steps(rows)
    rows.write("end", **({"launches": "not swept on a CPU"} if rows.dry else {}))


if __name__ == "__main__":
    main()
