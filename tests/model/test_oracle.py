"""Levels given in the prior's place, and embeddings that read some levels alone: what studies compare a prior with."""

import pytest
import torch

from tests.model.test_deblurrer import image, perturb, small
from train.config.schema import Config
from train.objective.task import DeblurTask


def alive(**changes):
    model = small(**changes).eval()
    perturb(model)
    return model


def test_given_levels_stand_in_for_the_prior_and_its_network_does_not_run():
    model, x = alive(), image(1, 3, 64, 64)
    own = model(x)
    model.prior.student.forward = None  # would raise
    with torch.no_grad():
        again = model(x, *own.prior)
        other = model(x, *(level + 1 for level in own.prior))
    assert torch.equal(again.restored[-1], own.restored[-1])
    assert not torch.equal(other.restored[-1], own.restored[-1])


def test_given_levels_need_whole_images_and_a_prior():
    model = alive()
    levels = model(image(1, 3, 64, 64)).prior
    with pytest.raises(ValueError, match="multiples of 32 px; got 60×64"):
        model(image(1, 3, 64, 60), *levels)
    with pytest.raises(ValueError, match="a model with a prior"):
        small(prior=False)(image(1, 3, 64, 64), *levels)


def test_embeddings_read_the_levels_that_they_are_told_to():
    model, x = alive(spe={"levels": [3, 4]}), image(1, 3, 64, 64)
    levels = model(x).prior
    changes = [
        not torch.equal(
            model(x, *(level + (n == place) for n, level in enumerate(levels))).restored[-1], model(x).restored[-1]
        )
        for place in range(4)
    ]
    assert changes == [False, False, True, True]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"spe": {"levels": [5]}}, "the prior has 4 levels"),
        ({"spe": {"levels": [2, 1]}}, "in rising order"),
        ({"oracle": True, "prior": False}, "prior is false"),
    ],
)
def test_settings_that_contradict_each_other_are_told(settings, message):
    with pytest.raises(ValueError, match=message):
        small(**settings)


def test_an_oracle_learns_from_the_teacher_s_view_of_the_sharp_picture():
    model = {"backbone": {"name": "unet", "width": 8, "blocks": [1, 1, 1]}, "teacher": {"weights": "random"}}
    model |= {"student": {"width": 16}, "spe": {"dim": 8, "groups": 2}, "oracle": True}
    with pytest.raises(ValueError, match="student that learns"):
        Config(model=model)
    config = Config(model=model, train={"student_frozen": True})
    assert config.taught
    task, network = DeblurTask(config, torch.device("cpu")), alive(backbone=model["backbone"])
    blurry, sharp = (image(1, 3, 64, 64).mul(255).to(torch.uint8), torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    seen = []

    def forward(*inputs):
        seen.append(inputs)
        return network(*inputs)

    loss, _ = task.losses(
        forward, {"blurry": blurry, "sharp": sharp}, distill=False, autocast=torch.enable_grad(), cfl=0
    )
    assert loss.requires_grad
    for got, wanted in zip(seen[0][1:], task.teacher(sharp.float()), strict=True):
        assert torch.equal(got, wanted)
        assert not got.requires_grad
