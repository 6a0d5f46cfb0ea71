"""Small trees of every data-set layout, with pictures in them, and models small enough for tests."""

from pathlib import Path

import cv2
import numpy as np

from data.prepare.layouts import list_dataset
from model.pretrained import save_pretrained
from tests.data.prepare.test_layouts import BUILD
from train.config.file import configure
from train.config.networks import build_model


def picture(seed: int, height: int = 50, width: int = 66) -> np.ndarray:
    """A smooth picture with some noise, uint8 RGB."""
    rng = np.random.Generator(np.random.Philox(seed))
    coarse = rng.integers(0, 256, (6, 8, 3)).astype(np.float32)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)


def write_pair(sharp: Path, blurry: Path, seed: int) -> None:
    """A picture and its blurry version; the larger the seed modulo 7, the more blur."""
    image = picture(seed)
    cv2.imwrite(str(sharp), image[..., ::-1])
    length = 3 + 2 * (seed % 7)
    cv2.imwrite(str(blurry), cv2.blur(image, (length, 1 + seed % 3))[..., ::-1])


def tree(layout: str, root: Path, split: str | None = None, variant: str | None = None) -> Path:
    """A small data set of a layout as it is released; returns its root. RealBlur's cameras share a folder."""
    if not root.exists():
        BUILD[layout](root)
    for seed, pair in enumerate(list_dataset(layout, root, split=split, variant=variant, partial=True)):
        write_pair(pair.sharp, pair.blurry, seed)
    return root


def pairs_tree(root: Path, count: int = 5) -> Path:
    """Folders blur/ and sharp/ with so many pairs."""
    for kind in ("blur", "sharp"):
        (root / kind).mkdir(parents=True)
    for seed in range(count):
        write_pair(root / "sharp" / f"{seed}.png", root / "blur" / f"{seed}.png", seed)
    return root


def tiny_model(path: Path, *, scale: float = 1.0, prior: bool = False) -> Path:
    """An exported model that is a U-Net of 8 channels, which changes its input by a little, times `scale`."""
    settings = ["model.backbone={name: unet, width: 8, blocks: [1, 1]}", f"model.prior={str(prior).lower()}"]
    config = configure([*settings, "data.crop=64", "eval.crop=64", "eval.per_tier=1", "data.margin=16"])
    state = build_model(config).state_dict()
    state["backbone.leave.weight"] = state["backbone.leave.weight"] + 0.01 * scale  # fresh it gives back its input
    save_pretrained(path, state, config.model_dump(mode="json"))
    return path
