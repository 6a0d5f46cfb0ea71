"""Checkpoints without a run: what is kept, what is refused, what a torn one looks like."""

import contextlib
import os
import shutil
import types

import pytest
import torch
from torch import nn

from model.pretrained import SafetensorsWriter
from train.checkpoint import folder as checkpoint
from train.checkpoint import manifest
from train.checkpoint.folder import Checkpoints
from train.checkpoint.manifest import CheckpointError, RunState, damage, read_state
from train.checkpoint.state import read_state_into
from train.config.schema import Config
from train.engine.average import Ema
from train.engine.counters import COUNTERS


class OneProcess:
    """As much of an engine as saving needs."""

    main, rank, world, config = True, 0, 1, Config()
    device = torch.device("cpu")

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        counters = dict.fromkeys(COUNTERS, 0)
        self.engine = types.SimpleNamespace(optimizer=torch.optim.AdamW(module.parameters()), **counters)

    def gather(self, thing: object) -> list[object]:
        return [thing]

    def agreed(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()


def state(step: int, gain: float | None = None) -> RunState:
    return RunState(step, step, 1, 0, 0, "", "", "", None, gain)


@pytest.fixture
def made(tmp_path):
    engine = OneProcess(nn.Linear(2, 2))
    return Checkpoints(tmp_path / "checkpoints", 2), engine, Ema(engine, 0.0)


def save(made, step: int, gain: float | None = None):
    checkpoints, engine, ema = made
    return checkpoints.save(engine, ema, state(step, gain), Config(), {})


def test_the_newest_and_the_best_are_kept(made):
    for step, gain in ((1, 0.1), (2, 0.5), (3, 0.2), (4, None), (5, 0.3)):
        save(made, step, gain)
    assert made[0].steps() == [2, 4, 5]
    assert made[0].best().name == "step-00000002"


def test_weights_that_are_not_finite_are_not_saved(made):
    save(made, 1)
    with torch.no_grad():
        made[1].module.weight[0, 0] = float("nan")
    made[2].update()
    with pytest.raises(CheckpointError, match=r"not finite \(weight\).*--init"):
        save(made, 2)
    assert [path.name for path in sorted(made[0].folder.iterdir())] == ["latest", "step-00000001"]


def test_a_checkpoint_that_cannot_be_written_leaves_the_older_ones(made, monkeypatch):
    save(made, 1)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SafetensorsWriter, "write", full)
    with pytest.raises(CheckpointError, match=r"cannot be written .*No space left"):
        save(made, 2)
    assert made[0].steps() == [1]
    assert damage(made[0].path(1)) is None


def test_going_on_from_an_older_one_sets_the_newer_aside_so_that_pruning_keeps_sound_ones(made):
    for step in (2, 4, 6):
        save(made, step)
    victim = made[0].path(6) / "model.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1])
    path, told = made[0].newest_whole()
    assert path == made[0].path(4)
    assert "model.safetensors" in told[0]
    made[0].set_aside_newer(4)
    save(made, 5)
    assert made[0].steps() == [4, 5]
    assert made[0].newest_whole() == (made[0].path(5), [])


def test_damage_names_the_file(made):
    path = save(made, 1)
    assert damage(path) is None
    weights = path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    assert "model.safetensors: its content changed" in damage(path)
    (path / "run.json").unlink()
    assert damage(path) is not None
    (path / "manifest.json").unlink()
    assert "manifest.json is missing" in damage(path)


def test_a_damaged_best_is_replaced(made):
    path = save(made, 1, 9.0)
    (path / "run.json").write_text("{")
    save(made, 2, 0.1)
    assert made[0].best().name == "step-00000002"


def test_what_a_kill_left_half_done_is_finished_or_removed(made):
    for step in (1, 2, 3):
        save(made, step)
    folder = made[0].folder
    os.rename(folder / "step-00000003", folder / "step-00000003.tmp")  # killed before its name
    shutil.copytree(folder / "step-00000002", folder / "step-00000004.tmp")
    (folder / "step-00000004.tmp" / "loss.pt").unlink()  # killed while writing
    shutil.copytree(folder / "step-00000002", folder / "step-00000002.old")  # killed while replacing
    (folder / "step-00000001.pruned").mkdir()  # killed while removing
    made[0].tidy()
    names = {path.name for path in folder.iterdir()}
    assert names == {"latest", "step-00000002", "step-00000003"}
    assert made[0].newest_whole() == (made[0].path(3), [])


