"""Replayed passes give the bits of eager ones; on a CPU, where a stand-in replays by running the function again."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.train.engine.graph_cases import Small, assert_same, graphed, image, learn, loss_of, small
from tests.train.engine.test_network import network
from train.engine import graphs as subject
from train.engine.graphs import kept_buffers
from train.engine.network import recompute_blocks


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("keep_gradients", [False, True])
def test_steps_are_the_same_bits_in_both_stages_with_accumulation_and_kept_gradients(accumulation, keep_gradients):
    module = small()
    found = graphed(module)
    settings = {"steps": 12, "distill": 6, "accumulation": accumulation, "keep_gradients": keep_gradients}
    assert_same(learn(module, **settings), learn(small(), **settings))
    assert found.recorder.captured == 4  # two passes of each stage
    assert found.replays == 12 * accumulation - 2 * subject.EAGER_CALLS


def test_the_deblurrer_of_the_product_steps_with_the_same_bits():
    def loss(out):
        return out.restored[0].square().mean() + sum(level.square().mean() for level in out.prior)

    plain, module = network(), network()
    found = graphed(module, eager_calls=1)
    assert_same(learn(module, 3, loss=loss), learn(plain, 3, loss=loss))
    assert found.replays == 2


def test_recomputed_blocks_can_be_replayed():
    def loss(out):
        return out.restored[0].square().mean() + sum(level.square().mean() for level in out.prior)

    plain, module = network(), network()
    recompute_blocks(module)
    found = graphed(module, eager_calls=0)
    assert_same(learn(module, 2, loss=loss), learn(plain, 2, loss=loss))
    assert found.replays == 2


def test_gradients_handed_out_are_not_the_graph_s_own_memory(monkeypatch):
    """What autograd keeps as a parameter's grad would be overwritten by the next replay, before it is added to: with
    aliases, which torch's own make_graphed_callables hands out, accumulation goes wrong."""
    expected = learn(small(), 6, accumulation=2)
    module = small()
    graphed(module, eager_calls=1)
    monkeypatch.setattr(subject._FreshMemory, "copies", lambda self, tensors: [t.detach() for t in tensors])
    assert learn(module, 6, accumulation=2)[0] != expected[0]
    module = small()
    graphed(module, eager_calls=1)
    monkeypatch.undo()
    assert_same(learn(module, 6, accumulation=2), expected)


def test_two_forward_passes_before_a_backward_pass():
    plain, module = small(), small()
    found = graphed(module, eager_calls=0)
    for each in (plain, module):
        one, two = each(image(1)), each(image(2))
        (loss_of(two) * 3).backward()
        loss_of(one).backward()
    assert found.replays == 2
    for a, b in zip(plain.parameters(), module.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.equal(a.grad, b.grad)
    assert torch.equal(plain.norm.running_mean, module.norm.running_mean)


def test_a_forward_pass_without_a_backward_pass_does_no_harm():
    """The loop does so where a loss is not finite, and then runs a batch whose gradient is zero."""
    plain, module = small(), small()
    found = graphed(module, eager_calls=0)
    for each in (plain, module):
        dropped = loss_of(each(image(1)))
        loss_of(each(image(2))).backward()
        del dropped
        loss_of(each(image(3))).backward()
    assert found.recorder.replayed == 3 + 2  # no pass is computed again
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), module.parameters(), strict=True)
               if a.grad is not None)  # fmt: skip


def test_a_second_backward_pass_of_one_forward_pass():
    plain, module = small(), small()
    graphed(module, eager_calls=0)
    for each in (plain, module):
        loss = loss_of(each(image(1)))
        loss.backward(retain_graph=True)
        loss.backward()
    assert torch.equal(plain.first.weight.grad, module.first.weight.grad)


def test_results_stay_when_the_next_call_comes():
    module = small()
    graphed(module, eager_calls=0)
    first = module(image(1))
    kept = [m.clone() for m in first.maps]
    module(image(2))
    assert all(torch.equal(a, b) for a, b in zip(first.maps, kept, strict=True))


def test_an_input_that_wants_a_gradient_gets_it():
    gradients = []
    for options in (None, {"eager_calls": 0}):
        module = small()
        if options is not None:
            graphed(module, **options)
        x = image(1).requires_grad_()
        loss_of(module(x * 2)).backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_unused_results_and_parameters_out_of_reach():
    """Loss on one of two results; in the first stage `second` is not reached, and no gradient is made up for it."""
    grads = {}
    for name in ("plain", "graphed"):
        module = small()
        if name == "graphed":
            graphed(module, eager_calls=0)
        module(image(1), prior_only=True).maps[0].sum().backward()
        assert module.second.weight.grad is None
        module(image(2)).maps[1].sum().backward()
        grads[name] = [p.grad for p in module.parameters() if p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(*grads.values(), strict=True))


def test_a_result_that_no_loss_uses_gets_no_zeros_and_one_that_is_used_later_gets_its_gradient():
    plain, module = small(), small()
    found = graphed(module, eager_calls=1)
    for each in (plain, module):
        for number in range(3):
            each(image(number)).maps[1].sum().backward()
    (call,) = found._calls.values()
    assert call.used == {1}
    assert found.recorder.replayed == 4
    for each in (plain, module):
        loss_of(each(image(5))).backward()
    assert found.recorder.replayed == 5  # the backward pass was computed again
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), module.parameters(), strict=True)
               if a.grad is not None)  # fmt: skip


