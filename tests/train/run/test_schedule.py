"""Learning rates as functions of the step."""

from itertools import pairwise

import pytest

from train.config.file import configure
from train.run.schedule import cosine_with_warmup, learning_rates


def test_warm_up_rises_to_the_peak_and_the_cosine_ends_at_its_final_value():
    factors = [cosine_with_warmup(step, 100, 10, 0.05) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == pytest.approx(1.0)
    assert factors[99] == pytest.approx(0.05)
    assert all(a >= b for a, b in pairwise(factors[10:]))
    assert factors[10 + 89 // 2] == pytest.approx((1 + 0.05) / 2, abs=0.02)


def test_the_cosine_waits_for_the_steps_that_hold_the_peak():
    factors = [cosine_with_warmup(step, 100, 10, 0.05, hold=30) for step in range(100)]
    assert factors[9:41] == pytest.approx([1.0] * 32)
    assert factors[41] < 1
    assert factors[99] == pytest.approx(0.05)


def test_a_rate_that_is_halved_every_so_many_steps():
    config = configure(["train.steps=50", "optim.halve_every=20", "optim.warmup=2", "optim.lr=1e-3"])
    rates = [learning_rates(step, config)[0] for step in (0, 1, 19, 20, 39, 40)]
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4])


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 5), (3, 3), (2, 0)])
def test_degenerate_lengths_give_factors_between_0_and_1(steps, warmup):
    assert all(0 < cosine_with_warmup(step, steps, warmup, 0.01) <= 1 for step in range(steps))


def test_the_restorer_rests_while_the_student_distills():
    config = configure(["train.steps=10", "train.distill_steps=4", "optim.warmup=1", "optim.prior_lr_scale=.5"])
    for step in range(10):
        restorer, prior = learning_rates(step, config)
        assert (restorer == 0) == (step < 4)
        assert prior > 0
    restorer, prior = learning_rates(5, config)
    assert prior == pytest.approx(0.5 * restorer)


def test_the_restorer_warms_up_when_its_own_training_begins():
    config = configure(["train.steps=100", "train.distill_steps=40", "optim.warmup=10"])
    rates = [learning_rates(step, config)[0] for step in range(100)]
    assert rates[:40] == [0] * 40
    steady = [learning_rates(step, config)[1] for step in range(100)]
    assert [rates[40 + i] / steady[40 + i] for i in range(10)] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[50:] == steady[50:]
