"""The teacher: real ImageNet weights offline, level features of every size, frozen whatever a trainer does."""

from functools import partial

import pytest
import skimage.data
import torch
from huggingface_hub import try_to_load_from_cache
from safetensors.torch import save_file

from model.encoder import Encoder, EncoderSpec, build_encoder, level_channels
from model.teacher import Teacher
from model.weights import pair_by_order

CATS = slice(281, 286)
ESPRESSO = 967


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher()


@pytest.fixture(scope="module")
def resnet() -> Teacher:
    return Teacher("resnet18", weights="random")


def photograph(name: str) -> torch.Tensor:
    return torch.from_numpy(getattr(skimage.data, name)()).permute(2, 0, 1)[None].float() / 255


def test_the_packaged_weights_know_a_cat_and_an_espresso(teacher):
    cat, coffee = teacher.classify(photograph("chelsea"))[0], teacher.classify(photograph("coffee"))[0]
    assert 281 <= int(cat.argmax()) <= 285
    assert cat[CATS].sum() > 0.85
    assert int(coffee.argmax()) == ESPRESSO
    assert coffee[ESPRESSO] > 0.9


def test_the_preprocessing_is_the_one_that_recognises_best(teacher):
    coffee = photograph("coffee")
    right = teacher.classify(coffee)[0, ESPRESSO]
    mean, std = teacher.encoder.mean.clone(), teacher.encoder.std.clone()
    try:
        teacher.encoder.mean.copy_(torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        teacher.encoder.std.copy_(torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
        assert teacher.classify(coffee)[0, ESPRESSO] < right
    finally:
        teacher.encoder.mean.copy_(mean)
        teacher.encoder.std.copy_(std)


def test_the_packaged_file_pairs_with_timm_entry_by_entry():
    wanted = build_encoder(EncoderSpec(), read=False).net.state_dict()
    assert len(wanted) == 296
    given = {f"other.{i}": v for i, v in enumerate(wanted.values())}
    assert list(pair_by_order(given, wanted, "file")) == list(wanted)
    with pytest.raises(ValueError, match="295 entries, 296 are needed"):
        pair_by_order(dict(list(given.items())[:-1]), wanted, "file")
    reordered = dict(sorted(given.items(), reverse=True))
    with pytest.raises(ValueError, match="does not fit"):
        pair_by_order(reordered, wanted, "file")


@pytest.mark.parametrize("size", [(64, 96), (65, 33), (1, 1), (7, 130)])
@pytest.mark.parametrize("which", ["teacher", "resnet"])
def test_levels_have_the_announced_channels_and_ceil_sizes(which, size, request):
    net = request.getfixturevalue(which)
    features = net(torch.rand(2, 3, *size))
    assert net.strides == (4, 8, 16, 32)
    expected = [(2, c, -(-size[0] // s), -(-size[1] // s)) for c, s in zip(net.channels, net.strides, strict=True)]
    assert [tuple(f.shape) for f in features] == expected


@pytest.mark.parametrize("name", ["convnext_atto", "swin_tiny_patch4_window7_224", "mambaout_femto"])
def test_other_families_give_the_same_pyramid_and_their_classes(name):
    net = Teacher(name, weights="random")
    odd, even = net(torch.rand(1, 3, 70, 45)), torch.rand(1, 3, 64, 64)
    assert [tuple(f.shape[1:]) for f in odd] == list(zip(net.channels, (18, 9, 5, 3), (12, 6, 3, 2), strict=True))
    torch.testing.assert_close(net.logits(net(even)[-1]), net.encoder.net(net.encoder.preprocess(even)))


def test_fewer_levels_are_the_shallow_ones(teacher):
    x = torch.rand(1, 3, 64, 64)
    two = Teacher(levels=2)
    assert two.channels == teacher.channels[:2]
    for a, b in zip(two(x), teacher(x), strict=False):
        assert torch.equal(a, b)


def test_train_and_optimizers_cannot_wake_the_teacher(teacher):
    holder = torch.nn.ModuleList([teacher])
    x = torch.rand(4, 3, 64, 64)
    before = teacher(x)
    holder.train()
    assert not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    after = teacher(x)
    assert not any(f.requires_grad for f in after)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("which", ["teacher", "resnet"])
def test_logits_of_the_deepest_level_are_the_classifier_s(which, request):
    net = request.getfixturevalue(which)
    x = torch.rand(2, 3, 64, 96)
    whole = net.encoder.net(net.encoder.preprocess(x))
    torch.testing.assert_close(net.logits(net(x)[-1]), whole, rtol=1e-3, atol=1e-4)  # features come from folded weights


def test_logits_carry_the_gradient_to_a_predicted_feature(teacher):
    predicted = teacher(torch.rand(2, 3, 64, 64))[-1].requires_grad_()
    teacher.logits(predicted).logsumexp(1).sum().backward()
    assert predicted.grad.abs().sum() > 0


def test_no_class_term_without_a_classifier_behind_the_last_level():
    with pytest.raises(ValueError, match="no classifier behind its deepest level"):
        Teacher("resnet18", weights="random", levels=3).logits(torch.rand(1, 256, 4, 4))


def test_the_fingerprint_names_weights_and_levels(resnet):
    assert resnet.fingerprint() == Teacher("resnet18", weights="random").fingerprint()
    assert resnet.fingerprint() != Teacher("resnet18", weights="random", levels=3).fingerprint()
    changed = Teacher("resnet18", weights="random")
    with torch.no_grad():
        next(changed.parameters()).view(-1)[0].add_(1e-3)
    assert resnet.fingerprint() != changed.fingerprint()


def test_weights_from_a_file_and_what_is_wrong_with_it(resnet, tmp_path):
    state = resnet.encoder.net.state_dict()
    state = {k: v.clone() + (0.5 if v.is_floating_point() else 0) for k, v in state.items()}
    good, short, torn = (str(tmp_path / f"{n}.safetensors") for n in ("good", "short", "torn"))
    save_file(state, good)
    save_file({k: v for k, v in state.items() if k != "conv1.weight"}, short)
    with open(good, "rb") as file, open(torn, "wb") as out:
        out.write(file.read()[:1000])
    loaded = Teacher("resnet18", weights=good)
    assert torch.equal(loaded.encoder.net.conv1.weight, state["conv1.weight"])
    with pytest.raises(ValueError, match=r"lacks conv1\.weight"):
        Teacher("resnet18", weights=short)
    with pytest.raises(ValueError, match="damaged or no weights file"):
        Teacher("resnet18", weights=torn)
    with pytest.raises(ValueError, match=r"absent: no file .*nowhere\.pth"):
        Teacher("resnet18", weights="nowhere.pth")


def test_weights_out_of_reach_are_one_clear_error_at_once(monkeypatch):
    import urllib.request

    asked = []

    def offline(request, timeout):
        asked.append((request.full_url, timeout))
        raise urllib.error.URLError(OSError("no route"))

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    with pytest.raises(ValueError, match="neither in the local cache nor reachable") as caught:
        Teacher("resnet18")
    assert "\n" not in str(caught.value)
    for word in ("no route", "model.safetensors of timm/resnet18", "efficientnet_lite0"):
        assert word in str(caught.value)
    assert len(asked) == 1  # one question, no minute of retries


def test_published_weights_come_from_the_local_cache_without_a_network(resnet, tmp_path, monkeypatch):
    import huggingface_hub.constants

    revision, repository = "0" * 40, tmp_path / "models--timm--resnet18.a1_in1k"
    snapshot = repository / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    state = {k: v.clone() + 1 for k, v in resnet.encoder.net.state_dict().items()}
    save_file(state, snapshot / "model.safetensors")
    monkeypatch.setattr("model.weights.try_to_load_from_cache", partial(try_to_load_from_cache, cache_dir=tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(Teacher("resnet18").encoder.net.conv1.weight, state["conv1.weight"])
    (snapshot / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"in the local cache are damaged .*remove .*model\.safetensors") as caught:
        Teacher("resnet18")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "levels", "words"),
    [
        ("resnt18", 4, "did you mean resnet18"),
        ("resnet18", 5, "set fewer levels"),
        ("resnet18", 0, "at least 1 level"),
        ("volo_d1_224", 4, "features at strides 8, 16, but 4 levels need strides 4, 8, 16, 32"),
        ("test_vit_relpos", 4, "takes any size"),
        ("light", 4, "can be a student only"),
        ("inception_v3", 4, "takes any size"),
    ],
)
def test_unusable_networks_are_named_with_a_way_out(name, levels, words):
    with pytest.raises(ValueError, match=words) as caught:
        Teacher(name, weights="random", levels=levels)
    assert "\n" not in str(caught.value)


def test_random_weights_do_not_touch_the_ambient_generator(resnet):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    again = Teacher("resnet18", weights="random")
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(again.encoder.net.conv1.weight, resnet.encoder.net.conv1.weight)


def test_channels_are_known_without_reading_weights():
    assert level_channels(EncoderSpec("efficientnet_lite0", weights="nowhere.pth")) == (24, 40, 112, 320)


def test_images_that_are_no_float_rgb_batch_are_refused(teacher):
    for bad in (torch.zeros(3, 32, 32), torch.zeros(1, 1, 32, 32), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="floating-point RGB batch"):
            teacher(bad)


@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet18", "densenet121"])
def test_frozen_levels_keep_their_features_and_the_rest_learns(name):
    student = build_encoder(EncoderSpec(name, weights="random"), prune=True, frozen_levels=2)
    x = torch.rand(2, 3, 64, 64)
    before = student(x)
    assert [f.requires_grad for f in before] == [False, False, True, True]
    trained = [p for p in student.parameters() if p.requires_grad]
    sum(f.square().mean() for f in before[2:]).backward()
    assert all(p.grad is not None for p in trained)
    torch.optim.SGD(trained, lr=1e-3).step()
    after = student(x)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, True, False, False]
    with pytest.raises(ValueError, match="between 0 and the encoder's 4 levels"):
        build_encoder(EncoderSpec(name, weights="random"), frozen_levels=5)


def test_a_student_with_frozen_statistics_keeps_them_in_training():
    student: Encoder = build_encoder(EncoderSpec(weights="random"), prune=True).train()
    before = {k: v.clone() for k, v in student.named_buffers()}
    student(torch.rand(2, 3, 64, 64))
    assert all(torch.equal(v, before[k]) for k, v in student.named_buffers())
    batch = build_encoder(EncoderSpec(weights="random"), prune=True, batch_norm="batch").train()
    batch(torch.rand(2, 3, 64, 64))
    assert any(not torch.equal(v, before[k]) for k, v in batch.named_buffers())
