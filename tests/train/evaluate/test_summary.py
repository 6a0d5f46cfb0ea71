"""What numbers come to: bins, rows, the best trivial, intervals over scenes, worked out by hand."""

import numpy as np
import pytest

from train.evaluate.bins import bin_of
from train.evaluate.metrics import bootstrap_mean_interval
from train.evaluate.results import as_csv, build, metric_facts, read_results, seal
from train.evaluate.summary import groups, summarise


def record(key: str, before: float, after: float, *, scene="", tier="", yardsticks=None, **more) -> dict:
    made = {name: {"psnr": value, "ssim": 0.5} for name, value in (yardsticks or {}).items()}
    plain = {"extent": None, "width": 60, "height": 40, "tiles": 1, "seconds": 0.5, "stamp": "1 2"}
    values = {"input": {"psnr": before, "ssim": 0.4}, "restored": {"psnr": after, "ssim": 0.6}, "yardsticks": made}
    return {"key": key, "scene": scene or key, "tier": tier, **plain, **values, **more}


def book(*records: dict) -> dict[str, dict]:
    return {each["key"]: each for each in records}


FACTS = {"model": {}, "data": {}, "settings": {}, "versions": {}, "device": "CPU"}
METRICS = metric_facts(["psnr", "ssim"], aligned=False)


@pytest.mark.parametrize(
    ("psnr", "name"),
    [
        (5, "input < 20 dB"),
        (19.999, "input < 20 dB"),
        (20, "input 20–23 dB"),
        (25.9, "input 23–26 dB"),
        (26, "input 26–29 dB"),
        (31.9, "input 29–32 dB"),
        (32, "input ≥ 32 dB"),
        (60, "input ≥ 32 dB"),
    ],
)
def test_bins_of_input_psnr_have_fixed_edges(psnr, name):
    assert bin_of(psnr) == name


def test_rows_go_from_easy_to_hard_with_the_headline_last():
    assert [name for name, _ in groups(["extreme", "mild", "severe"])] == [
        "mild",
        "severe",
        "extreme",
        "severe + extreme",
    ]
    assert [name for name, _ in groups([bin_of(33), bin_of(10)])] == ["input < 20 dB", "input ≥ 32 dB", "all"]
    assert [name for name, _ in groups(["mild"])] == ["mild"]


def test_gains_are_paired_and_over_the_best_trivial_of_each_row():
    pictures = [
        record("a", 22.0, 24.0, tier="severe", yardsticks={"gaussian": 22.5, "unsharp": 21.0, "wiener": 40.0}),
        record("b", 20.0, 21.0, tier="severe", yardsticks={"gaussian": 20.9, "unsharp": 19.0}),
        record("c", 18.0, 18.2, tier="extreme", yardsticks={"gaussian": 17.0, "unsharp": 18.4, "wiener": 40.0}),
    ]
    severe, extreme, hard = summarise(pictures, "psnr")
    assert (severe["trivial"], extreme["trivial"], hard["trivial"]) == ("gaussian", "unsharp", "gaussian")
    assert severe["gain"] == pytest.approx(1.5)
    assert severe["over_trivial"] == pytest.approx((1.5 + 0.1) / 2)
    assert extreme["yardsticks"]["wiener"]["psnr"] == 40.0  # told the kernel: shown, and no rival
    assert extreme["over_trivial"] == pytest.approx(-0.2)
    assert extreme["low"] is extreme["over_low"] is None  # one scene
    assert hard["gain"] == pytest.approx(3.2 / 3)
    assert severe["yardsticks"].keys() == {"gaussian", "unsharp"}  # the other one is not of every picture
    assert severe["low"] <= severe["gain"] <= severe["high"]


