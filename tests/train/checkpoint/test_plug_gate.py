"""A backbone that is taken over brings the gate that judges it; the model that comes with the program has a name."""

import pytest
import torch

from model.pretrained import SHIPPED_NAME, save_pretrained
from tests.model.test_deblurrer import perturb
from train.checkpoint.plug import plug_in, with_plugged
from train.checkpoint.saved import RUNS, model_folder
from train.config.file import build_config, configure
from train.config.networks import build_model
from train.restore.names import find_model

BACKBONE = {"name": "unet", "width": 8, "blocks": [1, 1]}
PRIOR = ["model.student={width: 16}", "model.spe={dim: 16, groups: 4, heads: 4}"]


def saved(path, *, calibrated: bool = False, **model):
    config = build_config({"model": {"backbone": BACKBONE, "prior": False, "gate": True, **model}})
    network = build_model(config)
    perturb(network.backbone)
    perturb(network.gate)
    if calibrated:
        network.prior.statistics.frozen.fill_(True)
    save_pretrained(path, network.state_dict(), config.model_dump(mode="json"))
    return network.eval()


def plugged(*settings):
    config = with_plugged(configure(list(map(str, settings))))
    network = build_model(config)
    return network.eval(), config, plug_in(network, config)


def test_with_a_new_prior_it_is_the_gated_model_to_the_bit(tmp_path):
    source = saved(tmp_path / "gated.safetensors")
    network, config, origins = plugged(*PRIOR, f"model.backbone_from={tmp_path / 'gated.safetensors'}")
    assert (config.model.gate, config.model.prior, config.model.backbone) == (True, True, BACKBONE)
    assert network.gate.join is not None
    assert set(origins) == {"backbone"}
    x = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    one, other = network(x), source(x)
    assert torch.equal(one.restored[-1], other.restored[-1])
    assert torch.equal(one.extent, other.extent)
    assert not torch.equal(other.restored[-1], other.own)


def test_a_model_that_wants_no_gate_gets_none(tmp_path):
    source = saved(tmp_path / "gated.safetensors")
    network, config, _ = plugged(
        "model.prior=false", "model.gate=false", f"model.backbone_from={tmp_path / 'gated.safetensors'}"
    )
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    assert (network.gate, config.model.gate) == (None, False)
    assert torch.equal(network(x).restored[-1], source(x).own)


def test_a_gate_that_reads_a_prior_goes_with_it_and_stays_without_it(tmp_path, caplog):
    with_prior = {"prior": True, "student": {"width": 16}, "spe": {"dim": 16, "groups": 4, "heads": 4}}
    path = tmp_path / "gated.safetensors"
    source = saved(path, calibrated=True, **with_prior)
    caplog.set_level("INFO")
    network, *_ = plugged("model.prior=false", f"model.backbone_from={path}")
    assert not network.gate.map.weight.any()
    assert "its prior, which is not taken over" in caplog.text
    network, *_ = plugged(PRIOR[1], f"model.backbone_from={path}", f"model.prior_from={path}")
    state = source.gate.state_dict()
    assert all(torch.equal(state[name], value) for name, value in network.gate.state_dict().items())
    assert state["join.weight"].any()


def test_the_shipped_model_has_a_name_unless_something_else_has_it(tmp_path, monkeypatch):
    shipped = tmp_path / "program" / "sharpprior.safetensors"
    source = saved(shipped)
    for place in ("train.checkpoint.saved.SHIPPED", "train.restore.names.SHIPPED"):
        monkeypatch.setattr(place, shipped)
    monkeypatch.chdir(tmp_path)
    (tmp_path / SHIPPED_NAME).mkdir()  # a folder that is no model takes no name
    network, config, origins = plugged("model.prior=false", f"model.backbone_from={SHIPPED_NAME}")
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(network(x).restored[-1], source(x).restored[-1])
    assert config.model.backbone_from == SHIPPED_NAME
    assert origins["backbone"]["from"] == str(shipped)
    assert find_model(None) == find_model(SHIPPED_NAME) == model_folder(SHIPPED_NAME) == shipped
    (tmp_path / SHIPPED_NAME).rmdir()
    saved(tmp_path / "runs" / SHIPPED_NAME)
    assert find_model(SHIPPED_NAME) == RUNS / SHIPPED_NAME
    mine = tmp_path / SHIPPED_NAME
    saved(mine)
    assert model_folder(SHIPPED_NAME).absolute() == find_model(SHIPPED_NAME).absolute() == mine
    assert with_plugged(configure([f"model.backbone_from={SHIPPED_NAME}"])).model.backbone_from == str(mine)


def test_a_backbone_of_rate_0_stays_takes_no_gradient_and_the_gate_learns():
    small = "model.backbone={name: unet, width: 8, blocks: [1, 1]}"
    config = configure(["model.prior=false", "model.gate=true", "optim.backbone_lr_scale=0", small])
    network = build_model(config)
    assert {name.split(".")[0] for name, p in network.named_parameters() if p.requires_grad} == {"gate"}
    perturb(network)
    out = network(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
    assert not out.own.requires_grad
    out.restored[-1].square().mean().backward()
    assert network.gate.map.weight.grad.any()
    with pytest.raises(ValueError, match=r"backbone_lr_scale 0 .*nothing else learns.*model\.gate"):
        configure(["model.prior=false", "optim.backbone_lr_scale=0"])
