"""Learning rates as functions of the step."""

from itertools import pairwise

import pytest

from train.config.file import ConfigError, configure
from train.run.schedule import cfl_weight, cosine_with_warmup, learning_rates, stage


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
        restorer, prior, *_ = learning_rates(step, config)
        assert (restorer == 0) == (step < 4)
        assert prior > 0
    restorer, prior, spe, _ = learning_rates(5, config)
    assert spe == restorer
    assert prior == pytest.approx(0.5 * restorer)


def test_the_restorer_warms_up_when_its_own_training_begins():
    config = configure(["train.steps=100", "train.distill_steps=40", "optim.warmup=10"])
    rates = [learning_rates(step, config)[0] for step in range(100)]
    assert rates[:40] == [0] * 40
    steady = [learning_rates(step, config)[1] for step in range(100)]
    assert [rates[40 + i] / steady[40 + i] for i in range(10)] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[50:] == steady[50:]


def test_embeddings_learn_before_the_rest_and_each_part_has_its_own_rate():
    scales = ["optim.warmup=4", "optim.spe_lr_scale=2", "optim.backbone_lr_scale=.1", "optim.prior_lr_scale=.5"]
    scales.append("optim.gate_lr_scale=3")
    config = configure(["train.steps=40", "train.distill_steps=10", "train.spe_steps=10", *scales])
    rates = [learning_rates(step, config) for step in range(40)]
    assert [stage(step, config) for step in (0, 9, 10, 19, 20, 39)] == [
        *("distill", "distill", "spe", "spe", "deblur", "deblur")
    ]
    assert [[value > 0 for value in rates[step]] for step in (9, 10, 19, 20)] == [
        [False, True, False, False],
        [False, False, True, False],
        [False, False, True, False],
        [True, True, True, True],
    ]
    base = 0.5 * cosine_with_warmup(30, 40, 4, config.optim.final_lr) * config.optim.lr
    assert rates[30] == pytest.approx((0.2 * base, base, 4 * base, 6 * base))
    assert rates[10].spe / rates[9].prior < 1.3  # a quarter of 4 times: it warms up
    risen = 0.5 * cosine_with_warmup(20, 40, 4, config.optim.final_lr) * config.optim.lr
    assert rates[20].prior == pytest.approx(risen / 4)  # so does the prior, which rested


def test_a_frozen_student_has_no_rate_and_no_weight_after_its_distillation():
    config = configure(["train.steps=10", "train.distill_steps=4", "train.student_frozen=true"])
    assert [learning_rates(step, config).prior > 0 for step in range(10)] == [True] * 4 + [False] * 6
    assert [cfl_weight(step, config) for step in range(10)] == [1.0] * 4 + [0.0] * 6
    assert config.taught
    taken = configure(["train.steps=10", "model.prior_from=somewhere"])
    assert taken.student_rests
    assert not taken.taught
    along = configure(["train.steps=10", "model.prior_from=somewhere", "train.student_frozen=false"])
    assert along.taught
    assert cfl_weight(3, along) == along.loss.cfl


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["model.prior=false", "train.spe_steps=1"], "spe_steps is about the prior"),
        (["model.prior=false", "train.student_frozen=true"], "student_frozen is about the prior"),
        (["model.prior=false", "model.prior_from=x"], "takes a prior over"),
        (["train.steps=5", "train.distill_steps=3", "train.spe_steps=3"], "exceed steps 5"),
        (["train.student_frozen=true", "loss.cfl_final=0"], "the student is frozen then"),
        (["model.prior_from=x", "features.cache=on"], "frozen from the start"),
        (["model.prior_from=x", "train.distill_steps=2"], "would distill it further: set that to 0"),
    ],
)
def test_stages_that_cannot_be_are_one_line(settings, words):
    with pytest.raises(ConfigError, match=words):
        configure(settings)
