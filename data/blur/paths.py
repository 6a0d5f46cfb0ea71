"""Camera paths other than the Gaussian process: jittery shake, straight, arc and accelerated motion."""

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


def _on_axis(distance: np.ndarray) -> np.ndarray:
    return np.stack([np.zeros_like(distance), distance], axis=1)
