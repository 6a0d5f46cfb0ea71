"""The deblurrer: a plugged-in prior changes nothing at first, every parameter learns, every size works."""

import pytest
import torch

from model.deblurrer import Deblurrer
from model.padding import pad_to_multiple
from tests.model.models import RANDOM, deblurrer

SMALL = {"name": "unet", "width": 8, "blocks": [1, 1, 1], "patch": 2}
OPTIONS = {"backbone": SMALL, "teacher": RANDOM, "student": {"width": 16}, "spe": {"dim": 8, "groups": 2}}


def small(**changes) -> Deblurrer:
    """The small network, with sections changed key by key."""
    merged = {
        k: {**OPTIONS.get(k, {}), **v} if isinstance(v, dict) and k != "backbone" else v for k, v in changes.items()
    }
    return deblurrer(**(OPTIONS | merged))


def perturb(model: torch.nn.Module, keys: str = "") -> None:
    """Move every parameter a little, so that what starts at zero is alive."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if keys in name:
                p.add_(0.05 * torch.randn(p.shape, generator=generator))


def image(*size: int) -> torch.Tensor:
    return torch.rand(*size, generator=torch.Generator().manual_seed(0))


def test_a_new_prior_leaves_the_backbone_as_it_was_to_the_bit():
    model = small()
    perturb(model.backbone)
    plain = Deblurrer(model.backbone)
    x = image(2, 3, 64, 96)
    assert set(model.spe) == set(model.backbone.embed_points)
    assert torch.equal(model(x).restored[-1], plain(x).restored[-1])
    perturb(model.spe, "scale")
    assert not torch.equal(model(x).restored[-1], plain(x).restored[-1])


def test_a_new_network_returns_its_input():
    x = image(1, 3, 50, 70)
    torch.testing.assert_close(small()(x).restored[-1], x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("student", [None, "resnet18"])
def test_gradients_reach_every_parameter(student, residual):
    options = {"student": {"name": student, **RANDOM} if student else {"residual": residual}}
    model = small(**options)
    perturb(model)
    model(image(2, 3, 64, 64)).restored[-1].square().mean().backward()
    # The first level's attention over one level only, and so on, must not hide a dead branch.
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert dead == []


def test_the_distill_stage_trains_the_prior_alone():
    model = small()
    perturb(model)
    result = model(image(1, 3, 64, 64), prior_only=True)
    assert result.restored == ()
    sum(r.square().mean() for r in result.prior).backward()
    assert all(p.grad is not None for p in model.prior.parameters())
    assert all(p.grad is None for p in (*model.backbone.parameters(), *model.spe.parameters()))


@pytest.mark.parametrize("size", [(64, 64), (65, 47), (1, 1), (5, 200), (33, 31)])
def test_any_size_comes_back_at_its_size(size):
    model = small()
    perturb(model)
    result = model(image(1, 3, *size))
    assert result.restored[-1].shape[-2:] == size
    assert [tuple(r.shape[-2:]) for r in result.prior] == [tuple(-(-n // s) for n in size) for s in (4, 8, 16, 32)]


def test_padding_is_invisible_to_a_full_size_image():
    """Cropping an image whose missing part is its own mirror gives the padded computation, to the bit."""
    model = small()
    perturb(model)
    odd = image(1, 3, 50, 60)
    padded = pad_to_multiple(odd, model.multiple)
    assert padded.shape[-2:] == (64, 64)
    assert torch.equal(padded[..., 50, :60], odd[..., 48, :])
    assert torch.equal(model(padded).restored[-1][..., :50, :60], model(odd).restored[-1])


def test_a_plain_backbone_has_no_prior_and_named_points_are_the_only_ones():
    plain = small(prior=False)
    assert plain.prior is None
    assert len(plain.spe) == 0
    assert plain(image(1, 3, 33, 40)).prior is None
    assert plain.multiple == 8
    assert list(small(spe={"points": ["bottleneck"]}).spe) == ["bottleneck"]
    assert len(small(spe={"points": []}).spe) == 0


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = small(seed=7).state_dict()
    torch.manual_seed(2)
    expected = torch.rand(1)
    torch.manual_seed(2)
    second = small(seed=7).state_dict()
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(v, second[k]) for k, v in first.items())
    assert not torch.equal(small(seed=8).backbone.enter.weight, first["backbone.enter.weight"])


def test_the_student_starts_from_the_teacher_s_weights_and_features():
    from model.teacher import Teacher
    from train.config.schema import LossSection
    from train.objective.cross_level import CrossLevelFeatureLoss

    teacher, model = Teacher(), deblurrer(backbone=SMALL, student={"width": 16})
    x = image(2, 3, 64, 64)
    features = teacher(x)
    loss = CrossLevelFeatureLoss(teacher.channels, LossSection())
    loss.calibrate([features])
    model.calibrate(loss.statistics, [x])
    for r, t in zip(model(x).prior, features, strict=True):
        torch.testing.assert_close(r, t, rtol=1e-4, atol=1e-4)


def test_calibration_travels_in_the_state_dict():
    from model.statistics import FeatureStatistics

    model, other = small(), small()
    statistics = FeatureStatistics(model.prior.channels)
    statistics.update([5 + 3 * image(2, c, 4, 4) for c in model.prior.channels])
    statistics.freeze()
    model.calibrate(statistics, [image(2, 3, 64, 64)])
    other.load_state_dict(model.state_dict())
    assert other.prior.statistics.calibrated
    assert other.prior.student_statistics.calibrated
    x = image(1, 3, 64, 64)
    perturb(model)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(x).restored[-1], other(x).restored[-1])


def test_embeddings_read_the_prior_in_the_teacher_s_standard_units():
    from model.statistics import FeatureStatistics

    model = small()
    statistics = FeatureStatistics(model.prior.channels)
    statistics.update([5 + 3 * image(2, c, 4, 4) for c in model.prior.channels])
    statistics.freeze()
    model.calibrate(statistics, [image(2, 3, 64, 64)])
    seen = []
    model.spe["bottleneck"].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    prior = model(image(1, 3, 64, 64)).prior
    for level, (scaled, r) in enumerate(zip(seen[0], prior, strict=True)):
        mean, std = statistics.moments(level)
        torch.testing.assert_close(scaled, (r - mean) / std)


def test_the_meta_device_needs_no_weights():
    with torch.device("meta"):
        model = small(teacher={"weights": "nowhere.pth"})
    assert all(p.device.type == "meta" for p in model.parameters())
    assert model.state_dict().keys() == small().state_dict().keys()
    with torch.device("meta"):
        frozen = small(student={"frozen_levels": 1})
    fixed = {n for n, p in small(student={"frozen_levels": 1}).named_parameters() if not p.requires_grad}
    assert fixed == {n for n, p in frozen.named_parameters() if not p.requires_grad}
    assert fixed


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"backbone": {"name": "unett"}}, "unknown backbone 'unett': did you mean unet"),
        ({"backbone": {"name": "unet", "widht": 8}}, "did you mean width"),
        ({"backbone": {"name": "unet", "blocks": [1]}}, "two or more levels"),
        ({"backbone": {"name": "unet", "width": "wide"}}, "unet"),
        ({"spe": {"points": ["botleneck"]}}, "did you mean bottleneck"),
        ({"spe": {"heads": 5}}, "5 heads do not divide the 16 channels of embed point decoder2"),
        ({"teacher": {"name": "resnt18"}}, "did you mean resnet18"),
        ({"student": {"name": "resnet18", **RANDOM, "residual": True}}, "leave residual out"),
    ],
)
def test_wrong_settings_are_one_line_with_the_way_out(changes, words):
    with pytest.raises(ValueError, match=words) as caught:
        small(**changes)
    assert "\n" not in str(caught.value)


def test_an_image_that_is_no_rgb_batch_is_refused():
    for bad in (torch.zeros(3, 32, 32), torch.zeros(1, 1, 32, 32)):
        with pytest.raises(ValueError, match="RGB batch"):
            small(prior=False)(bad)
    with pytest.raises(ValueError, match="empty"):
        small(prior=False)(torch.zeros(1, 3, 0, 32))
    with pytest.raises(ValueError, match="nothing to distill"):
        small(prior=False)(image(1, 3, 32, 32), prior_only=True)


@pytest.mark.parametrize("fold", [False, True])
def test_a_resting_prior_keeps_nothing_for_a_backward_pass_and_takes_no_gradient(fold):
    model = small(student={"name": "resnet18", "batch_norm": "batch", **RANDOM})
    perturb(model)
    x, saved = image(2, 3, 64, 64), []
    expected = model.eval()(x).restored[-1]
    model.train()
    model.prior.rest()
    if fold:
        assert model.prior.student.fold() > 0
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        levels, features = model.prior(x)
        assert saved == []
        out = model(x)
    assert not any(level.requires_grad for level in (*levels, *features))
    torch.testing.assert_close(out.restored[-1], expected, rtol=1e-4, atol=1e-5)  # in eval mode, though train was asked
    out.restored[-1].square().mean().backward()
    assert all(parameter.grad is None for parameter in model.prior.parameters())
    assert all(parameter.grad is not None for parameter in (*model.spe.parameters(), *model.backbone.parameters()))
    model.prior.rest(False)
    assert model.prior.training
    assert not model.prior.student.folded
    model(x).restored[-1].square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.prior.parameters())
