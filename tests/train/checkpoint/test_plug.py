"""A prior (or backbone) of one run in other networks: settings, weights and identity go over, and nothing else."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from model.deblurrer import Deblurrer
from model.encoder import weights_digest
from model.pretrained import save_pretrained
from train.checkpoint.export import export_model
from train.checkpoint.plug import plug_in, with_plugged
from train.checkpoint.saved import load_model
from train.config.file import configure, dump_config
from train.config.networks import build_model
from train.config.schema import Config

pytestmark = pytest.mark.slow

OTHERS = ("{name: unet, width: 12, blocks: [1, 1, 1]}", "{name: unet, width: 8, blocks: [2, 1], patch: 4}")
SMALL_SPE = "model.spe={dim: 16, groups: 4, heads: 4}"


def plugged(*settings: object) -> tuple[Deblurrer, Config, dict]:
    config = with_plugged(configure([SMALL_SPE, *map(str, settings)]))
    network = build_model(config)
    return network, config, plug_in(network, config)


def part(path, name: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(f"{name}."): v for k, v in load_file(path).items() if k.startswith(f"{name}.")}


@pytest.fixture(scope="module")
def checkpoint(runs, unbroken):
    return runs.folder(unbroken) / "checkpoints/step-00000012"


@pytest.fixture(scope="module")
def artefact(runs, unbroken, tmp_path_factory):
    """The prior of a run, alone in a file."""
    path = tmp_path_factory.mktemp("artefact") / "prior.safetensors"
    export_model(runs.folder(unbroken), path, which="latest", dtype="fp32", overwrite=False, prior=True)
    return path


@pytest.mark.parametrize("backbone", OTHERS)
def test_a_prior_in_another_network_is_an_identity_at_first_then_serves_and_stays(runs, unbroken, checkpoint, backbone):
    network, config, origins = plugged(f"model.prior_from={runs.folder(unbroken)}", f"model.backbone={backbone}")
    assert (config.model.levels, config.model.student.width) == (3, 16)
    given = part(checkpoint / "model.safetensors", "prior")
    assert origins["prior"] == {"from": str(checkpoint), "digest": weights_digest(network.prior)}
    with torch.no_grad():  # a fresh UNet is the identity: let it do something
        network.backbone.leave.weight.normal_(std=0.05)
    x = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    assert torch.equal(network(x).restored[-1], Deblurrer(copy.deepcopy(network.backbone))(x).restored[-1])
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    assert len(trained) == len([*network.backbone.parameters(), *network.spe.parameters()])
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-3), []
    sharp = x.roll(1, dims=-1)
    for _ in range(20):
        loss = (network.train()(x).restored[-1] - sharp).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert all(embedding.attend.scale.abs().max() > 0 for embedding in network.spe.values())
    state = network.prior.state_dict()
    assert state.keys() == given.keys()
    assert all(torch.equal(state[name], value) for name, value in given.items())


def test_a_prior_alone_in_a_file_is_the_same_prior_and_no_network(artefact, checkpoint, tmp_path, sharpprior):
    from_file, config, origins = plugged(f"model.prior_from={artefact}")
    from_run, *_ = plugged(f"model.prior_from={checkpoint}")
    assert origins["prior"]["from"] == str(artefact)
    assert weights_digest(from_file.prior) == weights_digest(from_run.prior)
    assert config.model.teacher_names == "efficientnet_lite0"
    assert artefact.stat().st_size < (checkpoint / "model.safetensors").stat().st_size
    with pytest.raises(ValueError, match="holds a prior alone: plug it"):
        load_model(artefact, torch.device("cpu"))
    half = tmp_path / "half.safetensors"
    status, out, _ = sharpprior("export", artefact, "--prior", "-o", half, "--dtype", "bf16")
    assert (status, "exported the prior of" in out) == (0, True)
    assert half.stat().st_size < 0.6 * artefact.stat().st_size
    low = plugged(f"model.prior_from={half}")[0].prior
    for a, b in zip(low.parameters(), from_file.prior.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.01, atol=1e-6)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("model.levels=4", "its prior has levels 3, and model.levels is 4 here"),
        ("model.teacher={name: resnet18}", "has teacher efficientnet_lite0, and model.teacher is resnet18 here"),
        ("model.student.width=32", "has student.width 16, and model.student.width is 32 here"),
        ("model.student.name=light", "has student.name efficientnet_lite0, and model.student.name is light"),
        ("model.student.fusion=same_level", "has student.fusion cross_level"),
    ],
)
def test_a_setting_that_differs_is_named(artefact, setting, words):
    with pytest.raises(ValueError, match=words):
        plugged(f"model.prior_from={artefact}", setting)
    same = ["model.levels=3", "model.teacher={name: efficientnet_lite0}", "model.student={width: 16, frozen_levels: 1}"]
    assert plugged(f"model.prior_from={artefact}", *same)[1].model.student.frozen_levels == 1


def saved(path, network: nn.Module, config: Config) -> str:
    save_pretrained(path, network.state_dict(), config.model_dump(mode="json"))
    return str(path)


def test_what_is_no_usable_prior_is_one_line(artefact, tmp_path):
    plain = configure(["model.prior=false", f"model.backbone={OTHERS[0]}"])
    none = saved(tmp_path / "none.safetensors", build_model(plain), plain)
    torn, other, changed = (tmp_path / f"{name}.safetensors" for name in ("torn", "other", "changed"))
    whole = artefact.read_bytes()
    torn.write_bytes(whole[:-1000])
    changed.write_bytes(whole[:-5] + b"\x00\x01\x02\x03\x04")
    save_file({"prior.weight": torch.ones(1)}, other)
    (tmp_path / "weights.pth").write_bytes(b"no")
    network, config, _ = plugged(f"model.prior_from={artefact}")
    with torch.no_grad():
        network.prior.project[0].bias[0] = torch.nan
    broken = saved(tmp_path / "broken.safetensors", network, config)
    fresh_config = configure(["model.levels=3", "model.student={width: 16}"])
    fresh = saved(tmp_path / "fresh.safetensors", build_model(fresh_config), fresh_config)
    for path, words in (
        (none, "that run has no prior"),
        (torn, "torn.safetensors.* (damaged|cannot be read)"),
        (changed, "changed.safetensors is damaged"),
        (other, "not written by this program"),
        (tmp_path / "weights.pth", "is no model: give a folder, or a .safetensors file"),
        (tmp_path / "absent", "no such run"),
        (broken, "values of project.0.bias are not finite"),
        (fresh, "its prior was never calibrated"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            plugged(f"model.prior_from={path}")
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="holds no prior: name a run"):
        export_model(
            tmp_path / "none.safetensors", tmp_path / "x", which="latest", dtype="fp32", overwrite=False, prior=True
        )


def test_a_run_that_goes_on_asks_its_own_folder_what_it_took_over(artefact, tmp_path):
    settings = [SMALL_SPE, f"run.root={tmp_path}", "run.name=mine", f"model.prior_from={tmp_path / 'gone.safetensors'}"]
    (tmp_path / "gone.safetensors").write_bytes(artefact.read_bytes())
    config = with_plugged(configure(settings))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").write_text(dump_config(config))
    (tmp_path / "gone.safetensors").unlink()
    assert with_plugged(configure(settings), resumed=True) == config
    with pytest.raises(ValueError, match="no such run"):
        with_plugged(configure(settings))


def test_a_backbone_of_another_run_comes_with_its_settings_and_without_its_embeddings(artefact, checkpoint):
    network, config, origins = plugged(f"model.backbone_from={checkpoint}", f"model.prior_from={artefact}")
    assert config.model.backbone == {"name": "unet", "width": 8, "blocks": [1, 1]}
    assert set(origins) == {"backbone", "prior"}
    given, state = part(checkpoint / "model.safetensors", "backbone"), network.backbone.state_dict()
    assert given.keys() == state.keys()
    assert all(torch.equal(state[name], value) for name, value in given.items())
    assert all(not embedding.attend.scale.any() for embedding in network.spe.values())
    with pytest.raises(ValueError, match=r"its backbone does not fit this model.*width: 12|'width': 12"):
        plugged(f"model.backbone_from={checkpoint}", f"model.backbone={OTHERS[0]}")
    with pytest.raises(ValueError, match="holds no backbone"):
        plugged(f"model.backbone_from={artefact}", "model.backbone={name: unet, width: 8, blocks: [1, 1]}")


def test_settings_of_a_file_give_way_to_the_priors_and_those_set_by_hand_do_not(artefact):
    file = ["model.student.width=48", f"model.prior_from={artefact}"]
    config = with_plugged(configure([SMALL_SPE, *map(str, file)]), asked=["model.spe.dim"])
    assert config.model.student.width == 16
    with pytest.raises(ValueError, match=r"its prior has student\.width 16, and model.student.width is 48 here"):
        with_plugged(configure([SMALL_SPE, *map(str, file)]), asked=["model.student.width"])
