"""Ways to compare prior and teacher at a level: exact values, scales, several teachers; each can be learned."""

import pytest
import torch
import torch.nn.functional as F

from model.teacher import Teacher
from model.teachers import Teachers
from tests.model.models import RANDOM, deblurrer
from train.config.file import configure
from train.config.schema import LossSection
from train.objective.cross_level import CrossLevelFeatureLoss
from train.objective.matching import MATCHES, attention, cosine, hierarchical, squared


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_each_distance_is_its_definition():
    r, t = noise(2, 5, 6, 7), noise(2, 5, 6, 7, seed=1)
    torch.testing.assert_close(squared(r, t), F.mse_loss(r, t))
    torch.testing.assert_close(cosine(r, t), 1 - F.cosine_similarity(r, t, dim=1).mean())
    maps = [(x**2).sum(1).reshape(2, -1) for x in (r, t)]
    unit = [m / m.norm(dim=1, keepdim=True) for m in maps]
    torch.testing.assert_close(attention(r, t), ((unit[0] - unit[1]).norm(dim=1) ** 2).mean())
    pooled = [F.adaptive_avg_pool2d(r - t, g) for g in ((6, 7), 4, 2, 1)]
    expected = sum(2.0**-k * p.square().mean() for k, p in enumerate(pooled)) / sum(2.0**-k for k in range(4))
    torch.testing.assert_close(hierarchical(r, t), expected)


@pytest.mark.parametrize("name", MATCHES)
def test_a_distance_is_zero_for_the_teacher_itself_and_does_not_grow_with_size(name):
    distance = MATCHES[name].distance
    small, large = (distance(noise(4, 8, n, n), noise(4, 8, n, n, seed=1)) for n in (16, 64))
    torch.testing.assert_close(distance(noise(4, 8, 9, 5), noise(4, 8, 9, 5)), torch.zeros(()), rtol=0, atol=1e-6)
    assert 0.7 < large / small < 1.4
    for size in ((1, 1), (1, 3)):
        assert torch.isfinite(distance(noise(1, 8, *size), noise(1, 8, *size, seed=1)))


def test_attention_asks_where_not_what():
    r = noise(2, 6, 8, 8)
    assert attention(r, 3 * r.flip(1)) < 1e-6
    assert squared(r, 3 * r.flip(1)) > 1


def test_attention_of_features_that_are_all_zero_has_a_finite_gradient():
    r = torch.zeros(1, 4, 5, 5, requires_grad=True)
    attention(r, noise(1, 4, 5, 5)).backward()
    assert torch.isfinite(r.grad).all()


def features(seed: int, channels) -> list[torch.Tensor]:
    return [noise(2, c, 16 >> level, 24 >> level, seed=seed + level) for level, c in enumerate(channels)]


@pytest.mark.parametrize("match", MATCHES)
def test_several_teachers_are_the_weighted_mean_of_each_alone(match):
    splits, shares = ((4, 6), (5, 3)), (0.75, 0.25)
    whole = CrossLevelFeatureLoss((10, 8), LossSection(match=match), splits=splits, shares=shares)
    r, t, seen = (features(seed, (10, 8)) for seed in (0, 10, 20))
    whole.calibrate([seen])
    expected: dict[str, float] = {"structure": 0.0, "context": 0.0}
    alike = torch.zeros(2)
    for number, share in enumerate(shares):
        part = [[x.split(split, dim=1)[number] for x, split in zip(side, splits, strict=True)] for side in (r, t, seen)]
        one = CrossLevelFeatureLoss([split[number] for split in splits], LossSection(match=match))
        one.calibrate([part[2]])
        for name, value in one(part[0], part[1])[1].items():
            expected[name] += share * float(value)
        alike += share * one.similarity(part[0], part[1])
        if number == 0:
            torch.testing.assert_close(whole.similarity(part[0], t), one.similarity(part[0], part[1]))
    parts = whole(r, t)[1]
    assert {name: float(value) for name, value in parts.items()} == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(whole.similarity(r, t), alike)


def test_classes_of_several_teachers_are_weighed_too():
    def classify(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(part.mean((2, 3)) for part in x.split((5, 3), dim=1))

    r, t = (features(seed, (8,)) for seed in (0, 10))
    values = []
    for shares in ((0.75, 0.25), (1.0, 0.0), (0.0, 1.0)):
        loss = CrossLevelFeatureLoss((8,), LossSection(logits=1), classify=classify, splits=((5, 3),), shares=shares)
        loss.calibrate([features(20, (8,))])
        values.append(float(loss(r, t)[1]["logits"]))
    assert values[0] == pytest.approx(0.75 * values[1] + 0.25 * values[2], rel=1e-5)
    assert values[1] != pytest.approx(values[2])


def test_teachers_that_do_not_add_up_are_refused():
    for options, words in (
        ({"splits": ((4, 5), (5, 3)), "shares": (0.5, 0.5)}, "do not add up"),
        ({"splits": ((4, 6), (5, 3))}, "do not add up"),
    ):
        with pytest.raises(ValueError, match=words):
            CrossLevelFeatureLoss((10, 8), LossSection(), **options)
    with pytest.raises(ValueError, match=r"unknown loss\.match 'cosin': did you mean cosine"):
        CrossLevelFeatureLoss((10, 8), configure(["loss.match=cosin"]).loss)


@pytest.mark.parametrize("match", MATCHES)
def test_every_way_learns_a_fixed_batch(match):
    sharp = F.interpolate(noise(2, 3, 12, 12).sigmoid(), size=(64, 64), mode="bicubic").clamp(0, 1)
    blurry = F.avg_pool2d(F.pad(sharp, (7, 7, 0, 0), mode="replicate"), (1, 15), stride=1)
    teacher = Teachers([Teacher("test_resnet", weights="random")])
    model = deblurrer(
        backbone={"name": "unet", "width": 8, "blocks": [1, 1]},
        teacher={"name": "test_resnet", **RANDOM},
        student={"width": 16, "fusion": "same_level" if match == "same_level" else "cross_level", "residual": False},
    )
    loss = CrossLevelFeatureLoss(teacher.channels, LossSection(match=match, context=0.0))
    target = teacher(sharp)
    loss.calibrate([target])
    model.calibrate(loss.statistics, [blurry])
    optimizer = torch.optim.Adam(model.prior.parameters(), lr=1e-3)
    history = []
    for _ in range(24):
        total, parts = loss(model(blurry, prior_only=True).prior, target)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        history.append(float(parts["structure"]))
    assert min(history[-3:]) < 0.85 * history[0]
    assert all(p.grad is not None for p in model.prior.parameters())


def test_without_fusion_a_level_depends_on_its_own_alone():
    options = {"backbone": {"name": "unet", "width": 8, "blocks": [1, 1]}, "teacher": {"name": "test_resnet", **RANDOM}}
    for fusion, reached in (("same_level", False), ("cross_level", True)):
        model = deblurrer(**options, student={"fusion": fusion, "residual": False})
        model(noise(1, 3, 64, 64).sigmoid(), prior_only=True).prior[0].sum().backward()
        assert all((p.grad is not None) == reached for p in model.prior.project[-1].parameters())
        assert len(model.prior.fuse) == (3 if reached else 0)
