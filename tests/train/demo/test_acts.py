"""The demo without its page: photographs, limits, the playground's blur and its honest scores."""

import math
import re

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from data.blur.severity import severity_of
from data.image import psnr
from train.demo import play
from train.demo.acts import Acts, How
from train.demo.examples import BLURRY, blurry_examples, sharp_photos
from train.demo.limits import Limits
from train.demo.models import LOADED, Models, labelled, tile_of
from train.demo.photo import SHOWN, for_page
from train.demo.visit import Visit
from train.demo.words import scoreboard
from train.restore.picture import PictureError
from train.restore.restorer import Restorer

CPU = torch.device("cpu")
LINE = [[0.1, 0.5, 0.0], [0.9, 0.5, 1.0]]


@pytest.fixture(scope="module")
def models(model_file) -> Models:
    return Models([str(model_file)], CPU)


@pytest.fixture
def acts(models, tmp_path) -> Acts:
    root = tmp_path / "visits"
    root.mkdir()
    return Acts(models, Limits(megabytes=0.5, megapixels=0.1), root)


@pytest.fixture
def how(models) -> How:
    return How(models.labels[0])


def picture(height: int = 60, width: int = 90, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).uniform(0, 255, (height, width, 3))
    return np.rint(gaussian_filter(noise, (2, 2, 0)) * 2 - 128).clip(0, 255).astype(np.uint8)


# -- a visitor's photograph -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0])
def test_a_photograph_comes_back_as_the_restorer_makes_it_blended(acts, how, model_file, tmp_path, strength):
    path = tmp_path / "mine.png"
    Image.fromarray(picture()).save(path)
    (before, after), told, file, visit = acts.restore(path, strength, how, None)
    full = Restorer.load(model_file, "cpu")(picture()).astype(np.float64)
    wanted = np.rint(picture() + strength * (full - picture()))
    assert np.abs(full - picture()).max() > 20
    np.testing.assert_array_equal(before, picture())
    np.testing.assert_allclose(after, wanted, atol=0.5)
    np.testing.assert_array_equal(np.asarray(Image.open(file)), after)
    assert file.name == "mine_restored.png"
    assert file.is_relative_to(visit.folder)
    assert "90 × 60 px · 8 bits" in told
    assert "No score" in told


def test_another_strength_restores_nothing_again(acts, how, models, tmp_path, monkeypatch):
    path = tmp_path / "mine.jpg"
    Image.fromarray(picture()).save(path)
    *_, visit = acts.restore(path, 1.0, how, None)
    monkeypatch.setattr(Restorer, "__call__", lambda *_, **__: pytest.fail("restored again"))
    (before, after), _, file = acts.blend(0.0, visit)
    np.testing.assert_array_equal(before, after)
    assert file.name == "mine_restored.jpg"
    with pytest.raises(ValueError, match=r"strength 1\.5: expected 0"):
        acts.blend(1.5, visit)


def test_16_bits_alpha_and_profile_stay(acts, how, tmp_path):
    deep = np.concatenate([picture().astype(np.uint16) * 257, np.full((60, 90, 1), 40_000, np.uint16)], axis=2)
    cv2.imwrite(str(tmp_path / "deep.png"), cv2.cvtColor(deep, cv2.COLOR_RGBA2BGRA))
    (before, _), told, file, visit = acts.restore(tmp_path / "deep.png", 0.0, how, None)
    np.testing.assert_array_equal(cv2.imread(str(file), cv2.IMREAD_UNCHANGED), cv2.cvtColor(deep, cv2.COLOR_RGBA2BGRA))
    np.testing.assert_array_equal(before, picture())
    assert "16 bits" in told
    assert visit.photo.picture.colour.size == 0  # pixels lie on the disk, not in memory


