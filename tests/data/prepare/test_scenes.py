"""Scenes: pictures of one video or place belong together in every layout."""

from collections import Counter
from pathlib import Path

import pytest

from data.prepare.layouts import LAYOUTS, list_dataset
from data.prepare.scenes import own_scene
from tests.data.prepare.test_layouts import BUILD

SCENES = {
    "gopro": {"GOPR0384_11_00": 2},
    "realblur-j": {"scene230": 2},
    "realblur-r": {"scene230": 2},
    "reds": {"007": 2},
    "rsblur": {"0019": 1},
}


@pytest.mark.parametrize("layout", SCENES)
def test_pictures_of_the_tested_split_are_grouped_by_video_or_place(tmp_path, layout):
    BUILD[layout](tmp_path)
    known = LAYOUTS[layout]
    pairs = list_dataset(layout, tmp_path, split=known.tested, partial=True)
    assert Counter(known.scene(pair.files[-1], pair.key) for pair in pairs) == SCENES[layout]


def test_every_layout_s_tested_split_is_one_of_its_splits():
    for layout in LAYOUTS.values():
        assert layout.tested in layout.splits


@pytest.mark.parametrize(
    ("path", "scene"),
    [
        ("test/input/GOPR0384_11_00-000001.png", "GOPR0384_11_00"),
        ("input/scene230-blur_1.png", "scene230"),
        ("test/input/104fromGOPR1033.png", "GOPR1033"),  # HIDE's
        ("test/input/7fromGOPR1033.MP4.png", "GOPR1033.MP4"),
        ("blur/0001.png", "own key"),
        ("blur/from.png", "own key"),
        ("blur/harbour/0001.png", "harbour"),
    ],
)
def test_re_packs_keep_scenes_in_names_or_folders(path, scene):
    assert own_scene(Path(path), "own key") == scene


def test_hide_s_names_say_their_video():
    scene = LAYOUTS["hide"].scene
    assert scene(Path("test/test-close-ups/104fromGOPR1033.png"), "k") == "GOPR1033"
    assert scene(Path("test/test-close-ups/a.png"), "k") == "k"
