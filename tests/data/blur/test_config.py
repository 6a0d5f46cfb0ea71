"""Settings of blur synthesis: presets, partial sections, and errors of one clear line."""

import re

import pytest
from pydantic import ValidationError

from data.blur import BlurConfig


def only_error(**given) -> tuple[str, str]:
    with pytest.raises(ValidationError) as caught:
        BlurConfig(**given)
    (error,) = caught.value.errors()
    assert "\n" not in error["msg"]
    return ".".join(map(str, error["loc"])), error["msg"]


@pytest.mark.parametrize("preset", ["camera", "severe", "realistic-rsblur", "gopro-like", "mild"])
def test_presets_are_valid_and_survive_being_written_down(preset):
    config = BlurConfig(preset=preset)
    assert BlurConfig.model_validate(config.model_dump(mode="json")) == config
    assert config.preset == preset


def test_the_defaults_are_a_camera_s_and_runs_of_the_old_ones_keep_theirs():
    config, old = BlurConfig(), BlurConfig(preset="severe")
    assert old.generators.gaussian_process == 0.52
    assert old.generators.tremor == old.photometry.trails.share == old.photometry.isp.share == old.defocus.share == 0
    assert old.motion.correlation == (0.15, 0.8)
    assert BlurConfig(**old.model_dump()) == old
    assert config.generators.gaussian_process == 0.10
    assert config.tiers == old.tiers
    assert config.tiers.severe.share == 0.45
    assert config.tiers.extreme.extent == (80, 160)
    assert config.tiers.identity.share == 0.04
    assert config.photometry.jpeg.quality == (60, 98)
    assert config.device == "cpu"


def test_one_key_of_a_section_overrides_the_preset_and_keeps_the_rest():
    config = BlurConfig(
        preset="gopro-like", tiers={"severe": {"extent": [40, 60]}}, photometry={"highlight_boost": [0, 1]}
    )
    assert config.tiers.severe.extent == (40, 60)
    assert config.tiers.severe.share == 0.30
    assert config.photometry.highlight_boost == (0, 1)
    assert config.photometry.gamma == (2.2, 2.2)


def test_a_list_of_generators_replaces_the_presets():
    config = BlurConfig(preset="gopro-like", generators={"linear": 1})
    assert config.generators.linear == 1
    assert config.generators.rotation == 0


@pytest.mark.parametrize(
    ("given", "place", "message"),
    [
        ({"preset": "extreme"}, "preset", "severe"),
        ({"tires": {}}, "tires", "not permitted"),
        ({"generators": {"gaussian": 1}}, "generators.gaussian", "not permitted"),
        ({"generators": {"linear": 0.5}}, "generators", "shares sum to 0.5"),
        ({"tiers": {"mild": {"share": 0.5}}}, "tiers", "identity included, sum to 1.44"),
        ({"tiers": {"mild": {"extent": [3, 20]}}}, "tiers", r"mild.extent \[3, 20\] px leaves"),
        ({"tiers": {"mild": {"extent": [9, 3]}}}, "tiers.mild.extent", "lower one first"),
        ({"tiers": {"mild": {"extent": [0, 3]}}}, "tiers", "above 0"),
        ({"tiers": {"extreme": {"extent": [90, float("inf")]}}}, "tiers.extreme.extent", "finite"),
        ({"photometry": {"gamma": [0.1, 2]}}, "photometry", r"gamma \[0.1, 2\]: must lie in 1–4"),
        ({"photometry": {"jpeg": {"quality": [90, 60]}}}, "photometry.jpeg", "lower one first"),
        ({"photometry": {"jpeg": {"quality": [0, 60]}}}, "photometry.jpeg.quality.0", "greater than or equal to 1"),
        ({"photometry": {"noise": {"shot": -1}}}, "photometry.noise.shot", "greater than or equal to 0"),
        ({"max_attempts": 0}, "max_attempts", "greater than or equal to 1"),
        ({"device": "tpu"}, "device", "'cpu' or 'cuda'"),
    ],
)
def test_errors_name_the_place_and_the_rule(given, place, message):
    where, what = only_error(**given)
    assert where == place
    assert re.search(message, what)


def test_every_field_is_described():
    def fields(model):
        for name, field in model.model_fields.items():
            yield f"{model.__name__}.{name}", field
            if hasattr(field.annotation, "model_fields"):
                yield from fields(field.annotation)

    assert [name for name, field in fields(BlurConfig) if not field.description] == []
