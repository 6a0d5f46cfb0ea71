"""The sharpprior command on a finished run."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("size", [(33, 47), (200, 131)])
def test_restore_keeps_the_size_of_the_photograph(runs, unbroken, sharpprior, tmp_path, size):
    photo, out = tmp_path / "photo.jpg", tmp_path / "sharp.png"
    array = np.random.Generator(np.random.Philox(1)).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(array).save(photo)
    status, text, _ = sharpprior("restore", runs.folder(unbroken), photo, "-o", out)
    assert (status, "restored" in text) == (0, True)
    with Image.open(out) as restored:
        assert restored.size == size[::-1]
    status, _, error = sharpprior("restore", runs.folder(unbroken), photo, "-o", out)
    assert status == 1
    assert error.startswith(f"error: {out}: exists")


def test_tiles_and_the_whole_picture_agree_away_from_nothing(runs, unbroken, sharpprior, tmp_path):
    photo = tmp_path / "photo.png"
    y, x = np.mgrid[:150, :170]
    Image.fromarray(np.stack([x, y, (x + y) // 2], axis=2).astype(np.uint8)).save(photo)
    assert sharpprior("restore", runs.folder(unbroken), photo, "-o", tmp_path / "a.png", "--tile", 96)[0] == 0
    assert sharpprior("restore", runs.folder(unbroken), photo, "-o", tmp_path / "b.png", "--whole")[0] == 0
    a, b = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("a.png", "b.png"))
    assert np.abs(a - b).mean() < 8
    assert sharpprior("restore", runs.folder(unbroken), photo, "-o", "c.png", "--tile", 96, "--whole")[0] == 1


def test_evaluate_repeats_the_runs_own_evaluation(runs, unbroken, sharpprior, tmp_path):
    status, text, _ = sharpprior("evaluate", runs.folder(unbroken), "-o", tmp_path / "report")
    assert status == 0
    last = [record for record in runs.records(unbroken) if "tiers" in record][-1]
    report = (tmp_path / "report" / "report.md").read_text()
    for row in last["tiers"]:
        assert f"gain {row['gain']:+.3f}" in text
        assert f"| {row['tier']} | {row['pairs']} | {row['input_psnr']:.2f} | {row['restored_psnr']:.2f} |" in report
    for value in last["similarity"]:
        assert f"| {value:.3f} |" in report
    assert (tmp_path / "report" / "panel.png").is_file()
    status, again, _ = sharpprior("evaluate", runs.folder(unbroken), "-o", tmp_path / "report")
    assert (status, "nothing is done again" in again) == (0, True)


def test_a_folder_with_a_bad_picture_restores_the_rest_and_fails(runs, unbroken, sharpprior, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(folder / "good.png")
    (folder / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    status, text, error = sharpprior("restore", runs.folder(unbroken), folder, "-o", tmp_path / "out")
    assert status == 1
    assert "torn.jpg" in text
    assert "1 restored, 0 there already, 1 failed" in error
    assert (tmp_path / "out" / "good.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("restore", "{run}", "{tmp}/a.png", "-o", "b.png"), "a.png: no such file"),
        (("restore", "{tmp}/nowhere", "{tmp}", "-o", "b.png"), "nowhere: no such file"),
        (("restore", "{photo}", "--model", "{tmp}/nowhere", "-o", "b.png"), "nowhere: no such model"),
        (("restore", "{photo}", "--model", "{tmp}", "-o", "b.png"), "no model in it"),
        (("restore", "{run}"), "is a model: name the pictures"),
        (("restore", "{run}", "{photo}", "-o", "b.png", "--checkpoint", "step-7"), "there are step-6, step-12"),
        (("restore", "{run}", "{photo}", "-o", "b.png", "--device", "warp"), "--device warp"),
        (("restore", "{run}", "{tmp}", "-o", "b"), "no pictures in this folder"),
        (("verify", "{tmp}/nowhere"), "nowhere: no such data"),
        (("preview", "-o", "{tmp}/x.png", "--set", "blur.tierss=1"), "did you mean tiers?"),
    ],
)
def test_mistakes_are_one_line(runs, unbroken, sharpprior, tmp_path, arguments, words):
    photo = tmp_path.parent / f"{tmp_path.name}.png"
    Image.new("RGB", (8, 8)).save(photo)
    filled = [text.format(tmp=tmp_path, run=runs.folder(unbroken), photo=photo) for text in arguments]
    status, _, error = sharpprior(*filled)
    assert status == 1
    assert error.startswith("error: ")
    assert len(error.strip().splitlines()) == 1
    assert words in error


def test_a_damaged_model_is_refused(runs, unbroken, sharpprior, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs.folder(unbroken), run)
    weights = run / "checkpoints/step-00000012/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    status, _, error = sharpprior("restore", run, tmp_path / "a.png", "-o", tmp_path / "out.png")
    assert status == 1
    assert "model.safetensors" in error
    assert "--checkpoint" in error


def test_preview_draws_a_sheet_and_a_page(runs, sharpprior, tmp_path):
    assert sharpprior("preview", runs.val, "-o", tmp_path / "a.png", "--count", 2, "--crop", 64)[0] == 0
    assert Image.open(tmp_path / "a.png").size[0] > 200
    assert sharpprior("preview", runs.val, "-o", tmp_path / "a.html", "--count", 2, "--crop", 64)[0] == 0
    assert "<html" in (tmp_path / "a.html").read_text()


def test_verify_names_the_shard_and_the_sample(runs, sharpprior, tmp_path):
    assert sharpprior("verify", runs.val)[0] == 0
    bad = tmp_path / "bad"
    shutil.copytree(runs.val, bad)
    shard = json.loads((bad / "index.json").read_text())["shards"][0]
    content = bytearray((bad / shard["name"]).read_bytes())
    content[shard["members"]["jpg"][0][0] + 500] ^= 1
    (bad / shard["name"]).write_bytes(bytes(content))
    status, text, error = sharpprior("verify", bad)
    assert status == 1
    assert f"{shard['name']}: sample {shard['keys'][0]}.jpg" in text
    assert "1 problem" in error


def test_prepare_a_folder_then_verify_and_describe_it(runs, sharpprior, tmp_path):
    photos, out = tmp_path / "photos", tmp_path / "shards"
    photos.mkdir()
    for number in range(3):
        array = np.random.Generator(np.random.Philox(number)).integers(0, 256, (150, 170, 3), dtype=np.uint8)
        Image.fromarray(array).save(photos / f"Photo {number}.png")
    status, text, _ = sharpprior("prepare", "folder", photos, out, "--tile", 100, "--workers", 1)
    assert status == 0
    assert "12 samples" in text
    assert sharpprior("verify", out)[0] == 0
    status, text, _ = sharpprior("stats", out, "--pairs", 4, "--crop", 64, "-o", tmp_path / "extents.png")
    assert status == 0
    assert "12 samples" in text
    assert (tmp_path / "extents.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("prepare", "goprro", "{tmp}", "{tmp}/out"), "gopro"),
        (("prepare", "gopro", "{tmp}", "{tmp}/out"), "train"),
        (("prepare", "folder", "{tmp}/absent", "{tmp}/out"), "absent"),
        (("prepare", "video", "{tmp}", "{tmp}/out", "--levels", "7,x"), "--levels 7,x"),
        (("prepare", "video", "{tmp}", "{tmp}/out", "--levels", "8"), "odd numbers"),
    ],
)
def test_mistakes_of_prepare_are_one_line(sharpprior, tmp_path, arguments, words):
    status, _, error = sharpprior(*[text.format(tmp=tmp_path) for text in arguments])
    assert status == 1
    assert error.startswith("error: ")
    assert len(error.strip().splitlines()) == 1
    assert words in error
