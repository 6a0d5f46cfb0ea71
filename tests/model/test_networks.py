"""What every encoder outside timm must be. A new row is all that a new one needs here."""

import pytest
import torch

from model.encoder import EncoderSpec, build_encoder, level_channels, without_weights
from model.networks import NETWORKS
from model.teacher import Teacher
from tests.model.models import deblurrer

every = pytest.mark.parametrize("name", NETWORKS)


@every
@pytest.mark.parametrize("size", [(64, 96), (65, 33), (1, 1)])
def test_it_gives_the_pyramid_for_every_size(name, size):
    spec = EncoderSpec(name, weights="random")
    features = build_encoder(spec).eval()(torch.rand(2, 3, *size))
    assert [tuple(f.shape) for f in features] == [
        (2, c, -(-size[0] // s), -(-size[1] // s)) for c, s in zip(level_channels(spec), spec.strides, strict=True)
    ]


@every
def test_it_can_be_a_student_whose_every_parameter_learns(name):
    network = deblurrer(student={"name": name, "weights": "random", "width": 8}, teacher={"weights": "random"})
    priors = network(torch.rand(1, 3, 64, 64), prior_only=True).prior
    sum(level.square().mean() for level in priors).backward()
    assert [n for n, p in network.prior.student.named_parameters() if p.grad is None] == []


@every
def test_it_can_teach_where_it_has_weights_and_is_refused_where_it_has_none(name):
    if without_weights(name):
        with pytest.raises(ValueError, match=f"{name} has learned nothing that it could teach"):
            Teacher(name)
        return
    teacher = Teacher(name, weights="random")
    assert len(teacher.fingerprint()) == len(Teacher("test_resnet", weights="random").fingerprint())
    assert not any(p.requires_grad for p in teacher.parameters())


def test_a_network_with_weights_teaches_like_any_other(monkeypatch):
    """The row of a teacher that this project does not have: made, read, fingerprinted, refused in its own name."""
    light = NETWORKS["light"]
    filled = light._replace(read=lambda net: [p.data.fill_(0.01) for p in net.parameters()])
    monkeypatch.setitem(NETWORKS, "filled", filled)
    teacher, random = Teacher("filled"), Teacher("filled", weights="random")
    assert all((p == 0.01).all() for p in teacher.parameters())
    assert teacher.fingerprint() != random.fingerprint()
    with pytest.raises(ValueError, match="the weights of filled are absent: no file nowhere"):
        Teacher("filled", weights="nowhere.pth")
    student = deblurrer(teacher={"name": "filled"}, student={"width": 8}).prior.student
    assert all((p == 0.01).all() for p in student.parameters())
