"""The demo's page: what stands where, and which act follows what."""

from __future__ import annotations

import functools
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from train.demo import play, words
from train.demo.acts import Acts, How, Played
from train.demo.examples import CREDIT, blurry_examples, sharp_photos
from train.demo.models import TILES
from train.demo.visit import Visit
from train.restore.picture import READABLE

HERE = Path(__file__).parent
FIRST, FIRST_PATH = 1, 5  # of the examples, and the seed of a path that is worth a look
LISTENING = {"api_visibility": "private", "concurrency_id": "model", "concurrency_limit": 1}
BANNER = """<div class="banner"><h1>sharpprior</h1><p>Takes severe motion blur out of photographs, with a prior learned
from another vision task. Where the sharp original is known, results are scored against what anyone can do without a
model.</p></div>"""


def build(acts: Acts, *, local: bool) -> gr.Blocks:
    """The page. local: whether only this machine reaches it, which it says."""
    seconds = acts.limits.minutes * 60
    with gr.Blocks(
        title="sharpprior", analytics_enabled=False, delete_cache=(60, int(max(60, seconds))), fill_width=True
    ) as page:
        gr.HTML(BANNER)
        with gr.Accordion("Model and tiles", open=False), gr.Row():
            labels = acts.models.labels
            model = gr.Dropdown(labels, value=labels[0], label="Model", elem_id="model", interactive=len(labels) > 1)
            tile = gr.Dropdown(
                list(TILES), value=TILES[0], label="Tile", elem_id="tile",
                info="Side in px; auto suits the model and the free memory.",
            )  # fmt: skip
            ensemble = gr.Checkbox(label="Self-ensemble", info="Mean of eight flips and turns; eight times as slow.")
        how = [model, tile, ensemble]
        with gr.Tabs():
            with gr.Tab("Your photograph"):
                photo = _photo_tab(acts, how, seconds)
            with gr.Tab("Playground"):
                played = _play_tab(acts, how)
        first = functools.cache(lambda: _first_look(acts))
        page.load(first, None, [*photo, *played], show_progress="hidden", **LISTENING)
        where = "this machine alone: nothing leaves it" if local else "the machine that serves this page"
        limits = f"Up to {acts.limits.megabytes:g} MB and {acts.limits.megapixels:g} megapixels."
        kept = f"Pictures are processed on {where}, and deleted after {acts.limits.minutes:g} minutes."
        gr.HTML(f'<p class="note">{limits} {kept}<br>{escape(CREDIT)}</p>')
    return page


def _first_look(acts: Acts) -> tuple:
    """What a visitor finds: an example restored, and a blur played with."""
    how, visit = How(acts.models.labels[0]), Visit.begin(acts.root)
    pictures, said, *_ = acts.restore_example(blurry_examples()[FIRST], 1.0, how, visit)
    visit.end()
    points, extent = play.sample_path("severe", np.random.default_rng(FIRST_PATH))
    done = acts.play(next(iter(sharp_photos().values())), points, extent, 1.0, how)
    return pictures, f'<p class="facts">An example:</p>{said}', *_as_shown(done), {"points": points}, extent


def _as_shown(done: Played) -> tuple:
    return done.sharp, (done.blurry, done.restored), done.words, done.kernel


def _photo_tab(acts: Acts, how: list, seconds: float) -> list:
    """The tab; the components that a first look fills."""
    examples = blurry_examples()
    visit = gr.State(None, time_to_live=seconds, delete_callback=lambda value: value and value.end())
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            file = gr.File(
                label="A blurry photograph: drop it here, or click", file_types=list(READABLE), height=150,
                elem_id="upload",
            )  # fmt: skip
            again = gr.Button("Restore", variant="primary", elem_id="restore")
            strength = gr.Slider(
                0, 1, value=1, step=0.05, label="Strength", elem_id="strength",
                info="0: the photograph as it is; 1: all that the model does.",
            )  # fmt: skip
            gr.HTML('<p class="lead">No photograph at hand? Take one of these; their originals are known.</p>')
            gallery = gr.Gallery(
                [(each.blurry, each.tier) for each in examples], show_label=False, columns=4, height="auto",
                allow_preview=False, object_fit="cover", buttons=[], elem_id="examples", interactive=False,
                format="jpeg",
            )  # fmt: skip
        with gr.Column(scale=3, min_width=320):
            slider = gr.ImageSlider(
                label="Left: before. Right: restored", format="png", type="numpy", interactive=False, max_height=640,
                elem_id="compare", buttons=["fullscreen"],
            )  # fmt: skip
            told = gr.HTML(elem_id="told")
            download = gr.DownloadButton("Download", interactive=False, elem_id="download")
    outputs = [slider, told, download, visit]

    def answer(result: tuple) -> tuple:
        pictures, said, path, value = result
        return pictures, said, gr.DownloadButton(f"Download {path.name}", value=str(path), interactive=True), value

    def blank(said: str) -> tuple:
        return None, said, gr.DownloadButton("Download", value=None, interactive=False), gr.skip()

    @refusing(blank)
    def restore(path, strength, model, tile, ensemble, visit, progress=gr.Progress()):  # noqa: B008 (gradio's way)
        if path is None:
            raise ValueError("choose a photograph first: drop one, or take one of the examples")
        chosen = How(model, tile, ensemble)
        return answer(acts.restore(Path(path), strength, chosen, visit, shown_by(progress)))

    @refusing(blank)
    def example(event: gr.SelectData, strength, model, tile, ensemble, visit, progress=gr.Progress()):  # noqa: B008
        chosen = How(model, tile, ensemble)
        return answer(acts.restore_example(examples[event.index], strength, chosen, visit, shown_by(progress)))

    @refusing(lambda said: blank(said)[:3])
    def blend(strength: float, visit: Visit | None):
        if visit is None or visit.photo is None:
            return gr.skip(), gr.skip(), gr.skip()
        pictures, _, path = acts.blend(strength, visit)
        return pictures, gr.skip(), gr.DownloadButton(value=str(path))

    inputs = [strength, *how, visit]
    file.upload(restore, [file, *inputs], outputs, show_progress_on=slider, **LISTENING)
    again.click(restore, [file, *inputs], outputs, show_progress_on=slider, **LISTENING)
    gallery.select(example, inputs, outputs, show_progress_on=slider, **LISTENING)
    strength.release(blend, [strength, visit], outputs[:3], show_progress="hidden", **LISTENING)
    return outputs[:2]


