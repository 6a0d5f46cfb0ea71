"""An oracle reads the sharp picture: it is evaluated with it or not at all, and called what it is wherever it shows."""

import dataclasses

import pytest
import torch

from data.shards.set import ShardSet
from model.pretrained import save_pretrained
from tests.train.evaluate.test_compare import evaluation
from tests.train.evaluate.trees import pairs_tree
from tests.train.small_sets import small_set
from train.checkpoint.export import export_model
from train.checkpoint.program import SUFFIXES, export_program
from train.checkpoint.saved import load_model
from train.config.file import configure
from train.config.networks import build_model
from train.evaluate import offline, telling
from train.evaluate.compare import compare, load_all
from train.evaluate.offline import Evaluating, Settings, finish
from train.evaluate.pairs import RecordedPairs, ValidationPairs
from train.evaluate.yardsticks import Yardsticks
from train.objective.task import DeblurTask

CPU = torch.device("cpu")
BOUND = "oracle: reads the sharp picture; a bound, no method"
SETTINGS = (
    "model.backbone={name: unet, width: 8, blocks: [1, 1]}",
    "model.student={name: light, width: 8}",
    "model.teacher={weights: random}",
    "model.spe={dim: 8, groups: 2}",
    "model.oracle=true",
    "train.distill_steps=0",
    "train.student_frozen=true",
    "engine.precision=fp32",
    "data.crop=64",
)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """A checkpoint's folder: the model, and the loss's statistics beside it."""
    folder, config = tmp_path_factory.mktemp("oracle") / "run", configure(SETTINGS)
    network = build_model(config)
    generator = torch.Generator().manual_seed(0)
    for name, each in network.named_parameters():
        if name.startswith(("spe", "backbone.leave")):
            torch.nn.init.normal_(each, std=0.05, generator=generator)
    save_pretrained(folder, network.state_dict(), config.model_dump(mode="json"))
    torch.save(DeblurTask(config, CPU).state_dict(), folder / "loss.pt")
    return folder


def crops(tmp_path) -> ValidationPairs:
    shards = ShardSet(small_set(tmp_path / "s", "val", 2))
    return ValidationPairs(shards, configure([]).blur, label="v", crop=64, per_tier=1, margin=16, max_pairs=5)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("train.evaluate.offline.yardsticks_of", lambda *_, **__: (Yardsticks(), "nothing"))


def test_it_is_evaluated_with_the_sharp_picture_and_called_a_bound(oracle, tmp_path):
    model = offline.Tested.load(oracle, "latest", CPU)
    pairs = crops(tmp_path)
    evaluation = Evaluating(model, pairs, tmp_path / "o", CPU, Settings(), overwrite=False)
    pair = pairs.read(pairs.items[0])
    dark = pair._replace(sharp=torch.zeros_like(pair.sharp))
    assert not torch.equal(evaluation.restored(pair), evaluation.restored(dark))
    assert evaluation.run() == 5
    results = finish(evaluation)
    assert results["model"]["oracle"] is True
    assert BOUND in telling.headline(results)[0]
    assert telling.headline(results)[1] != "good"
    assert any(BOUND in line for line in telling.lines(results))
    assert BOUND in telling.facts(results)["network"]
    assert "with the prior" not in telling.facts(results)["network"]
    assert telling.similarity_rows(results) is None  # the teacher is no prior
    for name in ("report.md", "report.html"):
        assert BOUND in (tmp_path / "o" / name).read_text()


def test_where_no_teacher_sees_the_sharp_picture_it_is_refused(oracle, tmp_path):
    model = offline.Tested.load(oracle, "latest", CPU)
    pictures = RecordedPairs("pairs", pairs_tree(tmp_path / "p", 2))
    export_model(oracle, tmp_path / "o.safetensors", which="latest", dtype="fp32", overwrite=False)
    exported = offline.Tested.load(tmp_path / "o.safetensors", "latest", CPU)
    for tested, pairs in ((model, pictures), (exported, crops(tmp_path))):
        with pytest.raises(ValueError, match=r"an oracle, .*evaluate its run or checkpoint on validation crops"):
            Evaluating(tested, pairs, tmp_path / "out", CPU, Settings(), overwrite=False)
    assert not (tmp_path / "out").exists()
    plain = dataclasses.replace(exported, config=configure(SETTINGS[:4]))
    Evaluating(plain, pictures, tmp_path / "out", CPU, Settings(), overwrite=False)  # any other model is welcome


def test_no_program_is_made_of_it(oracle, tmp_path):
    for kind, suffix in SUFFIXES.items():
        with pytest.raises(ValueError, match=f"an oracle, .*--format {kind}"):
            export_program(oracle, tmp_path / f"x{suffix}", kind)
    with pytest.raises(ValueError, match=r"an oracle, .*--format spandrel"):
        export_model(oracle, tmp_path / "x.safetensors", which="latest", dtype="fp32", overwrite=False, spandrel=True)
    assert load_model(oracle, CPU)[1].model.oracle


def test_a_comparison_names_it(tmp_path):
    folders = [evaluation(tmp_path / name, name, [1.0] * 10) for name in "ab"]
    loaded = load_all(folders)
    assert not any("oracle" in note for note in compare(loaded).notes)
    loaded[1].results["model"]["oracle"] = True
    assert f"b: {BOUND}" in compare(loaded).notes
