"""Saved models: an exact round trip, whole files or none, and errors that name what does not fit."""

import contextlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from model.pretrained import SafetensorsWriter, load_config, load_pretrained, load_state, save_pretrained
from tests.model.models import RANDOM, deblurrer

PLAIN = {"backbone": {"name": "unet", "width": 4, "blocks": [1, 1]}, "prior": False}
WHOLE = {"backbone": {"name": "unet", "width": 8, "blocks": [1, 1, 1]}, "teacher": RANDOM, "student": {"width": 8}}


@pytest.mark.parametrize("options", [PLAIN, WHOLE])
def test_a_saved_model_restores_to_the_bit(options, tmp_path):
    model, other = deblurrer(**options, seed=1), deblurrer(**options, seed=2, read_weights=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    config = {"name": "näme", "model": {"blocks": [1, 1]}}
    save_pretrained(tmp_path / "new" / "run", model.state_dict(), config)
    assert load_config(tmp_path / "new" / "run") == config
    load_pretrained(other, tmp_path / "new" / "run")
    x = torch.rand(1, 3, 40, 50)
    assert torch.equal(model.eval()(x).restored[-1], other.eval()(x).restored[-1])
    assert [f.name for f in sorted((tmp_path / "new" / "run").iterdir())] == ["config.yaml", "model.safetensors"]


def test_what_does_not_fit_is_named_and_nothing_is_loaded(tmp_path):
    model = deblurrer(**PLAIN)
    state = model.state_dict()
    before = {k: v.clone() for k, v in state.items()}
    changed = {k: v + 1 for k, v in state.items() if k != "backbone.leave.weight"}
    save_pretrained(tmp_path, changed | {"backbone.extra": torch.ones(1)}, {})
    with pytest.raises(
        ValueError, match=r"it lacks backbone\.leave\.weight; has the unexpected backbone\.extra: build"
    ) as caught:
        load_pretrained(model, tmp_path)
    assert "\n" not in str(caught.value)
    save_pretrained(tmp_path, {k: v[:1] if "enter" in k else v for k, v in state.items()}, {})
    with pytest.raises(ValueError, match=r"backbone\.enter\.weight \(\[1, 12, 3, 3\], not \[4, 12, 3, 3\]\)"):
        load_pretrained(model, tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_absent_and_damaged_files_are_one_line_each(tmp_path):
    for read in (load_config, load_state):
        with pytest.raises(ValueError, match="is absent"):
            read(tmp_path)
    save_pretrained(tmp_path, deblurrer(**PLAIN).state_dict(), {"a": 1})
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.yaml"
    weights.write_bytes(weights.read_bytes()[:-7])
    config.write_text("a: [1\n")
    for read, words in ((load_state, "is damaged"), (load_config, "cannot be read")):
        with pytest.raises(ValueError, match=words) as caught:
            read(tmp_path)
        assert "\n" not in str(caught.value)
    config.write_text("just words\n")
    with pytest.raises(ValueError, match="mapping of settings"):
        load_config(tmp_path)


def test_a_failed_write_leaves_the_old_model(tmp_path):
    model = deblurrer(**PLAIN)
    save_pretrained(tmp_path, model.state_dict(), {"version": 1})
    with pytest.raises(Exception, match="represent"):
        save_pretrained(tmp_path, model.state_dict(), {"version": object()})
    assert load_config(tmp_path) == {"version": 1}
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write the model"):
        save_pretrained(tmp_path / "file" / "run", {}, {})


def test_tensors_are_written_one_by_one_in_the_common_format(tmp_path):
    tensors = {
        "whole": torch.arange(6, dtype=torch.int64).view(2, 3),
        "turned": torch.rand(4, 3).T,
        "half": torch.rand(5).to(torch.bfloat16),
        "one": torch.tensor(2.5),
        "none": torch.empty(0, 4),
        "flags": torch.tensor([True, False, True]),
    }
    layout = [(name, value.shape, value.dtype) for name, value in tensors.items()]
    with SafetensorsWriter(tmp_path / "a.safetensors", layout, {"what": "ä"}) as file:
        for value in tensors.values():
            file.write(value)
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name
    with safe_open(tmp_path / "a.safetensors", framework="pt") as opened:
        told = opened.metadata()
    assert {name: told[name] for name in ("format", "what")} == {"format": "pt", "what": "ä"}


def test_no_flipped_bit_of_a_model_goes_unnoticed(tmp_path):
    file = tmp_path / "a.safetensors"
    save_pretrained(file, {"w": torch.rand(40), "b": torch.rand(3)}, {"version": 1, "zeros": "0" * 40})
    whole, meant = file.read_bytes(), load_state(file)
    assert meant["w"].shape == (40,)
    for bit in range(0, 8 * len(whole), 13):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << (bit % 8)
        file.write_bytes(flipped)
        with contextlib.suppress(ValueError):
            found = load_state(file)
            # Only a bit in the digest's own name goes through: the file counts as one without, and is what it was.
            assert b'"blake2b"' not in flipped
            assert all(torch.equal(found[name], meant[name]) for name in meant)
    save_file({"w": torch.ones(2)}, file)  # another program's, without a digest
    assert torch.equal(load_state(file)["w"], torch.ones(2))


def test_a_file_that_is_not_finished_leaves_nothing(tmp_path):
    layout = [("a", (2,), torch.float32), ("b", (2,), torch.float32)]

    def write(value: torch.Tensor) -> None:
        with SafetensorsWriter(tmp_path / "a.safetensors", layout) as file:
            file.write(value)

    with pytest.raises(ValueError, match="1 of 2 tensors"):
        write(torch.ones(2))
    with pytest.raises(ValueError, match="a: shape"):
        write(torch.ones(3))
    assert not list(tmp_path.iterdir())


def test_one_file_holds_its_configuration(tmp_path):
    model = deblurrer(**PLAIN)
    save_pretrained(tmp_path / "new" / "a.safetensors", model.state_dict(), {"text": "ä", "list": [1]})
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.safetensors"]
    assert load_config(tmp_path / "new" / "a.safetensors") == {"text": "ä", "list": [1]}
    load_pretrained(deblurrer(**PLAIN), tmp_path / "new" / "a.safetensors")
