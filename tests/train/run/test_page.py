"""The page of a run: honest words, lines that keep their extremes, a file that is current and costs little."""

import re
import time

import numpy as np
import pytest

from train.config.schema import Config
from train.evaluate.scores import Evaluation, Score
from train.run import live
from train.run.folder import RunFolder
from train.run.live import MOST, LivePage, Thinned
from train.run.page import POINTS, State, _envelope, _median, run_page, verdicts

CONFIG = Config.model_validate({"run": {"name": "a"}, "data": {"train": "t", "val": "v"}, "train": {"steps": 100}})


def tier(name: str, over: float, low: float | None, high: float | None, gain: float = 0.5, **more: object) -> dict:
    row = {"tier": name, "pairs": 4, "samples": 4, "gain": gain, "low": 0.0, "high": 1.0, "trivial": "gaussian"}
    row |= {f"{of}_{metric}": 20.0 for of in ("input", "restored") for metric in ("psnr", "ssim")}
    over_it = {"over_trivial": over, "over_low": low, "over_high": high}
    return row | over_it | {"yardsticks": {"gaussian": {"psnr": 20.25, "ssim": 0.5}}} | more


def step(n: int, loss: float = 1.0) -> dict:
    return {"step": n, "loss": loss, "pixel": loss / 2, "lr": 1e-3, "grad_norm": 2.0, "wait_share": 0.1, "seconds": 0.5,
            "cpu_s": 0.4, "pairs_per_s": 8.0, "shares": {"backbone": 0.7, "rest": 0.3}}  # fmt: skip


def evaluation() -> Evaluation:
    picture = np.zeros((16, 16, 3), np.uint8)
    score = Score("photo<1>", "severe", 40.0, {"psnr": 20.0, "ssim": 0.5}, {"psnr": 20.5, "ssim": 0.6})
    return Evaluation([score], pictures=[(score, picture, picture, picture)])


@pytest.mark.parametrize(
    ("row", "said", "mood"),
    [
        (
            tier("severe", 0.2, 0.1, 0.3),
            "better than the best trivial (Gaussian smoothing), +0.200 dB (+0.100 … +0.300)",
            "good",
        ),
        (tier("severe", 0.1, -0.1, 0.3), "not to be told from the best trivial (Gaussian smoothing)", "warning"),
        (
            tier("severe", -0.2, -0.3, -0.1, gain=0.4),
            "WORSE than the best trivial (Gaussian smoothing), -0.200 dB",
            "bad",
        ),
        (tier("severe", 0.2, None, None), "one sample says too little about", "warning"),
        (tier("severe", 0.2, 0.1, 0.3, trivial="input"), "better than the best trivial (the blurry input)", "good"),
    ],
)
def test_the_words_are_about_the_best_trivial_whatever_the_gain_over_the_blurry(row, said, mood):
    ((sentence, found),) = verdicts([row, tier("mild", 9.0, 8.0, 10.0)])
    assert said in sentence
    assert found == mood


def test_harm_to_pictures_without_blur_is_told():
    rows = [tier("severe", 0.2, 0.1, 0.3), tier("identity", -3.0, -4.0, -2.0, gain=-3.0)]
    assert [mood for _, mood in verdicts(rows)] == ["good", "bad"]
    assert "lose 3.00 dB" in verdicts(rows)[1][0]
    rows[1]["gain"] = -0.05
    assert [mood for _, mood in verdicts(rows)] == ["good"]


def test_tiers_of_recorded_pairs_are_judged_too():
    assert verdicts([tier("paired", -0.2, -0.3, -0.1)])[0][1] == "bad"


def text_of(records: list[dict], *, live: bool = True, **more: object) -> str:
    return run_page(CONFIG, records, State(50, "training", live, 0.0), facts={"machine": "<cpu>"}, **more).html()


def test_a_page_has_everything_that_was_recorded():
    similar = {"similarity": [0.5, 0.6], "student_similarity": [], "blurry_similarity": [0.4, 0.5]}
    records = [{"step": 0, "tiers": [tier("severe", 0.2, 0.1, 0.3)], **similar}, *(step(n) for n in range(1, 51))]
    text = text_of(records, pictures=evaluation().pictures)
    for wanted in (
        "step 50 of 100", "about 25 s of steps left", "+0.200 (+0.100 … +0.300)", "20.25", "Level 2, stride 8",
        "photo&lt;1&gt;", "blurry 20.00 dB", "parts of the loss", "pairs a second", "waiting for data", "backbone",
        "&lt;cpu&gt;", "ema:", '<meta http-equiv="refresh"',
    ):  # fmt: skip
        assert wanted in text, wanted
    assert "student alone" not in text  # it was not measured
    assert "cpu_s" not in text  # no part of the loss
    ended = text_of(records, live=False)
    assert '<meta http-equiv="refresh"' not in ended
    assert "of steps left" not in ended


