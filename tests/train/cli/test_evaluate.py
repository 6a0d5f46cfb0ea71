"""`sharpprior evaluate` and `compare` as a user starts them: every layout, bad pictures, kills, ranks, pages."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from data.image import psnr
from data.prepare.layouts import LAYOUTS
from tests.docs.test_tasks import blocks
from tests.train.evaluate.trees import pairs_tree, tiny_model, tree, write_pair
from tests.train.small_sets import small_set
from train import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny.safetensors")


def results(folder) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_a_metric_that_is_asked_for_is_in_results_and_reports(model, sharpprior, tmp_path):
    pairs, out = pairs_tree(tmp_path / "pairs", 2), tmp_path / "out"
    status, _, error = sharpprior("evaluate", model, "--data", f"pairs:{pairs}", "--also", "classes", "-o", out)
    assert (status, error) == (0, "")
    assert all(0 <= each["restored"]["classes"] <= 1 for each in results(out)["pictures"])
    assert "EfficientNet-Lite2" in (out / "report.html").read_text()
    status, _, error = sharpprior("evaluate", model, "--data", f"pairs:{pairs}", "--also", "clases", "-o", out)
    assert status == 1
    assert "did you mean classes" in error


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "folder"])
def test_every_layout_is_evaluated_as_released(model, sharpprior, tmp_path, layout):
    root, out = tree(layout, tmp_path / "data", LAYOUTS[layout].tested), tmp_path / "out"
    status, text, error = sharpprior("evaluate", model, "--data", f"{layout}:{root}", "--partial", "-o", out)
    assert (status, error) == (0, "")
    found = results(out)
    aligned = layout.startswith("realblur")
    assert found["headline"] == {"tier": "all", "metric": "psnr_aligned" if aligned else "psnr"}
    assert found["data"]["split"] == LAYOUTS[layout].tested
    assert found["data"]["blur variant"] == (LAYOUTS[layout].variants[0] or "as recorded")
    assert {"psnr", "ssim", "ssim_3d"} <= found["metrics"].keys()
    assert ("psnr_aligned" in found["metrics"]) == ("ssim_aligned" in found["metrics"]) == aligned
    for picture in found["pictures"]:
        assert (picture["height"], picture["width"], picture["tiles"]) == (50, 66, 1)
        assert picture["yardsticks"].keys() == {"gaussian", "unsharp"}
        for values in (picture["input"], picture["restored"], *picture["yardsticks"].values()):
            assert values.keys() == found["metrics"].keys()
    for name in ("report.md", "report.html", "pictures.csv", "panel.png"):
        assert (out / name).stat().st_size > 100
    report = (out / "report.md").read_text()
    released = LAYOUTS[layout].counts.get(LAYOUTS[layout].tested)
    if released:
        assert f"{len(found['pictures'])} pairs where {released} were released" in report
    assert ("PSNR unaligned" in report) == aligned
    assert "not recorded with the model" in report  # the training data
    assert "best trivial" in text


def test_numbers_are_those_of_the_files(model, sharpprior, tmp_path):
    """Input and restored PSNR by another program: from the files, and from the restored pictures that --save keeps."""
    root, out = pairs_tree(tmp_path / "p", 3), tmp_path / "out"
    assert sharpprior("evaluate", model, "--data", f"pairs:{root}", "-o", out, "--save")[0] == 0
    for n, picture in enumerate(results(out)["pictures"]):
        sharp, blurry = (np.asarray(Image.open(root / kind / f"{n}.png")) for kind in ("sharp", "blur"))
        restored = np.asarray(Image.open(out / "restored" / f"{picture['key']}.png"))
        assert picture["input"]["psnr"] == pytest.approx(psnr(blurry, sharp), abs=1e-9)
        assert picture["restored"]["psnr"] == pytest.approx(psnr(restored, sharp), abs=1e-9)
        assert not np.array_equal(restored, blurry)
    mean = np.mean([picture["restored"]["psnr"] for picture in results(out)["pictures"]])
    assert results(out)["tiers"][-1]["restored"]["psnr"] == pytest.approx(mean)


def test_bad_pictures_are_reported_and_the_rest_go_on(model, sharpprior, tmp_path):
    root, out = pairs_tree(tmp_path / "p", 5), tmp_path / "out"
    good = (root / "blur/1.png").read_bytes()
    (root / "blur/1.png").write_bytes(good[:200])
    Image.new("RGB", (30, 30)).save(root / "sharp/3.png")
    run = ("evaluate", model, "--data", f"pairs:{root}", "-o", out)
    status, text, error = sharpprior(*run)
    assert status == 1
    assert "2 pictures could not be evaluated" in error
    assert "blur/1.png" in text
    assert "INCOMPLETE: 2 of 5 pictures" in text
    found = results(out)
    assert (len(found["pictures"]), len(found["failed"])) == (3, 2)
    assert "INCOMPLETE: 2 of 5 pictures" in (out / "report.md").read_text()
    assert "INCOMPLETE: 2 of 5 pictures" in (out / "report.html").read_text()
    assert "blur/1.png" in (out / "pictures.csv").read_text()
    # Mended, they are all that is done again.
    (root / "blur/1.png").write_bytes(good)
    write_pair(root / "sharp/3.png", root / "blur/3.png", 3)
    status, text, _ = sharpprior(*run)
    assert (status, "5 pairs, 2 to do" in text) == (0, True)
    assert (len(results(out)["pictures"]), results(out)["failed"]) == (5, [])


def test_a_finished_evaluation_is_shown_again_and_never_overwritten(model, sharpprior, tmp_path):
    root, out = pairs_tree(tmp_path / "p", 2), tmp_path / "out"
    run = ("evaluate", model, "--data", f"pairs:{root}", "-o", out)
    assert sharpprior(*run)[0] == 0
    before = (out / "results.json").read_bytes()
    status, text, _ = sharpprior(*run)
    assert status == 0
    assert "nothing is done again" in text
    assert (out / "results.json").read_bytes() == before
    status, _, error = sharpprior(*run, "--tile", "64")
    assert status == 1
    assert "settings.tile auto → 64" in error
    assert sharpprior(*run, "--tile", "64", "--overwrite")[0] == 0
    assert results(out)["settings"]["tile"] == 64
    assert results(out)["pictures"][0]["tiles"] == 2
    assert "restored in tiles" in (out / "report.md").read_text()


def test_without_a_folder_results_lie_beside_the_model(sharpprior, tmp_path):
    model = tiny_model(tmp_path / "tiny.safetensors")
    assert sharpprior("evaluate", model, "--data", f"pairs:{pairs_tree(tmp_path / 'p', 2)}")[0] == 0
    assert (tmp_path / "tiny-evaluations" / "pairs-p" / "results.json").is_file()


def start(*arguments, **environment) -> subprocess.Popen:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        [sys.executable, "-m", "train.cli", *map(str, arguments)],
        cwd=ROOT, env=kept | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_kill_at_any_moment_loses_the_picture_in_work_alone(model, tmp_path, sharpprior):
    root, out, whole = pairs_tree(tmp_path / "p", 16), tmp_path / "out", tmp_path / "whole"
    run = ("evaluate", model, "--data", f"pairs:{root}", "--device", "cpu")
    assert sharpprior(*run, "-o", whole)[0] == 0
    file = out / "pictures-rank-0.jsonl"
    process = start(*run, "-o", out)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (file.exists() and file.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = file.read_bytes().count(b"\n")
    assert 3 <= kept < 16
    assert not (out / "results.json").exists()
    status, text, _ = sharpprior(*run, "-o", out)
    assert status == 0
    assert f"16 pairs, {16 - kept} to do" in text
    a, b = results(whole), results(out)
    assert [each["restored"] for each in a["pictures"]] == [each["restored"] for each in b["pictures"]]
    assert a["tiers"] == b["tiers"]


def test_ranks_share_the_pictures_and_the_last_writes_the_results(model, tmp_path, sharpprior):
    root, out, whole = pairs_tree(tmp_path / "p", 7), tmp_path / "out", tmp_path / "whole"
    run = ("evaluate", model, "--data", f"pairs:{root}", "--device", "cpu")
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    ranks = [start(*run, "-o", out, RANK=str(rank), LOCAL_RANK=str(rank), **place) for rank in range(2)]
    told = [process.communicate(timeout=240) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], told
    counts = [(out / f"pictures-rank-{rank}.jsonl").read_bytes().count(b"\n") for rank in range(2)]
    assert counts == [4, 3]
    assert any("results:" in text for text, _ in told)
    assert sharpprior(*run, "-o", whole)[0] == 0
    assert results(out)["tiers"] == results(whole)["tiers"]


def test_crops_of_a_shard_set_have_tiers_and_a_part_of_them_is_drawn(model, sharpprior, tmp_path, monkeypatch):
    monkeypatch.setattr("train.evaluate.chosen.KERNELS", 1)
    shards, out = small_set(tmp_path / "s", "val", 3), tmp_path / "out"
    status, text, _ = sharpprior("evaluate", model, "--data", f"synth:{shards}", "--max-pairs", 11, "-o", out)
    assert status == 0
    found = results(out)
    assert found["headline"]["tier"] == "severe + extreme"
    assert len(found["pictures"]) == 10
    assert "10 of 15 pairs, drawn over the scenes by hash" in text
    assert all(picture["extent"] is not None for picture in found["pictures"])
    assert "What knows the kernel" in (out / "report.html").read_text()
    assert any("wiener" in picture["yardsticks"] for picture in found["pictures"])  # told the kernel
    assert all(row["trivial"] in ("input", "gaussian", "unsharp") for row in found["tiers"])
    assert "synthesized: camera" in found["data"]["blur variant"]


def test_deconvolution_can_be_left_out_and_such_numbers_are_not_mixed_with_others(model, sharpprior, tmp_path):
    shards, out = small_set(tmp_path / "s", "val", 1), tmp_path / "out"
    run = ("evaluate", model, "--data", f"synth:{shards}", "--max-pairs", 5, "-o", out)
    assert sharpprior(*run, "--no-deconvolution")[0] == 0
    for picture in results(out)["pictures"]:
        assert picture["yardsticks"].keys() == {"gaussian", "unsharp"}
    status, _, error = sharpprior(*run)
    assert status == 1
    assert "deconvolution" in error


def test_pages_are_one_file_and_two_models_are_compared(model, sharpprior, tmp_path):
    root = pairs_tree(tmp_path / "p", 6)
    other = tiny_model(tmp_path / "other.safetensors", scale=0.9)
    for path, out in ((model, "a"), (other, "b")):
        assert sharpprior("evaluate", path, "--data", f"pairs:{root}", "-o", tmp_path / out)[0] == 0
    status, text, _ = sharpprior("compare", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "c")
    assert status == 0
    assert text.startswith("# other against tiny on pairs in p, no split")
    assert {path.name for path in (tmp_path / "c").iterdir()} == {
        f"compare.{end}" for end in ("md", "tex", "html", "json")
    }
    assert sharpprior("compare", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "c")[0] == 1
    status, text, _ = sharpprior("compare", tmp_path / "a", tmp_path / "b", "--latex")
    assert "\\begin{tabular}" in text
    for page in (tmp_path / "a/report.html", tmp_path / "c/compare.html"):
        html = page.read_text()
        assert not re.findall(r"(?:src|href)=[\"'](?!data:)", html)
        assert "http-equiv" in html
    assert (tmp_path / "a/report.html").read_text().count(
        "<input type"
    ) == 12  # three of the worst, three of the best, two sliders each


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--data", "gorpo:/x"), "did you mean gopro"),
        (("--tile", "7"), "--tile 7: auto, whole, or a side of at least 64 px"),
        (("--precision", "fp8"), "--precision fp8: one of fp32, bf16"),
        (("--data", "pairs:{tmp}", "--blurry", "x"), "give both"),
        (("--data", "gopro:{tmp}/none"), "none: missing"),
    ],
)
def test_mistakes_are_one_line(model, sharpprior, tmp_path, arguments, words):
    status, _, error = sharpprior(
        "evaluate", model, "-o", tmp_path / "o", *[each.format(tmp=tmp_path) for each in arguments]
    )
    assert status == 1
    assert error.startswith("error: ")
    assert len(error.strip().splitlines()) == 1
    assert words in error


def on_ranks(launcher: list[str], words: list[str]) -> tuple[int, str]:
    """(status, errors) of the command under a launcher, as it is called from a shell."""
    tools = os.path.dirname(sys.executable)
    environment = {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [*launcher, "sharpprior", *words], env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stderr if done.returncode else ""


def test_the_commands_of_the_page_work_as_written(model, sharpprior, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("train.evaluate.chosen.KERNELS", 1)
    for name in ("mine", "other"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        tiny_model(tmp_path / "runs" / name, scale=1.0 if name == "mine" else 0.95)
    data = tmp_path / "datasets"
    tree("gopro", data / "GOPRO_Large", "test")
    tree("realblur-j", data / "RealBlur", "test")
    tree("realblur-r", data / "RealBlur", "test")
    pairs_tree(data / "mine", 3)
    for kind, name in (("blur", "input"), ("sharp", "target")):
        (data / "mine" / kind).rename(data / "mine" / name)
    small_set(data / "val", "val", 1)
    monkeypatch.setenv("SHARPPRIOR_DATA", str(data))
    path = ROOT / "docs" / "tasks" / "evaluate.md"
    page = path.read_text()
    commands = [line for block in blocks(path) for line in block.text.splitlines()]
    assert len(commands) == 10
    for command in commands:
        launcher, _, words = command.rpartition("sharpprior ")
        small = ["--partial"] if "gopro:" in words or "realblur" in words else []
        if launcher:
            status, error = on_ranks(launcher.split(), [*words.split(), *small])
        else:
            status, _, error = sharpprior(*words.split(), *small)
        assert (status, error) == (0, ""), command
    written = {path.name for path in (tmp_path / "results" / "gopro").iterdir()}
    for name in ("results.json", "pictures.csv", "report.html", "report.md", "panel.png", "yardsticks.json"):
        assert f"`{name}`" in page
        assert name in written
