"""Numbers of an experiment's report, from runs whose differences are known."""

from pathlib import Path

import numpy as np
import pytest

from train.config.schema import Config
from train.experiments.plan import Experiment, Trial
from train.experiments.report import Made, over_trivial, paired, similarity_table, trivial_of, write_report

TIERS = ("severe", "extreme")


def made(arm: str, seed: int, better: float, *, similarity: list[float] | None = None) -> Made:
    """A run whose pictures are `better` dB above 20 + something of the picture's own."""
    pictures = {}
    for number in range(12):
        own = np.sin(7.0 * number)
        for tier in TIERS:
            pictures[f"photo{number}", tier] = {
                "key": f"photo{number}", "scene": f"photo{number}", "tier": tier, "input": {"psnr": 20 + own},
                "restored": {"psnr": 20 + own + better + 0.01 * seed},
                "yardsticks": {"gaussian": {"psnr": 20.25 + own}, "unsharp": {"psnr": 19 + own}},
            }  # fmt: skip
    records = [{"step": n, "loss": 1 / n, "seconds": 2.0, "cpu_s": 0.5} for n in range(1, 5)]
    records.append({"step": 4, "tiers": [{"tier": tier, "restored_psnr": 20 + better} for tier in TIERS]})
    if similarity is not None:
        records[-1] |= {"similarity": similarity, "blurry_similarity": [0.5] * len(similarity)}
    config = Config(train={"steps": 4, "batch": 2})
    return Made(Trial(arm, seed, "base.yaml", ()), config, Path(), records, pictures)


def test_gains_are_over_the_best_of_the_trivial_ways():
    run = made("bare", 0, 0.75)
    best = trivial_of([run])
    assert best == dict.fromkeys(TIERS, "gaussian")
    assert np.mean(list(over_trivial(run, best, "severe").values())) == pytest.approx(0.5)


def test_differences_are_of_the_same_picture_and_seed():
    one, other = [made("a", seed, 0.7) for seed in (0, 1)], [made("b", seed, 0.4) for seed in (1, 2)]
    mean, low, high = paired(one, other, "severe")
    assert mean == pytest.approx(0.3)
    assert low == pytest.approx(0.3)
    assert high == pytest.approx(0.3)  # what pictures have of their own is in both
    assert paired(one, other[1:], "severe") is None


def test_metrics_beside_psnr_have_tables_where_every_run_has_them(tmp_path):
    runs = [made(arm, seed, 0.5) for arm in ("bare", "mine") for seed in (0, 1)]
    for run in runs:
        for each in run.pictures.values():
            each["input"] |= {"blur": 0.75, "classes": 0.25}
            each["restored"] |= {"blur": 0.5 + 0.125 * run.trial.seed, "classes": 0.375}
    experiment = Experiment(title="T", config="base.yaml", arms={"bare": {}, "mine": {}}, also=["classes"])
    write_report(tmp_path / "t.md", "t", experiment, runs, 4)
    text = (tmp_path / "t.md").read_text()
    assert "## blur\n\n| arm | severe | extreme |" in text
    assert "| blurry input | 0.750 | 0.750 |\n| bare | 0.562 ± 0.088 | 0.562 ± 0.088 |" in text
    assert "## classes" in text
    assert "## features\n\nDistance" in text
    assert "4 of the runs were scored before" in text
    for each in runs[-1].pictures.values():  # a run of before
        del each["restored"]["classes"]
    write_report(tmp_path / "t.md", "t", experiment, runs, 4)
    text = (tmp_path / "t.md").read_text()
    assert "| mine | 0.375 | 0.375 |" in text.partition("## classes")[2]
    assert "1 of the runs were scored before" in text.partition("## classes")[2]


def test_seeds_that_disagree_widen_the_interval():
    """Two arms that differ by chance, run by run, are not told apart, however many pictures there are."""
    arm, reference = ([made(name, seed, 0.5 + off) for seed, off in enumerate(offs)] for name, offs in
                      (("a", (0.05, -0.04, 0.06)), ("b", (0.0, 0.05, -0.03))))  # fmt: skip
    mean, low, high = paired(arm, reference, "severe")
    assert mean == pytest.approx((0.05 - 0.09 + 0.09) / 3)
    assert low < 0 < high


def test_other_pictures_under_the_same_names_are_refused():
    one, other = made("a", 0, 0.5), made("b", 0, 0.5)
    other.pictures["photo3", "severe"]["input"] = {"psnr": 12.0}
    with pytest.raises(ValueError, match="scored different pictures"):
        paired([one], [other], "severe")
    del other.pictures["photo3", "severe"]
    with pytest.raises(ValueError, match="scored different pictures"):
        paired([one], [other], "severe")


def test_the_report_says_what_came_out_and_what_is_missing(tmp_path):
    experiment = Experiment(
        title="T", config="base.yaml", seeds=[0, 1], oracle="cheat",
        arms={"bare": {}, "taught": {"says": "a prior"}, "cheat": {}, "worse": {}},
    )  # fmt: skip
    runs = [
        made(arm, s, g) for s in (0, 1) for arm, g in (("bare", 0.5), ("taught", 0.9), ("cheat", 2.5), ("worse", 0.1))
    ]
    write_report(tmp_path / "t.md", "t", experiment, runs, 9)
    text = (tmp_path / "t.md").read_text()
    assert "**Not finished: 8 of 9 runs.**" in text
    assert "* **taught** against bare: severe: better (+0.40 dB); extreme: better (+0.40 dB)." in text
    assert "* **worse** against bare: severe: WORSE (-0.40 dB)" in text
    assert "+0.400 (+0.400 … +0.400), 20% of the oracle's" in text
    assert "| bare | 2 | +0.255 ± 0.007 |" in text
    assert "| taught | a prior | 4 | 8 | 2.00 | 0.50 | 0.00 |" in text
    assert "## Runs" in text
    assert (tmp_path / "t.png").stat().st_size > 10_000


def test_similarities_are_the_mean_and_spread_over_the_seeds():
    runs = [made("a", seed, 0.0, similarity=[0.5 + 0.1 * seed, 0.9]) for seed in (0, 2)]
    text = "\n".join(similarity_table([*runs, made("b", 0, 0.0)]))
    assert "| a | 2 | 0.600 ± 0.141 (+0.100 ± 0.141) | 0.900 ± 0.000 (+0.400 ± 0.000) |" in text
    assert "| teacher on the blurry picture | 2 | 0.500 ± 0.000 | 0.500 ± 0.000 |" in text
    assert "| b |" not in text