@pytest.mark.parametrize("records", [[], [step(1)], [{"step": 0, "tiers": [tier("severe", 0.1, None, None)]}]])
def test_a_page_of_a_run_that_has_just_begun(records):
    assert "Losses" in text_of(records)


def test_records_of_older_versions_without_yardsticks_are_shown_without_a_verdict():
    old = {name: value for name, value in tier("severe", 0.2, 0.1, 0.3).items()
           if not name.startswith("over_") and name not in ("trivial", "yardsticks")}  # fmt: skip
    text = text_of([{"step": 0, "tiers": [old]}])
    assert "+0.500" in text
    assert "better than" not in text


def test_a_loss_that_is_negative_or_not_finite_is_drawn():
    text = text_of([step(1, -1.0), {**step(2), "loss": None, "pixel": None}, step(3, 2.0)])
    assert len(re.findall(r'class="plot"', text)) > 4


def test_long_lines_keep_their_extremes_and_their_median():
    xs = list(range(1, 10_001))
    ys = [1.0] * 10_000
    ys[4321], ys[7] = 99.0, -5.0
    kept_xs, kept = _envelope(xs, ys)
    assert len(kept) <= 2 * POINTS + 2
    assert (max(kept), min(kept)) == (99.0, -5.0)
    assert kept_xs == sorted(kept_xs)
    assert (kept_xs[kept.index(99.0)], kept_xs[0], kept_xs[-1]) == (4322, 1, 10_000)
    middle_xs, middle = _median(xs, ys)
    assert set(middle) == {1.0}
    assert (middle_xs[0], middle_xs[-1], len(middle)) == (1, 10_000, POINTS)


def test_a_long_run_is_kept_in_bounded_memory_from_end_to_end():
    kept = Thinned([{"step": 0, "tiers": []}])
    for n in range(1, 5 * MOST + 1):
        kept.add(step(n))
    records, every = kept.records()
    steps = [record["step"] for record in records if "loss" in record]
    assert records[0]["step"] == 0
    assert len(steps) <= MOST
    assert every == 8
    assert np.unique(np.diff(steps)).tolist() == [every]
    assert steps[0] == 1
    assert steps[-1] > 5 * MOST - every


@pytest.fixture
def page(tmp_path):
    return LivePage(RunFolder(tmp_path), CONFIG, 0, lambda records: {"records": str(len(records))})


def test_a_page_is_written_at_records_but_not_at_each(page, tmp_path, monkeypatch):
    page.add(step(1))
    first = (tmp_path / "report.html").read_text()
    assert "step 1 of 100" in first
    page.add(step(2))
    assert (tmp_path / "report.html").read_text() == first
    now = time.monotonic()
    monkeypatch.setattr(live.time, "monotonic", lambda: now + 1000)
    page.add(step(3))
    assert "training: step 3 of 100" in (tmp_path / "report.html").read_text()


def test_an_evaluation_is_shown_at_once_and_kept_for_a_run_that_goes_on(page, tmp_path):
    page.add(step(1))
    page.evaluation(evaluation())
    page.add({"step": 1, "tiers": [tier("severe", 0.2, 0.1, 0.3)]})
    assert "photo&lt;1&gt;" in (tmp_path / "report.html").read_text()
    going_on = LivePage(RunFolder(tmp_path), CONFIG, 1, lambda records: {})
    going_on.add(step(2))
    text = (tmp_path / "report.html").read_text()
    assert "of an evaluation before the run went on" in text
    panel = (tmp_path / "panel.png").read_bytes()
    for damaged in (panel[:200], panel[:-300], b"no picture", panel[:60] + bytes(40) + panel[100:]):
        (tmp_path / "panel.png").write_bytes(damaged)
        LivePage(RunFolder(tmp_path), CONFIG, 1, lambda records: {}).add(step(2))  # a page is no reason to stop
    assert "step 2 of 100" in (tmp_path / "report.html").read_text()


def test_a_run_says_how_it_ended_and_one_that_did_nothing_leaves_its_page(page, tmp_path):
    page.close("finished")
    assert not (tmp_path / "report.html").exists()
    page.add(step(1))
    page.close("finished")
    text = (tmp_path / "report.html").read_text()
    assert "finished: step 1 of 100" in text
    assert '<meta http-equiv="refresh"' not in text
    LivePage(RunFolder(tmp_path), CONFIG, 1, lambda records: {}).close("finished")
    assert (tmp_path / "report.html").read_text() == text


def test_a_disk_that_does_not_take_the_page_is_told_once_and_stops_nothing(page, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(live.log, "warning", lambda text, *values: told.append(text % values))
    (tmp_path / "report.html").mkdir()
    page.add(step(1))
    page.close("finished")
    (line,) = told
    assert "report.html: cannot be written (Is a directory): training goes on without it" in line
