"""The averaged weights: what they are, that they come and go without a trace."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from train.config.schema import Config
from train.engine.average import Ema


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def averaged(module: nn.Module, decay: float) -> Ema:
    """Of a module under as much of an engine as the average needs: one process, no ZeRO."""
    inner = SimpleNamespace(optimizer=torch.optim.AdamW(module.parameters()))
    engine = SimpleNamespace(engine=inner, module=module, world=1, config=Config(), device=torch.device("cpu"))
    return Ema(engine, decay)


def test_the_average_follows_its_recurrence():
    module = make()
    ema = averaged(module, 0.9)
    expected = module[0].weight.detach().clone()
    for update in range(50):
        with torch.no_grad():
            module[0].weight.add_(0.1)
        ema.update()
        decay = min(0.9, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * module[0].weight.detach()
    torch.testing.assert_close(ema.whole("0.weight"), expected)


def test_a_bf16_model_is_averaged_in_fp32():
    module = make().to(torch.bfloat16)
    ema = averaged(module, 0.9999)
    ema.updates = 10**6
    start = ema.whole("0.bias").clone()
    with torch.no_grad():
        module[0].bias.add_(1.0)
    for _ in range(100):
        ema.update()
    moved = (ema.whole("0.bias") - start) / (module[0].bias.float() - start)
    torch.testing.assert_close(moved, torch.full_like(moved, 1 - 0.9999**100), rtol=1e-3, atol=0)


def test_weights_come_back_bit_for_bit_also_after_an_error():
    module = make()
    ema = averaged(module, 0.5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    ema.update()
    kept = {name: tensor.clone() for name, tensor in module.state_dict().items()}

    def fail_inside():
        with ema.in_place_of_weights():
            assert torch.equal(module[2].weight, ema.whole("2.weight"))
            assert not torch.equal(module[2].weight, kept["2.weight"])
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, kept[name])


def test_decay_0_is_the_weights_themselves():
    module = make()
    ema = averaged(module, 0.0)
    with torch.no_grad():
        module[0].weight.mul_(3.0)
    ema.update()
    assert torch.equal(ema.whole("0.weight"), module[0].weight)
    with pytest.raises(ValueError, match="decay"):
        averaged(module, 1.0)


def test_an_offloaded_average_is_put_together_where_collectives_are_done(monkeypatch):
    """What the optimizer steps in host memory has its averages there; NCCL takes tensors of GPUs alone."""
    module, seen = nn.Linear(3, 1, bias=False), []
    ema = averaged(module, 0.9)
    ema._engine.config, ema._engine.world, ema._engine.device = Config(engine={"zero": 1}), 2, torch.device("meta")
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values: seen.append(values.device.type))
    assert ema.averages["weight"].device.type == "cpu"
    assert ema.whole("weight").shape == (1, 3)
    assert seen == ["meta"]
