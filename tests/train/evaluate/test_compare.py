"""Paired differences of evaluations: known numbers found again, other pictures refused, tables that can be pasted."""

import json
import re

import numpy as np
import pytest

from tests.train.evaluate.test_summary import book, record
from train.evaluate.compare import compare, load_all
from train.evaluate.compared import as_json, escape, latex, markdown, means_table, said, write_page
from train.evaluate.metrics import bootstrap_mean_interval
from train.evaluate.results import build, metric_facts, seal

METRICS = metric_facts(["psnr", "ssim", "gmsd"], aligned=False)
DATA = {"set": "GOPRO_Large", "layout": "gopro", "split": "test", "blur variant": "blur", "digest": "d"}
SETTINGS = {"tile": "whole", "precision": "fp32", "metrics": ["psnr"]}


def evaluation(folder, name, gains, *, shift=0.0, metrics=METRICS, leave_out=(), settings=SETTINGS, **data):
    """A folder with results: 24 dB inputs in scenes of five pictures, restored by `gains`; gmsd falls by them."""
    folder.mkdir(parents=True)
    records = []
    for n, gain in enumerate(gains):
        each = record(f"p{n}", 24.0 + shift + 0.01 * n, 24.0 + 0.01 * n + gain, scene=f"s{n // 5}")
        each["input"]["gmsd"], each["restored"]["gmsd"] = 0.2, 0.2 - 0.01 * gain
        for values in (each["input"], each["restored"]):
            for lacking in {"psnr", "ssim", "gmsd"} - metrics.keys():
                del values[lacking]
        if n not in leave_out:
            records.append(each)
    model = {
        "name": name,
        "path": f"/models/{name}",
        "digest": name * 2,
        "training data": ["x"],
        "training blur": "camera",
    }
    facts = {"model": model, "data": DATA | data, "settings": settings, "versions": {"torch": "2"}, "device": "CPU"}
    seal(folder, build(book(*records), metrics, facts))
    return folder


@pytest.fixture
def gains() -> np.ndarray:
    return np.random.Generator(np.random.Philox(4)).normal(1.0, 0.5, 40)


def test_a_known_difference_is_found_with_its_interval(tmp_path, gains):
    rng = np.random.Generator(np.random.Philox(5))
    better = gains + 0.3 + np.repeat(rng.normal(0, 0.1, 8), 5)
    a, b = evaluation(tmp_path / "a", "A", gains), evaluation(tmp_path / "b", "B", better)
    found = compare(load_all([a, b]))
    row = found.rows[-1]
    assert (row.tier, row.pictures, row.scenes) == ("all", 40, 8)
    one, two = row.metrics["psnr"]
    assert (one.difference, one.low, one.high) == (0, 0, 0)
    assert two.difference == pytest.approx(np.mean(better - gains))
    scenes = [f"s{n // 5}" for n in range(40)]
    assert (two.low, two.high) == pytest.approx(bootstrap_mean_interval(better - gains, scenes))
    # Pairing is what makes 0.3 dB visible: the two means alone differ by less than they scatter.
    unpaired = np.std(gains) * np.sqrt(2 / 40) * 1.96
    assert two.high - two.low < 2 * unpaired
    assert two.wins == pytest.approx(np.mean(better > gains))
    assert not any("Few scenes" in note for note in found.notes)
    lower = row.metrics["gmsd"][1]
    assert lower.difference == pytest.approx(-0.01 * np.mean(better - gains))
    assert lower.wins == pytest.approx(two.wins)  # lower is better there
    ((sentence, mood),) = said(found)
    assert mood == "good"
    assert "better, with an interval that does not hold 0" in sentence
    ((sentence, mood),) = said(compare(load_all([b, a])))
    assert mood == "bad"
    assert "WORSE" in sentence


def test_few_scenes_are_told(tmp_path, gains):
    a, b = evaluation(tmp_path / "a", "A", gains[:35]), evaluation(tmp_path / "b", "B", gains[:35] + 1)
    assert any("Few scenes (7)" in note for note in compare(load_all([a, b])).notes)


