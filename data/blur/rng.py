"""Random numbers that depend on a sample's name only: any worker, rank or resume draws the same pair."""

import hashlib

import numpy as np

_WORD = 2**64 - 1


def sample_rng(seed: int, epoch: int, key: str, crop: int) -> np.random.Generator:
    """Generator of one crop of one sample: Philox keyed by blake2b of (seed, epoch, key, crop).

    Python's `hash` is salted per process and global generators depend on who drew before; this depends on neither.
    Raises ValueError for a negative seed, epoch or crop.
    """
    for name, value in (("seed", seed), ("epoch", epoch), ("crop", crop)):
        if value < 0:
            raise ValueError(f"{name} {value}: must be 0 or more")
    # Lengths are written out, so no two different tuples give the same bytes.
    text = key.encode()
    message = f"{int(seed)}:{int(epoch)}:{int(crop)}:{len(text)}:".encode() + text
    return stream(hashlib.blake2b(message, digest_size=16).digest())


def stream(key: bytes, attempt: int = 0, purpose: int = 0) -> np.random.Generator:
    """Generator number (attempt, purpose) under a 16-byte Philox key; all are independent of each other.

    The upper words of Philox's counter name the stream, so drawing more noise in one never moves another.
    """
    words = [int.from_bytes(key[:8], "little"), int.from_bytes(key[8:16], "little")]
    counter = [0, 0, attempt & _WORD, purpose & _WORD]
    return np.random.Generator(np.random.Philox(key=np.array(words, np.uint64), counter=np.array(counter, np.uint64)))
