"""No photograph of the validation set in the training set, told by what the pictures show and not by their names."""

from __future__ import annotations

import cv2
import numpy as np

from data.shards.set import ShardSet
from data.stream.pairs import Sources

SIDE = 16  # of the grid of differences: 256 bits
NEAR = 20  # bits: copies that were scaled or compressed again differ in a few, other pictures in about 128


def fingerprints(shards: ShardSet) -> np.ndarray:
    """Difference hash of every sharp picture, bool [n, 256]: whether brightness rises between neighbours of a 16×17
    grid. Scaling, compression and changes of brightness leave it nearly as it is."""
    sources = Sources([shards])
    found = np.empty((len(shards), SIDE * SIDE), bool)
    for number in range(len(shards)):
        found[number] = fingerprint(sources.photograph(0, number)[0])
    return found


def fingerprint(picture: np.ndarray) -> np.ndarray:
    """The hash, bool [256], of one uint8 RGB picture [H, W, 3]."""
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (SIDE + 1, SIDE), interpolation=cv2.INTER_AREA).astype(np.int16)
    return (small[:, 1:] > small[:, :-1]).ravel()


def check_no_leak(train: ShardSet, val: ShardSet) -> int:
    """How many bits the nearest pair of a training and a validation picture differs in.

    ValueError, with both keys, where a training picture shows what a validation picture shows, mirrored ones too.
    """
    ours, theirs = fingerprints(train), fingerprints(val)
    mirrored = ~ours.reshape(-1, SIDE, SIDE)[:, :, ::-1].reshape(len(ours), -1)
    nearest = SIDE * SIDE
    for number, bits in enumerate(theirs):
        apart = np.minimum((ours != bits).sum(1), (mirrored != bits).sum(1))
        place = int(apart.argmin())
        nearest = min(nearest, int(apart[place]))
        if apart[place] <= NEAR:
            raise ValueError(
                f"training picture {train.key(place)} shows what validation picture {val.key(number)} shows "
                f"({apart[place]} of {SIDE * SIDE} bits differ): take one of them out"
            )
    return nearest