def test_the_only_checkpoint_survives_a_kill_while_it_is_saved_again(made, monkeypatch):
    """A stop in an evaluation leaves a checkpoint that is saved again, with its gain, when the run goes on."""
    save(made, 1)
    real, died = os.rename, []

    def die_after(*paths):
        real(*paths)
        died.append(paths)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", die_after)
    with pytest.raises(KeyboardInterrupt):
        save(made, 1, 0.5)
    monkeypatch.setattr(os, "rename", real)
    assert died
    made[0].tidy()
    path, _ = made[0].newest_whole()
    assert path == made[0].path(1)
    assert read_state(path).gain == 0.5


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_a_state_comes_back_bit_for_bit_whatever_the_order_in_memory(made, order):
    module = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    engine = OneProcess(module)
    ema, optimizer = Ema(engine, 0.5), engine.engine.optimizer
    for _ in range(3):
        module(torch.rand(1, 3, 4, 4)).sum().backward()
        optimizer.step()
        ema.update()
    path = made[0].save(engine, ema, state(1), Config(), {})
    other = OneProcess(nn.Conv2d(3, 4, 3).to(memory_format=order))
    average = Ema(other, 0.5)
    read_state_into(path, other, average)
    for name, parameter in module.named_parameters():
        twin = dict(other.module.named_parameters())[name]
        assert torch.equal(parameter, twin)
        assert torch.equal(ema.averages[name], average.averages[name])
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(value, other.engine.optimizer.state[twin][key]), key
    assert average.updates == 3


def test_the_state_of_another_model_is_refused(made):
    path = save(made, 1)
    for module in (nn.Linear(2, 3), nn.Linear(2, 2, bias=False), nn.Sequential(nn.Linear(2, 2))):
        engine = OneProcess(module)
        with pytest.raises(ValueError, match=r"state of another model.*--?init"):
            read_state_into(path, engine, Ema(engine, 0.0))
    (path / "state" / "rank-00000.safetensors").unlink()
    with pytest.raises(ValueError, match="no state of a training run"):
        read_state_into(path, made[1], made[2])


def test_pointers_that_a_kill_left_behind_are_mended_so_that_the_best_is_never_pruned(made, monkeypatch):
    save(made, 1, 0.1)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_point", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            save(made, 2, 0.9)  # it has its name, but `latest` and `best` do not say so
    made[0].tidy()
    assert (made[0].folder / "latest").read_text() == "step-00000002\n"
    assert made[0].best() == made[0].path(2)
    for step in (3, 4, 5):
        save(made, step, 0.2)
    assert made[0].steps() == [2, 4, 5]
    made[0].set_aside_newer(1)
    assert not (made[0].folder / "latest").exists()
    assert made[0].best() is None


def test_an_older_one_of_the_step_comes_back_where_the_newer_is_torn(made):
    path = save(made, 1)
    shutil.copytree(path, path.with_suffix(".tmp"))
    (path.with_suffix(".tmp") / "loss.pt").unlink()
    os.rename(path, path.with_suffix(".old"))
    made[0].tidy()
    assert made[0].newest_whole() == (path, [])


def test_every_rank_hashes_what_it_wrote_and_rank_0_misses_what_is_not_there(made, monkeypatch):
    hashed = []
    real = manifest.digest
    monkeypatch.setattr(manifest, "digest", lambda file: hashed.append(file.name) or real(file))
    there = {"rng-rank1.pt": {"bytes": 3, "blake2b": "of rank 1"}}
    monkeypatch.setattr(OneProcess, "gather", lambda self, own: [own, there])
    with pytest.raises(CheckpointError, match=r"rng-rank1\.pt of another rank is not there: run\.root must be"):
        save(made, 1)
    random_state = checkpoint._random_state

    def beside_rank_1() -> dict:
        (made[0].folder / "step-00000001.tmp/rng-rank1.pt").write_text("abc")
        return random_state()

    monkeypatch.setattr(checkpoint, "_random_state", beside_rank_1)
    hashed.clear()
    path = save(made, 1)
    assert manifest.manifest_of(path)["rng-rank1.pt"] == there["rng-rank1.pt"]
    assert "rng-rank1.pt" not in hashed
    assert len(hashed) == len(set(hashed))


def test_a_file_that_cannot_be_removed_yet_does_not_end_the_run(made, monkeypatch):
    def busy(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(39, "Directory not empty")

    for step in (1, 2):
        save(made, step)
    monkeypatch.setattr(shutil, "rmtree", busy)
    save(made, 3)
    assert made[0].steps() == [2, 3]


def test_a_manifest_that_names_nothing_is_no_checkpoint(made):
    path = save(made, 1)
    (path / "manifest.json").write_text("{}")
    assert "names no files" in damage(path)


def test_a_kill_while_an_old_one_is_removed_leaves_nothing_torn_and_brings_nothing_back(made, monkeypatch):
    for step in (1, 2):
        save(made, step)

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        made[0].keep = 1
        with pytest.raises(KeyboardInterrupt):
            made[0].prune(2)
    assert made[0].steps() == [2]
    made[0].tidy()
    assert made[0].steps() == [2]
    assert {path.name for path in made[0].folder.iterdir()} == {"latest", "step-00000002"}
