"""One HTML file that needs nothing else: no network, no folder of pictures beside it."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from data.files import write_atomically
from train.page.chart import Interval, Series, draw_chart, draw_intervals

Mood = Literal["plain", "note", "good", "warning", "bad"]
STYLE, SCRIPT = ((Path(__file__).parent / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
ENLARGED = 520  # px of the screen that a small picture is enlarged to, by whole factors
_NUMBER = re.compile(r"[-+−±≥≤<>~]?\s*[\d.,]+\s*(%|dB|s|ms|px|×)?( \(.*\)| → [\d.,]+)?|n/a|–|—|")


class Page:
    """A page that grows from top to bottom: every method but `html` and `write` adds a block below the others.

    title: its heading and the name of its tab; subtitle: a line below it, and behind that the time it was `written`,
    seconds since 1970. refresh: seconds after which a browser reads the file again, for a page that is still being
    written; the browser tells where that was long ago. Every text is shown as it is given, never read as HTML, and a
    policy in the file forbids browsers to fetch or run anything that is not in it.
    """

    def __init__(
        self, title: str, *, subtitle: str = "", refresh: int | None = None, written: float | None = None
    ) -> None:
        self.title, self.subtitle, self.refresh, self.written = title, subtitle, refresh, written
        self._blocks: list[str] = []

    def heading(self, text: str) -> None:
        """The heading of what follows."""
        self._blocks.append(f"<h2>{escape(text)}</h2>")

    def text(self, text: str, mood: Mood = "plain") -> None:
        """A paragraph (an empty line begins another). mood: `note` is smaller; `good`, `warning` and `bad` are boxes
        for what a reader must see first."""
        parts = "".join(f"<p>{escape(part.strip())}</p>" for part in text.split("\n\n") if part.strip())
        self._blocks.append(f'<div class="text {mood}">{parts}</div>')

    def facts(self, facts: Mapping[str, object]) -> None:
        """Names and values, in two columns."""
        rows = "".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>" for name, value in facts.items()
        )
        self._blocks.append(f'<dl class="facts">{rows}</dl>')

    def table(self, heads: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "") -> None:
        """A table that scrolls sideways inside itself where it is too wide; a column of numbers is set to the right.

        ValueError for a row with another number of cells than there are heads.
        """
        cells = [[str(cell) for cell in row] for row in rows]
        wrong = [row for row in cells if len(row) != len(heads)]
        if wrong:
            raise ValueError(f"a row of {len(wrong[0])} cells under {len(heads)} heads: {wrong[0]}")
        right = [bool(cells) and all(_NUMBER.fullmatch(row[n].strip()) for row in cells) for n in range(len(heads))]

        def line(tag: str, texts: Sequence[str]) -> str:
            inner = (
                f"<{tag}{' class=number' if right[n] else ''}>{escape(text)}</{tag}>" for n, text in enumerate(texts)
            )
            return f"<tr>{''.join(inner)}</tr>"

        body = "".join(line("td", row) for row in cells)
        above = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
        self._blocks.append(
            f'<figure class="table">{above}<div class="scroll" tabindex="0"><table><thead>{line("th", heads)}</thead>'
            f"<tbody>{body}</tbody></table></div></figure>"
        )

    def chart(
        self, series: Sequence[Series], *, x: str, y: str, title: str = "", log: bool = False, wide: bool = False
    ) -> None:
        """Lines or points over a common x, with values where the pointer is. Two stand side by side where there is
        room, one that is `wide` has the row alone. ValueError as `draw_chart`."""
        self._blocks.append(draw_chart(series, x=x, y=y, title=title, log=log, wide=wide))

    def intervals(self, rows: Sequence[Interval], *, x: str, title: str = "", wide: bool = False) -> None:
        """A dot with its interval for every name, on one axis with a line at 0: whether an interval holds 0 is seen."""
        self._blocks.append(draw_intervals(rows, x=x, title=title, wide=wide))

    def slider(self, before: np.ndarray, after: np.ndarray, labels: tuple[str, str], caption: str = "") -> None:
        """Two pictures, uint8 RGB [H, W, 3] or grey [H, W], on top of each other with a line to drag, by pointer,
        finger or arrow keys. labels: what each is, before first. ValueError where their sizes differ."""
        if before.shape[:2] != after.shape[:2]:
            raise ValueError(f"{before.shape[:2]} and {after.shape[:2]}: a slider's pictures have one size")
        height, width = before.shape[:2]
        first, second = (escape(label) for label in labels)
        size, sharp = _shown(width)
        wide = "" if size <= ENLARGED else " wide"
        self._blocks.append(
            f'<figure class="slider{wide}"><div class="compare{sharp}" style="max-width:{size}px;'
            f'aspect-ratio:{width}/{height}">{_image(after, labels[1])}{_image(before, labels[0], "before")}'
            f'<span class="tag left">{first}</span><span class="tag right">{second}</span><i class="bar"></i>'
            f'<input type="range" min="0" max="100" value="50" step="1" aria-label="{first} or {second}"></div>'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )

    def pictures(self, pictures: Sequence[tuple[np.ndarray, str]]) -> None:
        """A row of (uint8 RGB [H, W, 3] or grey [H, W], caption), which breaks where the screen is narrow."""
        figures, widest = [], 1
        for image, caption in pictures:
            size, sharp = _shown(image.shape[1], 320)
            widest = max(widest, size)
            figures.append(
                f'<figure style="max-width:{size}px">{_image(image, caption, sharp.strip())}'
                f"<figcaption>{escape(caption)}</figcaption></figure>"
            )
        many = " many" if len(figures) > 3 else ""
        columns = f"--n:{min(len(figures), 4)};--w:{widest}px"
        self._blocks.append(f'<div class="pictures{many}" style="{columns}">{"".join(figures)}</div>')

    def code(self, text: str, summary: str) -> None:
        """Lines as they are (a configuration, a log), folded away under their summary."""
        self._blocks.append(
            f'<details class="code"><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>'
        )

    def html(self) -> str:
        """The whole file."""
        sum_ = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
        policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{sum_}'"
        refresh = f'<meta http-equiv="refresh" content="{int(self.refresh)}">' if self.refresh is not None else ""
        under = [escape(self.subtitle)] if self.subtitle else []
        if self.written is not None:
            told = datetime.fromtimestamp(self.written, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
            under.append(f'<time data-written="{self.written:.0f}">written {told}</time>')
        subtitle = f'<p class="subtitle">{" · ".join(under)}</p>' if under else ""
        blocks = "\n".join(self._blocks)
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">{refresh}\n'
            f'<title>{escape(self.title)}</title>\n<link rel="icon" href="data:,">\n<style>{STYLE}</style></head>\n'
            f"<body><header><h1>{escape(self.title)}</h1>{subtitle}</header>\n<main>\n{blocks}\n</main>\n"
            f"<script>{SCRIPT}</script></body></html>\n"
        )

    def write(self, path: Path) -> None:
        """The file, whole or not at all: a browser that reads it meanwhile has the old one or the new. OSError."""
        write_atomically(path, self.html(), durable=False)


def _shown(width: int, wanted: int = ENLARGED) -> tuple[int, str]:
    """Width on the screen in px of a picture `width` wide, and the class of one whose pixels are to be seen."""
    factor = max(1, wanted // width)
    return width * factor, " enlarged" if factor > 2 else ""


def _image(image: np.ndarray, text: str, kind: str = "") -> str:
    """An <img> that holds its picture, without loss. ValueError for what is no picture of 8 bits."""
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        raise ValueError(f"{image.dtype} {list(image.shape)}: a page shows uint8 [H, W, 3] or [H, W]")
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", compress_level=2)  # a live page is written often: time before size
    data = base64.b64encode(file.getvalue()).decode()
    height, width = image.shape[:2]
    named = f' class="{kind}"' if kind else ""
    return f'<img{named} src="data:image/png;base64,{data}" alt="{escape(text)}" width="{width}" height="{height}">'
