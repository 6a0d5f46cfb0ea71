"""Which pictures of a data set come from one video or place, and so resemble each other: intervals resample these.

A scene is a function of the blurry picture's path and of the pair's key.
"""

import re
from collections.abc import Callable
from pathlib import Path

from data.shards.names import ROLES

Scene = Callable[[Path, str], str]


def own_scene(path: Path, key: str) -> str:
    """Of folders of pairs: the video or scene that re-packs of GoPro, RealBlur and HIDE keep in names, else the folder,
    else the picture itself: its key."""
    named = re.match(r"(GOPR\d+(?:_\d+)*|scene\d+)[-_]|\d+from(.+)$", path.stem)
    if named is not None:
        return named[1] or named[2]
    return key if path.parent.name.lower() in ROLES else path.parent.name


def hide_scene(path: Path, key: str) -> str:
    """HIDE's names are `<number>from<video>`."""
    return path.stem.partition("from")[2] or key


def folder_above(levels: int) -> Scene:
    """The folder so many levels above the one that holds the picture."""
    return lambda path, key: path.parents[levels].name
