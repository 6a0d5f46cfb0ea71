"""Camera paths other than the Gaussian process: jittery shake, tremor, settling, straight, arc, accelerated motion."""

import cmath
import math

import numpy as np

from data.blur.trajectory import SAMPLES, rotate


def boracchi_foi_path(rng: np.random.Generator, anxiety: float) -> np.ndarray:
    """Jittery hand shake of Boracchi and Foi (IEEE TIP 2012): a particle of constant speed, path [N, 2], any scale.

    anxiety: 0 (nearly straight) to 1 (very nervous). Every step the heading receives Gaussian shake, is pulled back to
    the start, and at times is thrown almost backwards; then the speed is set to its constant again.
    """
    pull = rng.uniform(0.0, 0.7)
    shake = rng.uniform(0.0, 10.0)
    big_shake = rng.uniform(0.0, 0.2)
    noise = rng.standard_normal((SAMPLES, 2))
    throws = rng.random(SAMPLES) < big_shake * anxiety
    turns = rng.uniform(-0.5, 0.5, SAMPLES)
    speed = 1.0 / SAMPLES
    velocity = cmath.rect(speed, rng.uniform(0.0, 2.0 * math.pi))
    position = 0j
    path = np.zeros((SAMPLES + 1, 2))
    for i in range(SAMPLES):
        change = anxiety * (shake * complex(*noise[i]) - pull * SAMPLES * position) * speed
        if throws[i]:
            change += 2.0 * velocity * cmath.exp(1j * (math.pi + turns[i]))
        velocity += change
        velocity *= speed / max(abs(velocity), 1e-12)
        position += velocity
        path[i + 1] = position.imag, position.real
    return path


def linear_path(angle: float) -> np.ndarray:
    """Straight motion of constant speed at `angle` radians: path [N, 2] of length 1."""
    return rotate(_on_axis(np.linspace(0.0, 1.0, SAMPLES + 1)), angle)


def accelerated_path(angle: float, acceleration: float) -> np.ndarray:
    """Straight motion whose speed changes evenly, from 1 − a to 1 + a for acceleration a in [−1, 1]: path [N, 2]."""
    time = np.linspace(0.0, 1.0, SAMPLES + 1)
    return rotate(_on_axis(time * (1.0 - acceleration) + acceleration * time * time), angle)


def arc_path(angle: float, turn: float, acceleration: float) -> np.ndarray:
    """Arc of a circle that turns by `turn` radians in all, its speed changing as `accelerated_path`'s: path [N, 2]."""
    time = np.linspace(0.0, 1.0, SAMPLES + 1)
    heading = turn * (time * (1.0 - acceleration) + acceleration * time * time)
    return rotate(np.stack([np.sin(heading), 1.0 - np.cos(heading)], axis=1), angle)


def tremor_path(angle: float, cycles: float, amplitude: float, phases: tuple[float, float]) -> np.ndarray:
    """A hand's tremor on a drift at `angle` radians: path [N, 2] of about unit length.

    cycles: frequency times exposure (hands tremble at 8 to 12 Hz); amplitude: of the oscillation along and across the
    drift, relative to its length, which for the part across is halved; phases: of both, radians.
    """
    time = np.linspace(0.0, 1.0, SAMPLES + 1)
    along, across = (np.sin(2 * math.pi * cycles * time + phase) for phase in phases)
    return rotate(np.stack([amplitude / 2 * across, time + amplitude / 2 * along], axis=1), angle)


def settling_path(angle: float, decay: float, cycles: float, bend: float) -> np.ndarray:
    """A knock that dies down: a damped oscillation about where the camera comes to rest, path [N, 2], any scale.

    decay: time constant in exposures; cycles: of the oscillation in an exposure; bend: of its part across, relative.
    """
    time = np.linspace(0.0, 1.0, SAMPLES + 1)
    envelope = np.exp(-time / decay)
    along = 1 - envelope * np.cos(2 * math.pi * cycles * time)
    across = bend * envelope * np.sin(2 * math.pi * cycles * time)
    return rotate(np.stack([across, along], axis=1), angle)


def turning_of(path: np.ndarray, pieces: int = 64) -> float:
    """Degrees by which the heading of a path [N, 2] changes in all, left and right alike, over equal pieces."""
    steps = np.hypot(*np.diff(path, axis=0).T)
    travelled = np.concatenate([[0.0], np.cumsum(steps)])
    at = np.linspace(0.0, travelled[-1], pieces + 1)
    even = np.stack([np.interp(at, travelled, path[:, axis]) for axis in (0, 1)], axis=1)
    moved = np.diff(even, axis=0)
    heading = np.arctan2(moved[:, 0], moved[:, 1])
    return float(np.degrees(np.abs((np.diff(heading) + math.pi) % (2 * math.pi) - math.pi).sum()))


def straightness_of(path: np.ndarray) -> float:
    """Distance between a path's ends over its length, 0 to 1."""
    length = np.hypot(*np.diff(path, axis=0).T).sum()
    return float(np.hypot(*(path[-1] - path[0])) / max(length, 1e-12))


def _on_axis(distance: np.ndarray) -> np.ndarray:
    return np.stack([np.zeros_like(distance), distance], axis=1)
