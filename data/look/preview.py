"""Contact sheets of pairs, to look at what a network will be trained on: sharp, blurry, kernel, extent, PSNR."""

import base64
import html
import math
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from data.blur import TIERS, BlurConfig, sample_rng
from data.errors import DataError
from data.files import write_atomically
from data.image import encode_jpeg, encode_png
from data.shards.set import ShardSet
from data.stream.crops import CropPlan, check_crop_fits, margin_of
from data.stream.order import derived_rng
from data.stream.pairs import PAIRED, Sources, make_pair

_GAP, _BAR = 8, 22


def preview_pairs(
    shards: ShardSet, blur: BlurConfig, *, count: int, crop: int, margin: int, seed: int, tiers: Sequence[str] = TIERS
) -> list[dict]:
    """`count` pairs of a set for looking at: photographs drawn without repeats, tiers in turn (mildest first).

    Dicts with sharp, blurry uint8 [S, S, 3], kernel [k, k] or None, key, tier, generator, extent (px), input_psnr (dB).
    """
    if count < 1:
        raise DataError(f"count {count}: ask for at least one pair")
    check_crop_fits(shards, crop, "--crop")
    plan, sources = CropPlan(crop, seed, 0, margin_of(shards, blur, margin)), Sources([shards])
    tiers = (PAIRED,) if shards.kind == "pairs" else tuple(tiers)
    order = derived_rng("preview", seed).permutation(len(shards))
    pairs = []
    for number in range(count):
        # Ordered by tier, so that the sheet reads from mild to extreme.
        tier = tiers[number * len(tiers) // count]
        turn, place = divmod(number, len(order))
        sample = int(order[place])
        sharp, blurry = sources.photograph(0, sample)
        key = shards.key(sample)
        rng = sample_rng(seed, turn, f"preview:{key}", number)
        box = plan.at(key, *sharp.shape[:2], number)
        pair = make_pair(sharp, blurry, box, rng, blur, tier=tier)
        pairs.append({"sharp": pair.sharp, "blurry": pair.blurry, "kernel": pair.kernel, "key": key, **pair.meta})
    return pairs


def kernel_picture(kernel: np.ndarray | None, side: int) -> np.ndarray:
    """A kernel [k, k] as a grey picture uint8 [side, side, 3], true to scale up to `side` px, small ones enlarged."""
    picture = np.zeros((side, side), np.uint8)
    if kernel is not None and kernel.max() > 0:
        # Square root: a path that rests at its ends would otherwise show as two dots.
        shown = np.sqrt(kernel / kernel.max()) * 255
        factor = max(1, side // max(kernel.shape))
        shown = np.kron(shown.astype(np.uint8), np.ones((factor, factor), np.uint8))
        if max(shown.shape) > side:
            shown = cv2.resize(shown, (side, side), interpolation=cv2.INTER_AREA)
        top, left = (side - shown.shape[0]) // 2, (side - shown.shape[1]) // 2
        picture[top : top + shown.shape[0], left : left + shown.shape[1]] = shown
    return cv2.cvtColor(picture, cv2.COLOR_GRAY2RGB)


def caption(pair: dict) -> str:
    """`severe 54 px, gaussian_process, 22.3 dB`, as far as it is known."""
    extent = "" if math.isnan(pair["extent"]) else f" {pair['extent']:.0f} px"
    return f"{pair['tier']}{extent}, {pair['generator']}, {pair['input_psnr']:.1f} dB"


def contact_sheet(pairs: Sequence[dict], *, side: int = 256, columns: int = 2) -> np.ndarray:
    """Contact sheet uint8 [H, W, 3] of pairs: sharp, blurry and kernel side by side, caption above each."""
    columns = min(columns, len(pairs))
    cells = []
    for pair in pairs:
        pictures = [
            cv2.resize(pair[name], (side, side), interpolation=cv2.INTER_AREA)
            if pair[name].shape[0] != side
            else pair[name]
            for name in ("sharp", "blurry")
        ]
        strip = np.hstack([*pictures, kernel_picture(pair["kernel"], side)])
        bar = np.full((_BAR, strip.shape[1], 3), 255, np.uint8)
        text = f"{pair['key']}: {caption(pair)}"
        cv2.putText(bar, text, (2, _BAR - 7), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
        cells.append(
            cv2.copyMakeBorder(np.vstack([bar, strip]), 0, _GAP, 0, _GAP, cv2.BORDER_CONSTANT, value=(255,) * 3)
        )
    cells += [np.full_like(cells[0], 255)] * (-len(cells) % columns)
    return np.vstack([np.hstack(cells[i : i + columns]) for i in range(0, len(cells), columns)])


def write_contact_sheet(path: str | Path, pairs: Sequence[dict], **layout: int) -> Path:
    """Write the contact sheet as PNG or JPEG, by the name's suffix; returns the path."""
    path = Path(path)
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise DataError(f"{path}: a contact sheet is a .png or .jpg file; change the name")
    sheet = contact_sheet(pairs, **layout)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, encode_png(sheet) if path.suffix.lower() == ".png" else encode_jpeg(sheet, 92))
    return path


_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body{{font:14px sans-serif;margin:24px;max-width:1200px}}figure{{display:inline-block;margin:0 16px 20px 0}}
figure img{{display:inline-block;margin-right:4px}}figcaption{{padding:4px 0}}</style>
<h1>{title}</h1><p>Each row: sharp, blurry (hover: sharp), kernel (square root, so that faint parts show).</p>
{figures}</html>
"""
_FIGURE = """<figure><figcaption>{caption}</figcaption><img src="{sharp}" alt="sharp"><img src="{blurry}" alt="blurry"
onmouseover="this.src=this.previousElementSibling.src" onmouseout="this.src='{blurry}'"><img src="{kernel}"
alt="kernel"></figure>
"""


def html_page(pairs: Sequence[dict], title: str = "Synthesized pairs") -> str:
    """One self-contained HTML page of the pairs; pointing at a blurry picture shows the sharp one in its place."""
    figures = []
    for pair in pairs:
        kernel = encode_png(kernel_picture(pair["kernel"], 256))
        sources = {
            "sharp": b"data:image/jpeg;base64," + base64.b64encode(encode_jpeg(pair["sharp"], 92)),
            "blurry": b"data:image/jpeg;base64," + base64.b64encode(encode_jpeg(pair["blurry"], 92)),
            "kernel": b"data:image/png;base64," + base64.b64encode(kernel),
        }
        text = html.escape(f"{pair['key']}: {caption(pair)}")
        figures.append(_FIGURE.format(caption=text, **{name: data.decode() for name, data in sources.items()}))
    return _PAGE.format(title=html.escape(title), figures="".join(figures))


def write_html_page(path: str | Path, pairs: Sequence[dict], title: str = "Synthesized pairs") -> Path:
    """Write `html_page` and return the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, html_page(pairs, title).encode())
    return path
