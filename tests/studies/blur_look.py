"""Pictures of what the presets draw: histograms of two presets side by side, and a contact sheet of every kind.

python -m tests.studies.blur_look OUT         # histograms.png, kinds/<generator>.png
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from data.blur import BlurConfig, sample_rng, synthesize_pair
from data.blur.generators import draw_path
from data.blur.paths import straightness_of, turning_of
from data.image import decode_image, encode_png
from data.look.preview import contact_sheet
from data.shards.set import ShardSet

SAMPLES = Path(__file__).parents[2] / "data" / "samples"
DRAWS, CROP = 400, 256
PATHS = ("gaussian_process", "boracchi_foi", "linear", "arc", "accelerated", "tremor", "settling")


def photographs() -> list[np.ndarray]:
    shards = ShardSet(SAMPLES / "val")
    return [decode_image(shards.read(n, shards.image_member(n))) for n in range(len(shards))]


def drawn(preset: str) -> dict[str, list[float]]:
    """Turning (degrees), straightness, extent (px) and trail (times white) as a preset draws them."""
    config = BlurConfig(preset=preset)
    shares = {name: share for name, share in config.generators.model_dump().items() if name in PATHS and share > 0}
    facts: dict[str, list[float]] = {"turning, °": [], "straightness": [], "extent, px": [], "trail, × white": []}
    for generator, share in shares.items():
        for seed in range(round(DRAWS * share)):
            path, _ = draw_path(sample_rng(seed, 0, generator, 0), generator, config.motion)
            facts["turning, °"].append(turning_of(path))
            facts["straightness"].append(straightness_of(path))
    photo = np.full((CROP, CROP, 3), 128, np.uint8)
    for seed in range(DRAWS):
        meta = synthesize_pair(photo, (0, 0, 32), sample_rng(seed, 0, "facts", 0), config).meta
        facts["extent, px"].append(meta["extent"])
        facts["trail, × white"].append(1 + max(meta["trail"], meta["highlight_boost"]))
    return facts


def draw_histograms(path: Path) -> None:
    found = {preset: drawn(preset) for preset in ("severe", "camera")}
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.4), layout="constrained")
    for axis, name in zip(axes, found["camera"], strict=True):
        both = np.concatenate([found[preset][name] for preset in found])
        edges = np.geomspace(1, 65, 25) if "trail" in name else np.linspace(0, np.quantile(both, 0.98), 30)
        for preset, facts in found.items():
            label = f"{preset}: median {np.median(facts[name]):.3g}"
            axis.hist(np.clip(facts[name], edges[0], edges[-1]), edges, alpha=0.6, label=label)
            print(f"{name:16} {preset:8} quartiles {np.quantile(facts[name], [0.25, 0.5, 0.75]).round(2)}")
        axis.set_xlabel(name)
        axis.legend()
        if "trail" in name:
            axis.set_xscale("log")
    figure.savefig(path, dpi=110)


def draw_kinds(folder: Path) -> None:
    photos = photographs()
    for generator in BlurConfig().generators.model_dump():
        pairs = []
        for number, tier in enumerate(("mild", "moderate", "severe", "extreme")):
            photo, config = photos[3 * number % len(photos)], BlurConfig(generators={generator: 1})
            box = (60, 60, CROP)
            pair = synthesize_pair(photo, box, sample_rng(number, 0, generator, 0), config, tier=tier)
            pairs.append({"sharp": pair.sharp, "blurry": pair.blurry, "kernel": pair.kernel, "key": "", **pair.meta})
        (folder / f"{generator}.png").write_bytes(encode_png(contact_sheet(pairs, side=CROP)))


def main(out: str) -> None:
    folder = Path(out)
    (folder / "kinds").mkdir(parents=True, exist_ok=True)
    draw_histograms(folder / "histograms.png")
    draw_kinds(folder / "kinds")


if __name__ == "__main__":
    main(*sys.argv[1:])