def test_a_visit_has_a_folder_of_its_own_that_ends_with_it(acts, how, tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    visits = [acts.restore(tmp_path / "a.png", 1.0, how, None)[3] for _ in range(2)]
    assert visits[0].folder != visits[1].folder
    assert visits[0].folder.stat().st_mode & 0o077 == 0
    again = acts.restore(tmp_path / "a.png", 1.0, how, visits[0])[3]
    assert again is visits[0]
    again.end()
    assert not again.folder.exists()
    with pytest.raises(ValueError, match="restore a photograph first"):
        acts.blend(1.0, again)


def test_large_pictures_are_shown_smaller():
    assert for_page(np.zeros((20, 3 * SHOWN, 3), np.uint8)).shape == (7, SHOWN, 3)
    assert for_page(np.full((4, 4, 3), 65535, np.uint16)).max() == 255


# -- limits -----------------------------------------------------------------------------------------------------------


def test_what_is_too_large_is_told_before_it_is_decoded(acts, how, tmp_path, monkeypatch):
    Image.fromarray(np.zeros((400, 400, 3), np.uint8)).save(tmp_path / "wide.png")
    (tmp_path / "heavy.png").write_bytes(b"x" * 600_000)
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xffnothing")
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    for name, words in (
        ("wide.png", r"wide.png: 400×400 px are 0.2 megapixels: at most 0.1 here"),
        ("heavy.png", r"heavy.png: 0.6 MB: at most 0.5 MB here"),
        ("notes.txt", r"notes.txt: give a picture \(\.jpg"),
        ("broken.jpg", r"broken.jpg: is no picture that can be read"),
    ):
        with pytest.raises(PictureError, match=words):
            acts.restore(tmp_path / name, 1.0, how, None)
        with pytest.raises(PictureError, match=words):
            acts.own_sharp(tmp_path / name)


def test_visitors_are_told_names_and_no_places_on_the_server(acts, how, model_file, tmp_path, monkeypatch):
    Image.fromarray(picture()).save(tmp_path / "cut.png")
    data = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    frames = [Image.new("RGB", (9, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "two.webp", save_all=True, append_images=frames[1:])
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "broken.safetensors").write_bytes(b"\x10" + b"\0" * 7 + b"garbage")
    two = Acts(Models([str(model_file), str(tmp_path / "lab" / "broken.safetensors")], CPU), Limits(), acts.root)
    Image.fromarray(picture()).save(tmp_path / "good.png")
    told = []
    for name, model in (("cut.png", 0), ("two.webp", 0), ("text.png", 0), ("good.png", 1)):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            two.restore(tmp_path / name, 1.0, How(two.models.labels[model]), None)
        told.append(str(error.value))
    assert told[0].startswith("cut.png: does not decode")
    assert told[1].startswith("two.webp: has 2 pages")
    assert told[2].startswith("text.png: is no picture")
    assert told[3].startswith("broken.safetensors: this model does not load")
    *_, visit = acts.restore(tmp_path / "good.png", 1.0, how, None)
    monkeypatch.setitem(Image.SAVE, "PNG", lambda *_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(PictureError) as error:
        acts.blend(0.5, visit)
    told.append(str(error.value))
    assert told[4].startswith("good_restored.png: cannot be written")
    assert not any(str(tmp_path.parent) in words or "/" in words for words in told)


def test_the_size_of_deep_tiffs_is_known_too(tmp_path):
    import tifffile

    tifffile.imwrite(tmp_path / "deep.tif", np.zeros((300, 500, 3), np.uint16))
    assert Limits().check(tmp_path / "deep.tif") == (500, 300)


@pytest.mark.parametrize("name", ["megabytes", "megapixels", "waiting", "minutes"])
def test_limits_of_nothing_are_refused(name):
    with pytest.raises(ValueError, match=f"--{name} 0: give a number above 0"):
        Limits(**{name: 0})


def test_whole_pictures_have_a_limit_and_choices_are_checked():
    assert tile_of("auto", 5000, 5000) == "auto"
    assert tile_of("256", 5000, 5000) == 256
    assert tile_of("whole picture", 1000, 1000) is None
    with pytest.raises(ValueError, match="up to 2 megapixels here"):
        tile_of("whole picture", 2000, 2000)
    with pytest.raises(ValueError, match="tile 1: expected one of auto"):
        tile_of("1", 10, 10)


def test_models_are_named_without_their_place_and_few_stay_loaded(model_file, tmp_path):
    names = [tmp_path / part / "model.safetensors" for part in ("a", "b", "c")]
    for name in names:
        name.parent.mkdir()
        name.write_bytes(model_file.read_bytes())
    models = Models([str(name) for name in names], CPU)
    assert models.labels == ["a/model.safetensors", "b/model.safetensors", "c/model.safetensors"]
    first = models.get("a/model.safetensors")
    assert models.get("a/model.safetensors") is first
    for label in models.labels[1:]:
        models.get(label)
    assert len(models._loaded) == LOADED
    assert models.get("a/model.safetensors") is not first
    with pytest.raises(ValueError, match="/etc/passwd: no model of this page"):
        models.get("/etc/passwd")
    assert labelled(["/x/runs/a", "/y/runs/b", None]) == {
        "a": "/x/runs/a", "b": "/y/runs/b", "the model that comes with the program": None,
    }  # fmt: skip


# -- the playground ---------------------------------------------------------------------------------------------------


def test_light_gathers_where_the_hand_was_slow():
    points = [[0.0, 0.5, 0.0], [0.5, 0.5, 0.9], [1.0, 0.5, 1.0]]  # the left half takes nine tenths of the time
    path = play.path_of(points)
    assert path.shape[1] == 2
    assert np.mean(path[:, 1] < 0.5) == pytest.approx(0.9, abs=0.01)
    assert (path[:, 0] == 0.5).all()
    kernel = play.kernel_of(points, 40)
    row = kernel[len(kernel) // 2]
    streak = np.flatnonzero(row > 0)
    assert row[streak[:18]].sum() == pytest.approx(0.8, abs=0.03)
    assert np.ptp(streak) == pytest.approx(40, abs=2)


@pytest.mark.parametrize(
    "points", [None, [], [[0, 0, 0]], [[0, 0, 0], [0, 0, 1]], [[0, 0, 0], [1, 1, 0]], "path", [[0, 1], [1, 2]],
               [[math.nan, 0, 0], [1, 1, 1]], [[0, 0, 0]] * 6000, {"a": 1}],
)  # fmt: skip
def test_what_is_no_path_is_told(points):
    with pytest.raises(ValueError, match="draw a"):
        play.path_of(points)


@pytest.mark.parametrize("tier", ["mild", "moderate", "severe", "extreme"])
def test_sampled_paths_are_of_their_tier_and_fit_the_pad(tier):
    for seed in range(12):
        points, extent = play.sample_path(tier, np.random.default_rng(seed))
        assert severity_of(extent) == tier
        assert play.EXTENTS[0] <= extent <= play.EXTENTS[1]
        xy = np.array(points)[:, :2]
        assert xy.min() >= 0.1 - 1e-9
        assert xy.max() <= 0.9 + 1e-9
        assert np.ptp(play.path_of(points), axis=0).max() == pytest.approx(0.8, rel=1e-6)


def test_the_blur_is_that_of_linear_light():
    """Against a mean over shifted copies in linear light, written here again, of a picture without highlights."""
    sharp = (picture(120, 140) * 0.8).astype(np.uint8)
    extent = 20
    blurry = play.blur(sharp, play.kernel_of([[0, 0.5, 0], [1, 0.5, 1]], extent), noise=0)
    v = sharp / 255.0
    light = np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)
    shifts = np.arange(-extent * 4, extent * 4 + 1) / 8
    wide = np.pad(light, ((0, 0), (20, 20), (0, 0)), mode="reflect")
    at = np.arange(140)[None] + 20 - shifts[:, None]
    low, part = np.floor(at).astype(int), (at % 1)[..., None]
    mean = np.mean(
        [wide[:, a] * (1 - p) + wide[:, a + 1] * p for a, p in zip(low, part[:, None], strict=True)], axis=0
    ).squeeze()
    wanted = 255 * np.where(mean <= 0.0031308, 12.92 * mean, 1.055 * mean ** (1 / 2.4) - 0.055)
    assert np.abs(blurry - wanted)[:, 1:-1].mean() < 0.5
    assert psnr(blurry, sharp) < 30
    noisy = play.blur(sharp, play.kernel_of([[0, 0.5, 0], [1, 0.5, 1]], extent), noise=3)
    assert 0.5 < np.std(noisy.astype(int) - blurry) < 12


def test_scores_are_against_the_best_that_smoothing_can_do():
    sharp = picture(96, 96)
    blurry = np.clip(sharp + np.random.default_rng(1).normal(0, 25, sharp.shape), 0, 255).astype(np.uint8)
    rows = play.scored(sharp, blurry, sharp, None)
    by = {row.kind: row for row in rows}
    assert by["ours"].scores["psnr"] == 60.0
    assert by["blurry"].scores["psnr"] == pytest.approx(psnr(blurry, sharp), abs=1e-9)
    tried = [
        psnr(np.rint(gaussian_filter(blurry.astype(np.float64), (s, s, 0))).clip(0, 255).astype(np.uint8), sharp)
        for s in (0.4, 0.6, 0.8, 1.0, 1.4, 2.0, 2.8)
    ]
    best = play.best_trivial(rows)
    assert "Gaussian" in best.name
    assert best.scores["psnr"] == pytest.approx(max(tried), abs=0.1)
    assert [row.kind for row in rows] == ["blurry", "trivial", "trivial", "ours"]


def test_deconvolution_is_told_the_kernel_and_is_no_rival(acts, how):
    sharp = sharp_photos()["fig"][100:356, 100:356]
    kernel = play.kernel_of(LINE, 20)
    blurry = play.blur(np.ascontiguousarray(sharp), kernel, noise=0.2)
    rows = {row.kind: row for row in play.scored(sharp, blurry, blurry, kernel)}
    assert rows["told"].scores["psnr"] > rows["blurry"].scores["psnr"] + 1
    assert play.best_trivial(list(rows.values())).kind != "told"


def row(kind: str, quality: float, structure: float) -> play.Row:
    return play.Row(f"<{kind}>", kind, {"psnr": quality, "ssim": structure})


@pytest.mark.parametrize(
    ("ours", "mood", "words"),
    [
        ((21.0, 0.6), "good", "0.50 dB better than the best anyone can do without one"),
        ((21.0, 0.4), "warning", "0.50 dB better, but worse by SSIM, than the best without one"),
        ((20.5, 0.6), "warning", r"no better \(\+0\.00 dB\)"),
        ((20.3, 0.6), "bad", "0.20 dB WORSE"),
    ],
)
def test_the_verdict_is_over_the_best_trivial(ours, mood, words):
    text = scoreboard([row("blurry", 20.0, 0.5), row("trivial", 20.5, 0.5), row("told", 30.0, 0.9), row("ours", *ours)])
    assert f'class="verdict {mood}"' in text
    assert re.search(words, text)
    assert "&lt;trivial&gt;" in text
    assert "<trivial>" not in text


def test_the_playground_gives_what_it_says(acts, how, model_file):
    sharp = picture(200, 200)
    done = acts.play(sharp, LINE, 24, 0, how)
    np.testing.assert_array_equal(done.blurry, play.blur(sharp, play.kernel_of(LINE, 24), 0))
    np.testing.assert_array_equal(done.restored, Restorer.load(model_file, "cpu")(done.blurry))
    assert "Motion over 24 px: moderate" in done.words
    assert f"{psnr(done.restored, sharp):.2f} dB" in done.words
    assert done.kernel.max() > 100
    with pytest.raises(ValueError, match="noise 99: 0 to 10"):
        acts.play(sharp, LINE, 24, 99, how)
    with pytest.raises(ValueError, match="extent 500 px: 4 to 160"):
        acts.play(sharp, LINE, 500, 0, how)


def test_a_sharp_photograph_of_the_visitor_becomes_a_square(acts, tmp_path):
    Image.fromarray(picture(180, 260)).save(tmp_path / "wide.png")
    np.testing.assert_array_equal(acts.own_sharp(tmp_path / "wide.png"), picture(180, 260)[:, 40:220])
    Image.fromarray(picture(20, 260)).save(tmp_path / "flat.png")
    with pytest.raises(ValueError, match="260×20 px: give a photograph of at least 162 px a side"):
        acts.own_sharp(tmp_path / "flat.png")


def test_examples_are_blurred_and_scored(acts, how):
    examples = blurry_examples()
    assert [each.tier for each in examples] == list(BLURRY.values())
    for each in examples:
        assert psnr(each.blurry, each.sharp) < 30
    acts = Acts(acts.models, Limits(), acts.root)
    (before, _), told, file, visit = acts.restore_example(examples[0], 1.0, how, Visit.begin(acts.root))
    np.testing.assert_array_equal(before, examples[0].blurry)
    assert "best without a model" in told
    assert "No score" not in told
    assert file.name == "example_restored.png"
    assert "best without a model" in acts.blend(0.5, visit)[1]