def _play_tab(acts: Acts, how: list) -> list:
    """The tab; the components that a first look fills."""
    photos = sharp_photos()
    first = next(iter(photos.values()))
    sharp = gr.State(first)
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            pad = gr.HTML(
                {"points": []}, html_template=(HERE / "pad.html").read_text(encoding="utf-8"),
                js_on_load=(HERE / "pad.js").read_text(encoding="utf-8"), elem_id="pad", apply_default_css=False,
            )  # fmt: skip
            extent = gr.Slider(
                *play.EXTENTS, value=45, step=1, label="Extent of the motion, px", elem_id="extent",
                info="15 moderate, 30 severe, 80 extreme.",
            )  # fmt: skip
            with gr.Row():
                tier = gr.Dropdown(
                    ["mild", "moderate", "severe", "extreme"], value="severe", show_label=False, container=False,
                    min_width=110, elem_id="tier",
                )  # fmt: skip
                shake = gr.Button("Shake the camera", variant="primary", elem_id="shake", min_width=150)
            noise = gr.Slider(0, 5, value=1, step=0.5, label="Sensor noise", info="1: an ordinary camera's.")
            gr.HTML('<p class="lead">Sharp photograph</p>')
            gallery = gr.Gallery(
                [(photo, title) for title, photo in photos.items()], show_label=False, columns=5, height="auto",
                allow_preview=False, object_fit="cover", buttons=[], elem_id="sharp-photos", interactive=False,
                format="jpeg",
            )  # fmt: skip
            own = gr.File(label="Or a sharp one of yours", file_types=list(READABLE), height=140, elem_id="own")
        with gr.Column(scale=3, min_width=320):
            slider = gr.ImageSlider(
                label="Left: blurry. Right: restored", format="png", type="numpy", interactive=False,
                max_height=560, elem_id="play-compare", buttons=["fullscreen"],
            )  # fmt: skip
            told = gr.HTML(elem_id="scores")
            with gr.Row():
                shown = gr.Image(
                    label="Sharp original", format="png", interactive=False, buttons=[], height=230, elem_id="original",
                    value=first,
                )  # fmt: skip
                kernel = gr.Image(
                    label="Kernel", format="png", image_mode="L", interactive=False, buttons=[], height=230,
                    elem_id="kernel", elem_classes="kernel",
                )  # fmt: skip

    @refusing(lambda said: (gr.skip(), None, said, None))
    def played(sharp, value, extent, noise, model, tile, ensemble, progress=gr.Progress()):  # noqa: B008
        points = value.get("points") if isinstance(value, dict) else None
        if not points:
            return sharp, *[gr.skip()] * 3
        done = acts.play(sharp, points, extent, noise, How(model, tile, ensemble), shown_by(progress))
        return _as_shown(done)

    def shaken(tier: str):
        points, extent = play.sample_path(tier, np.random.default_rng())
        return {"points": points}, extent

    def chosen(event: gr.SelectData):
        return list(photos.values())[event.index]

    def own_photo(path):
        try:
            return acts.own_sharp(Path(path))
        except ValueError as error:  # what would follow does not
            raise gr.Error(escape(str(error)), duration=12, print_exception=False) from None

    run = {"fn": played, "inputs": [sharp, pad, extent, noise, *how], "outputs": [shown, slider, told, kernel]}
    run |= {"show_progress_on": slider, **LISTENING}
    quick = {"api_visibility": "private", "show_progress": "hidden"}
    pad.input(**run)
    extent.release(**run)
    noise.release(**run)
    shake.click(shaken, tier, [pad, extent], **quick).then(**run)
    gallery.select(chosen, None, sharp, **quick).then(**run)
    own.upload(own_photo, own, sharp, **quick).success(**run)
    return [*run["outputs"], pad, extent]


def shown_by(progress: gr.Progress) -> Callable[[int, int], None]:
    """Tiles done, as the page's progress."""
    return lambda done, every: progress((done, every), desc="restoring", unit="tiles")


def refusing(blank: Callable[[str], tuple]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """An act that tells what its visitor got wrong, as text and never as HTML, and leaves nothing of an older result
    beside it: `blank` makes the outputs of such words."""

    def around(act: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(act)
        def guarded(*values: Any, **named: Any) -> Any:
            try:
                return act(*values, **named)
            except ValueError as error:
                gr.Warning(escape(str(error)), duration=12, title="Not done")
                return blank(words.refused(str(error)))

        return guarded

    return around