def test_gradients_reach_the_passes_in_the_layout_that_the_loss_gives_them():
    """The sums of a bias's gradient go through memory in the layout's order: another one has other last bits."""
    weights = torch.rand(2, 2, 60, 60, generator=torch.Generator().manual_seed(3))
    weights = weights.contiguous(memory_format=torch.channels_last)  # and so the gradients; the results are not
    found = {}
    for name in ("plain", "graphed"):
        module, seen = small(), []
        if name == "graphed":
            graphed(module, eager_calls=1)

        def note(_, __, given, seen=seen):
            seen.append(given[0].stride())

        note.may_rest = True
        module.second.register_full_backward_hook(note)
        for number in range(3):
            (module(image(number)).maps[1] * weights).sum().backward()
        found[name] = set(seen), module.second.bias.grad, module.first.bias.grad
    assert found["plain"][0] == found["graphed"][0] == {weights.stride()}
    assert all(torch.equal(a, b) for a, b in zip(found["plain"][1:], found["graphed"][1:], strict=True))


def test_a_loss_that_reaches_new_parameters_is_no_silent_loss_of_a_gradient():
    module = small()
    graphed(module, eager_calls=1)
    for number in range(2):
        module(image(number)).maps[0].sum().backward()
    with pytest.raises(RuntimeError, match="a loss reaches parameters that none reached when"):
        module(image(3)).maps[1].sum().backward()


def test_hooks_on_accumulated_gradients_are_called_once_a_pass_and_only_for_reached_parameters():
    module = small()
    graphed(module, eager_calls=0)
    called: list[str] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: called.append(name))
    loss_of(module(image(1), prior_only=True)).backward()
    assert sorted(called) == ["first.bias", "first.weight", "norm.bias", "norm.weight"]


def test_autocast_is_part_of_the_signature_and_of_the_capture():
    plain, module = small(), small()
    found = graphed(module, eager_calls=0)
    for dtype in (torch.bfloat16, torch.float16, None):
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            expected, out = plain(image(1)), module(image(1))
        loss_of(expected).backward()
        loss_of(out).backward()
        assert out.maps[1].dtype == expected.maps[1].dtype == (dtype or torch.float32)
        assert torch.equal(out.maps[1], expected.maps[1])
        assert torch.equal(module.first.weight.grad, plain.first.weight.grad)
    assert found.recorder.captured == 6


def test_evaluation_stays_eager_and_a_mode_of_its_own():
    module = small()
    found = graphed(module, eager_calls=0)
    with torch.no_grad():
        module(image(1))
    assert found.recorder.captured == 0
    module(image(1))
    module.eval()(image(1))
    assert found.recorder.captured == 4


def test_weights_changed_in_place_are_seen_and_weights_that_moved_are_captured_again(caplog):
    module = small()
    found = graphed(module, eager_calls=0)
    module(image(1))
    with torch.no_grad():
        module.second.bias.fill_(7.0)
    assert torch.equal(module(image(1)).maps[1], small_with_bias(7.0)(image(1)).maps[1])
    assert found.recorder.captured == 2
    module.second.bias.data = torch.full((2,), 9.0)
    out = module(image(1))
    assert torch.equal(out.maps[1], small_with_bias(9.0)(image(1)).maps[1])
    assert found.recorder.captured == 4
    assert [r.message for r in caplog.records] == [
        "network: its parameters moved in memory: CUDA graphs are captured again"
    ]
    loss_of(out).backward()
    assert module.second.bias.grad is not None
    kept = []  # so that no address comes back

    def move() -> None:
        kept.append(module.second.bias.data)
        module.second.bias.data = torch.full((2,), 1.0)
        module(image(1))

    move()
    move()
    with pytest.raises(RuntimeError, match=r"move in memory again and again: set engine\.graphs to off"):
        move()


def small_with_bias(value: float) -> Small:
    module = small()
    with torch.no_grad():
        module.second.bias.fill_(value)
    return module


def test_capturing_leaves_statistics_and_random_numbers_alone():
    module = small()
    graphed(module, eager_calls=0)
    before = torch.random.get_rng_state()
    out = module(image(1))
    assert torch.equal(torch.random.get_rng_state(), before)
    plain = small()
    plain(image(1))
    assert module.norm.num_batches_tracked == 1
    assert torch.equal(module.norm.running_mean, plain.norm.running_mean)
    assert out.absent is None
    with kept_buffers(module):
        module.norm.running_mean.fill_(3.0)
    assert torch.equal(module.norm.running_mean, plain.norm.running_mean)


def test_a_frozen_teacher_is_replayed_without_a_backward_pass():
    module = small().eval().requires_grad_(False)
    expected = [small().eval()(image(n)).maps[1] for n in range(5)]
    found = graphed(module, trained=False, what="teacher")
    for number in range(5):
        out = module(image(number))
        assert torch.equal(out.maps[1], expected[number])
        assert not out.maps[1].requires_grad
    assert (found.recorder.captured, found.replays) == (1, 2)


WORKER = Path(__file__).parents[1] / "workers" / "graphs.py"


def test_two_ranks_under_every_stage_learn_the_same_bits():
    """Stages 0 to 2, accumulation, 16-bit parameters, averages, two stages; each rank's part is compared."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(WORKER)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 6
    for case, ranks in found.items():
        accumulation = int(case.split("/")[2])
        replays = (10 - 2 * subject.EAGER_CALLS) * accumulation
        assert ranks == [{"replays": replays, "losses": True, "learned": True, "other": []}] * 2, case


def test_nothing_of_a_dropped_call_is_kept():
    module = small()
    graphed(module, eager_calls=0)

    def live() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    def calls(count: int) -> int:
        for number in range(count):
            loss_of(module(image(number))).backward()
            module(image(number))
        return live()

    before = calls(2)
    assert calls(6) <= before