def test_scenes_that_nobody_knows_are_told(tmp_path, gains):
    unknown = {"scenes unknown": 3, "pairs": 40}
    folders = [evaluation(tmp_path / name, name, gains, **unknown) for name in "ab"]
    assert any("Scenes are not known of 3 of 40 pictures" in note for note in compare(load_all(folders)).notes)


def test_no_difference_is_said_to_be_none(tmp_path, gains):
    noise = np.random.Generator(np.random.Philox(6)).normal(0, 0.2, 40)
    a, b = evaluation(tmp_path / "a", "A", gains), evaluation(tmp_path / "b", "B", gains + noise - noise.mean())
    ((sentence, mood),) = said(compare(load_all([a, b])))
    assert mood == "warning"
    assert "no difference can be told" in sentence


def test_other_pictures_are_refused_whatever_their_names(tmp_path, gains):
    a, b = evaluation(tmp_path / "a", "A", gains), evaluation(tmp_path / "b", "B", gains, shift=0.001)
    with pytest.raises(ValueError, match=r"p0 was another picture \(input 24\.0000 and 24\.0010 dB\)"):
        compare(load_all([a, b]))
    c = evaluation(tmp_path / "c", "C", gains, **{"blur variant": "blur_gamma"})
    with pytest.raises(ValueError, match="blur variant blur and blur_gamma"):
        compare(load_all([a, c]))
    with pytest.raises(ValueError, match="at least two"):
        load_all([a])


def test_pictures_that_one_lacks_are_left_out_of_all_and_told(tmp_path, gains):
    a, b = evaluation(tmp_path / "a", "A", gains), evaluation(tmp_path / "b", "B", gains + 1, leave_out=(0, 7))
    found = compare(load_all([a, b]))
    assert found.rows[-1].pictures == 38
    assert found.rows[-1].metrics["psnr"][0].mean == pytest.approx(
        np.mean([24 + 0.01 * n + gains[n] for n in range(40) if n not in (0, 7)])
    )
    assert any("B: 2 of 40 pictures are missing" in note for note in found.notes)
    assert "2 of 40 pictures are missing" in markdown(found)


def test_other_settings_and_metrics_are_told(tmp_path, gains):
    a = evaluation(tmp_path / "a", "A", gains)
    few = {name: metric for name, metric in METRICS.items() if name != "gmsd"}
    b = evaluation(tmp_path / "b", "B", gains + 1, metrics=few, settings=SETTINGS | {"tile": 384})
    found = compare(load_all([a, b]))
    assert list(found.metrics) == ["psnr", "ssim"]
    assert "A: has gmsd, which others lack" in found.notes
    assert any("tile whole → 384" in note for note in found.notes)


def test_of_a_run_the_evaluation_on_the_same_pictures_is_taken(tmp_path, gains):
    run, other = tmp_path / "run", tmp_path / "other"
    evaluation(run / "evaluations" / "gopro", "R", gains)
    evaluation(run / "evaluations" / "hide", "R", gains, digest="h")
    evaluation(other / "evaluations" / "gopro", "O", gains)
    assert [each.path.parent.name for each in load_all([run, other])] == ["gopro", "gopro"]
    evaluation(run / "evaluations" / "gopro-again", "R", gains)
    with pytest.raises(ValueError, match="several of the same pictures: name one of"):
        load_all([run, other])
    evaluation(tmp_path / "third" / "evaluations" / "reds", "T", gains, digest="r")
    evaluation(tmp_path / "third" / "evaluations" / "rsblur", "T", gains, digest="s")
    with pytest.raises(ValueError, match="none of pictures that the others have too"):
        load_all([tmp_path / "third", other])
    with pytest.raises(ValueError, match=r"no results\.json here"):
        load_all([tmp_path, other])


