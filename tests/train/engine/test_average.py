"""The averaged weights: what they are, that they come and go without a trace."""

import pytest
import torch
from torch import nn

from train.engine.average import Ema


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_the_average_follows_its_recurrence():
    module = make()
    ema = Ema(module, 0.9)
    expected = module[0].weight.detach().clone()
    for update in range(50):
        with torch.no_grad():
            module[0].weight.add_(0.1)
        ema.update()
        decay = min(0.9, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * module[0].weight.detach()
    torch.testing.assert_close(ema.averages["0.weight"], expected)


def test_a_bf16_model_is_averaged_in_fp32():
    module = make().to(torch.bfloat16)
    ema = Ema(module, 0.9999)
    ema.updates = 10**6
    start = ema.averages["0.bias"].clone()
    with torch.no_grad():
        module[0].bias.add_(1.0)
    for _ in range(100):
        ema.update()
    moved = (ema.averages["0.bias"] - start) / (module[0].bias.float() - start)
    torch.testing.assert_close(moved, torch.full_like(moved, 1 - 0.9999**100), rtol=1e-3, atol=0)


def test_weights_come_back_bit_for_bit_also_after_an_error():
    module = make()
    ema = Ema(module, 0.5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    ema.update()
    kept = {name: tensor.clone() for name, tensor in module.state_dict().items()}

    def fail_inside():
        with ema.in_place_of_weights():
            assert torch.equal(module[2].weight, ema.averages["2.weight"])
            assert not torch.equal(module[2].weight, kept["2.weight"])
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, kept[name])


def test_decay_0_is_the_weights_themselves():
    module = make()
    ema = Ema(module, 0.0)
    with torch.no_grad():
        module[0].weight.mul_(3.0)
    ema.update()
    assert torch.equal(ema.averages["0.weight"], module[0].weight)
    with pytest.raises(ValueError, match="decay"):
        Ema(module, 1.0)


def test_an_offloaded_average_is_gathered_where_collectives_are_done(monkeypatch):
    """Parameters that ZeRO-3 keeps in host memory have their averages there; NCCL takes tensors of GPUs alone."""
    module = nn.Linear(3, 1, bias=False)
    module.weight.ds_id, module.weight.ds_tensor = 0, module.weight.detach().view(-1).clone()
    module.weight.ds_numel, module.weight.ds_shape = 3, torch.Size((1, 3))
    seen = []

    def gather(parts, part):
        seen.extend(tensor.device.type for tensor in (*parts, part))

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather", gather)
    ema = Ema(module, 0.9, torch.device("meta"))
    assert ema.averages["weight"].device.type == "cpu"
    assert ema.whole("weight").shape == (1, 3)
    assert seen == ["meta"] * 3
