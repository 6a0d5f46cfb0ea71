"""What the demo says of a result, as HTML in which everything that came from outside is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from train.demo.photo import SHOWN, Photo
from train.demo.play import Row, best_trivial

EQUAL = 0.05  # dB that no eye tells apart
BAR_FROM = 3.0  # dB below the lowest score where the bars begin


def said_of_photo(photo: Photo, model: str, how: str) -> str:
    """Size, time and model; and that nobody knows how good it is."""
    height, width = photo.before.shape[:2]
    facts = [f"{width} × {height} px", f"{8 * photo.before.itemsize} bits", how, f"{photo.seconds:.1f} s", model]
    text = f'<p class="facts">{" · ".join(escape(fact) for fact in facts)}</p>'
    if max(width, height) > SHOWN:
        text += f'<p class="facts">Shown at {SHOWN} px; the download has all pixels.</p>'
    return text


def refused(problem: str) -> str:
    """In place of a result."""
    return f'<div class="verdict bad">{escape(problem)}</div>'


def unknown_truth() -> str:
    """Below a visitor's own photograph."""
    return (
        '<p class="note">No score: nobody has the sharp original of this photograph. Look closely, and do not take '
        "invented detail for what was there. In the playground the original is known, and so is the score.</p>"
    )


def scoreboard(rows: Sequence[Row]) -> str:
    """A verdict against the best trivial restoration, and a bar of PSNR and the SSIM of every picture."""
    best, ours = best_trivial(rows), next(row for row in rows if row.kind == "ours")
    gain = ours.scores["psnr"] - best.scores["psnr"]
    if gain > EQUAL and ours.scores["ssim"] < best.scores["ssim"]:
        mood, said = "warning", f"The model is {gain:.2f} dB better, but worse by SSIM, than the best without one"
    elif gain > EQUAL:
        mood, said = "good", f"The model is {gain:.2f} dB better than the best anyone can do without one"
    elif gain < -EQUAL:
        mood, said = "bad", f"The model is {-gain:.2f} dB WORSE than the best anyone can do without one"
    else:
        mood, said = "warning", f"The model is no better ({gain:+.2f} dB) than the best anyone can do without one"
    low = min(row.scores["psnr"] for row in rows) - BAR_FROM
    high = max(row.scores["psnr"] for row in rows)
    told = any(row.kind == "told" for row in rows)
    told = " The Wiener filter is told how the camera moved, which the model has to guess." if told else ""
    lines = "".join(_line(row, (row.scores["psnr"] - low) / (high - low), row is best) for row in rows)
    return (
        f'<div class="verdict {mood}">{said}: {escape(best.name)}.</div>'
        f'<table class="scores"><thead><tr><th></th><th>PSNR</th><th></th><th>SSIM</th></tr></thead><tbody>{lines}'
        '</tbody></table><p class="note">Smoothing and unsharp mask have the settings that are best for this very '
        f"picture, chosen with the sharp one in hand.{told}</p>"
    )


def _line(row: Row, share: float, best: bool) -> str:
    name = escape(row.name) + (" <small>best without a model</small>" if best else "")
    return (
        f'<tr class="{row.kind}"><td>{name}</td><td class="number">{row.scores["psnr"]:.2f} dB</td>'
        f'<td class="bar"><i style="width:{100 * share:.1f}%"></i></td>'
        f'<td class="number">{row.scores["ssim"]:.4f}</td></tr>'
    )