def test_the_best_value_is_marked_even_where_it_is_the_input_s(tmp_path, gains):
    a, b = evaluation(tmp_path / "a", "A", -np.abs(gains)), evaluation(tmp_path / "b", "B", -np.abs(gains) - 1)
    _, rows = means_table(compare(load_all([a, b])), "**{}**")
    assert [row[0] for row in rows] == ["blurry input", "A", "B"]
    assert [row[1].startswith("**") for row in rows] == [True, False, False]
    c, d = evaluation(tmp_path / "c", "C", np.abs(gains)), evaluation(tmp_path / "d", "D", np.abs(gains) + 1)
    _, rows = means_table(compare(load_all([c, d])), "**{}**")
    assert [row[1].startswith("**") for row in rows] == [False, False, True]
    assert [row[3].startswith("**") for row in rows] == [False, False, True]  # gmsd: lower


def test_the_latex_table_is_complete_and_escaped(tmp_path, gains):
    a, b = evaluation(tmp_path / "a", "my_run, step 5 & 6", gains), evaluation(tmp_path / "b", "50%", gains + 1)
    text = latex(compare(load_all([a, b])))
    lines = [line for line in text.splitlines() if not line.startswith("%")]
    body = "\n".join(lines)
    assert re.search(r"my\\_run, step 5 \\& 6 & ", body)
    assert "50\\% & \\textbf{" in body
    rows = [line for line in lines if line.endswith("\\\\")]
    assert len(rows) == 4
    assert len({len(re.findall(r"(?<!\\)&", row)) for row in rows}) == 1
    assert body.count("\\begin") == body.count("\\end") == 2
    assert "GOPRO\\_Large, test (blur), all pictures (40 pictures of 8 scenes)." in body
    assert not re.search(r"(?<!\\)[%#]", body)
    assert escape("a_b^2~\\{}") == r"a\_b\textasciicircum{}2\textasciitilde{}\textbackslash{}\{\}"


def test_what_numbers_are_of_is_named_wherever_they_stand(tmp_path, gains):
    """With one of the hard tiers missing, the headline's row is another tier: no mean may pass for the set's."""
    folders = [evaluation(tmp_path / name, name, gains[:12] + n) for n, name in enumerate("ab")]
    for folder in folders:
        file = folder / "results.json"
        results = json.loads(file.read_text())
        for n, picture in enumerate(results["pictures"]):
            picture["tier"] = "identity" if n < 5 else "mild"
        file.write_text(json.dumps(results))
    found, row = compare(load_all(folders)), "mild (7 pictures of 2 scenes)"
    assert row in said(found)[0][0]
    text = markdown(found)
    for line in (f"## Means: {row}", f"## Paired differences: {row}", "| model, mild |", "| metric, mild |"):
        assert line in text, line
    caption = next(line for line in latex(found).splitlines() if line.startswith("\\caption"))
    assert f"test (blur), {row}." in caption
    assert as_json(found)["headline"] == {"tier": "mild", "metric": "psnr"}
    write_page(tmp_path / "c.html", found)
    page = (tmp_path / "c.html").read_text()
    for line in (f"Means of all metrics: {row}", f"Paired differences to a: {row}"):
        assert line in page


def test_markdown_json_and_page_say_the_same(tmp_path, gains):
    a, b = evaluation(tmp_path / "a", "A|a", gains), evaluation(tmp_path / "b", "<B>", gains + 0.5)
    found = compare(load_all([a, b]))
    text = markdown(found)
    assert "A\\|a" in text
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("|")]
    assert set(widths) == {3, 5, 6}
    assert "+0.500" in text
    told = json.loads(json.dumps(as_json(found), allow_nan=False))
    assert told["tiers"][-1]["metrics"]["psnr"][1]["difference"] == pytest.approx(0.5)
    write_page(tmp_path / "c.html", found)
    page = (tmp_path / "c.html").read_text()
    assert "<B>" not in page
    assert "&lt;B&gt;" in page
    assert "+0.500" in page
