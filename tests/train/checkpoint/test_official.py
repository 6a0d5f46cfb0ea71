"""Official checkpoints become models: every wrapper, and nothing that is wrong, torn or hostile."""

import argparse
import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from model.deblurrer import build_backbone
from model.pretrained import load_state
from train.checkpoint.official import import_official, read_official
from train.checkpoint.saved import load_model

SMALL = {"width": 8, "enc_blk_nums": [1, 1], "middle_blk_num": 1, "dec_blk_nums": [1, 1]}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    net = build_backbone("nafnet", **SMALL)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net


def _module(state):
    return {f"module.{name}": value for name, value in state.items()}


WRAPPED = {
    "bare": lambda state: state,
    "params": lambda state: {"params": state},
    "params_ema": lambda state: {"params": {k: v * 0 for k, v in state.items()}, "params_ema": state},
    "state_dict": lambda state: {
        "epoch": 3,
        "state_dict": _module(state),
        "optimizer": {"state": {}, "param_groups": []},
    },
    "model": lambda state: {"model": state},
    "module": _module,
    "stripformer": lambda state: {"model_state": _module(state)},
    "options": lambda state: {
        "state_dict": state,
        "opt": argparse.Namespace(lr=1e-4, sizes=[1]),
        "best": np.float64(32.7),
        "curve": np.arange(3.0),
    },
    "nested": lambda state: {"model": {"state_dict": _module(state)}},
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_a_checkpoint_in_every_wrapper_restores_as_the_network_itself(network, tmp_path, wrapper):
    torch.save(WRAPPED[wrapper](network.state_dict()), tmp_path / "official.pth")
    import_official(tmp_path / "official.pth", "nafnet", SMALL, tmp_path / "run", overwrite=False)
    model, config, _ = load_model(tmp_path / "run", torch.device("cpu"))
    assert config.model.backbone == {"name": "nafnet", **SMALL}
    assert not config.model.prior
    image = torch.rand(1, 3, 37, 50)
    with torch.no_grad():
        padded = torch.nn.functional.pad(image, (0, -50 % 4, 0, -37 % 4), mode="reflect")
        assert torch.equal(model(image).restored[-1], network(padded)[-1][..., :37, :50])


def test_safetensors_and_a_single_file(network, tmp_path):
    save_file(network.state_dict(), tmp_path / "official.safetensors")
    out = tmp_path / "one.safetensors"
    import_official(tmp_path / "official.safetensors", "nafnet", SMALL, out, overwrite=False)
    assert load_state(out).keys() == {f"backbone.{name}" for name in network.state_dict()}
    with pytest.raises(ValueError, match="exists"):
        import_official(tmp_path / "official.safetensors", "nafnet", SMALL, out, overwrite=False)


def test_a_checkpoint_of_another_network_names_the_one_it_fits(tmp_path):
    torch.save({"params": build_backbone("uformer-t").state_dict()}, tmp_path / "u.pth")
    with pytest.raises(ValueError, match=r"no checkpoint of nafnet-32.*it is a checkpoint of uformer-t"):
        import_official(tmp_path / "u.pth", "nafnet-32", {}, tmp_path / "run", overwrite=False)
    assert not (tmp_path / "run").exists()


class _Hostile:
    def __reduce__(self):
        return os.mkdir, (_Hostile.mark,)


def test_a_hostile_file_runs_nothing(network, tmp_path):
    _Hostile.mark = str(tmp_path / "ran")
    for name, save in (("zip", torch.save), ("pickle", lambda thing, path: path.write_bytes(pickle.dumps(thing)))):
        path = tmp_path / f"{name}.pth"
        save({"state_dict": network.state_dict(), "extra": _Hostile()}, path)
        with pytest.raises(ValueError, match=r"may run code|damaged or no checkpoint"):
            import_official(path, "nafnet", SMALL, tmp_path / "run", overwrite=False)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "run").exists()


def test_torn_and_foreign_files_give_one_line(network, tmp_path):
    whole = tmp_path / "whole.pth"
    torch.save(network.state_dict(), whole)
    data = whole.read_bytes()
    torn = [data[:n] for n in (0, 1, 100, len(data) // 2, len(data) - 1)] + [b"<html>404</html>", os.urandom(999)]
    for number, piece in enumerate(torn):
        for name in (f"{number}.pth", f"{number}.safetensors"):
            (tmp_path / name).write_bytes(piece)
            with pytest.raises(ValueError, match=name) as caught:
                read_official(tmp_path / name)
            assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no such file"):
        read_official(tmp_path / "absent.pth")
    torch.save({"epoch": 1, "weights": np.float64(1.0).item()}, tmp_path / "none.pth")
    with pytest.raises(ValueError, match="holds no state dict"):
        read_official(tmp_path / "none.pth")


def test_weights_that_are_not_finite_are_refused(network, tmp_path):
    state = {name: value.clone() for name, value in network.state_dict().items()}
    next(iter(state.values())).view(-1)[0] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(ValueError, match="not finite"):
        import_official(tmp_path / "nan.pth", "nafnet", SMALL, tmp_path / "run", overwrite=False)