def test_intervals_resample_scenes_and_not_pictures():
    rng = np.random.Generator(np.random.Philox(2))
    gains = np.repeat(rng.normal(1, 1, 12), 10) + rng.normal(0, 1e-3, 120)
    pictures = [record(f"{n}", 24.0, 24.0 + gain, scene=f"s{n // 10}") for n, gain in enumerate(gains)]
    for each in pictures:
        each["tier"] = bin_of(24.0)
    row = summarise(pictures, "psnr")[-1]
    expected = bootstrap_mean_interval(gains, [each["scene"] for each in pictures])
    assert (row["low"], row["high"]) == pytest.approx(expected)
    alone = bootstrap_mean_interval(gains, [each["key"] for each in pictures])
    assert row["high"] - row["low"] > 2 * (alone[1] - alone[0])
    assert row["intervals"]["psnr"] == pytest.approx([24 + bound for bound in expected], abs=1e-6)


def test_results_hold_every_picture_and_what_failed(tmp_path):
    records = book(record("a", 24.0, 25.0), record("b", 33.0, 33.5), {"key": "c", "scene": "c", "failed": "torn"})
    results = build(records, METRICS, FACTS)
    assert [each["tier"] for each in results["pictures"]] == ["input 23–26 dB", "input ≥ 32 dB"]
    assert results["failed"] == [{"key": "c", "scene": "c", "why": "torn"}]
    assert results["headline"] == {"tier": "all", "metric": "psnr"}
    assert results["tiers"][-1]["pictures"] == 2
    assert "stamp" not in results["pictures"][0]
    seal(tmp_path, results)
    again = read_results(tmp_path)
    assert again["tiers"] == [
        {**row, "intervals": {k: list(v) for k, v in row["intervals"].items()}} for row in results["tiers"]
    ]
    assert read_results(tmp_path / "results.json") == again


def test_aligned_numbers_lead_and_unaligned_ones_are_called_so():
    metrics = metric_facts(["psnr", "ssim", "ssim_3d"], aligned=True)
    assert list(metrics) == ["psnr_aligned", "ssim_aligned", "psnr", "ssim", "ssim_3d"]
    labels = [each["label"] for each in metrics.values()]
    assert labels[:3] == ["PSNR aligned", "SSIM aligned", "PSNR unaligned"]
    assert all("unaligned" in label for label in labels[2:])
    assert all("unaligned" not in each["label"] for each in METRICS.values())
    one = record("a", 24.0, 25.0)
    for name, value in (("input", 31.0), ("restored", 33.0)):
        one[name] = {"psnr_aligned": value, "ssim_aligned": 0.9, **one[name], "ssim_3d": 0.5}
    results = build(book(one), metrics, FACTS)
    assert results["pictures"][0]["tier"] == "input 29–32 dB"  # of the aligned input
    assert results["tiers"][-1]["gain"] == pytest.approx(2.0)


def test_the_csv_has_a_row_for_every_picture_unrounded():
    one = record("a,b", 24.123456789, 25.0, yardsticks={"gaussian": 24.5}, extent=None)
    text = as_csv(build(book(one, {"key": "c", "scene": "s", "failed": "torn, wholly"}), METRICS, FACTS))
    head, first, second = text.splitlines()
    assert head.startswith("key,scene,tier,extent,width,height,tiles,seconds,input_psnr,input_ssim,restored_psnr")
    assert head.endswith("gaussian_psnr,gaussian_ssim,failed")
    assert first.startswith('"a,b","a,b",input 23–26 dB,,60,40,1,0.5,24.123456789,0.4,25.0')
    assert second.startswith("c,s,")
    assert second.endswith('"torn, wholly"')
    assert second.count(",") - 1 == head.count(",")


def test_what_is_no_results_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file: `sharpprior evaluate` writes it"):
        read_results(tmp_path)
    for text, words in (("{", "is no sharpprior-results"), ('{"format": "x", "version": 9}', "of format x 9")):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            read_results(tmp_path)
    with pytest.raises(ValueError, match="no picture could be evaluated: torn"):
        build({"c": {"key": "c", "scene": "c", "failed": "torn"}}, METRICS, FACTS)
