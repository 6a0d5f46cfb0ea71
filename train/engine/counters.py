"""What DeepSpeed counts and scales beside the weights: its step counters and its loss scaler."""

from __future__ import annotations

from typing import Any

from train.engine.engine import Engine

# Not micro_steps: a fresh engine stands at an accumulation boundary, as every checkpoint does.
COUNTERS = ("global_steps", "global_samples", "skipped_steps")


def engine_facts(engine: Engine) -> dict[str, Any]:
    """DeepSpeed's counters and its loss scaler's plain values, as JSON takes them."""
    scaler, autocast = _scalers(engine)
    values = vars(scaler) if scaler is not None else {}
    return {
        "counters": {name: getattr(engine.engine, name) for name in COUNTERS},
        "loss_scaler": {name: value for name, value in values.items() if _plain(value)},
        "autocast_scaler": autocast.state_dict() if autocast is not None else {},
    }


def take_engine_facts(engine: Engine, facts: dict[str, Any]) -> None:
    """Take up what `engine_facts` gave."""
    for name, value in facts["counters"].items():
        setattr(engine.engine, name, value)
    scaler, autocast = _scalers(engine)
    for name, value in facts["loss_scaler"].items():
        if scaler is not None and hasattr(scaler, name):
            setattr(scaler, name, value)
    if autocast is not None and facts["autocast_scaler"]:
        autocast.load_state_dict(facts["autocast_scaler"])


def _scalers(engine: Engine) -> tuple[Any, Any]:
    """(DeepSpeed's own loss scaler, torch's under its autocast); None where there is none."""
    outer = engine.engine.optimizer
    own = getattr(outer, "loss_scale_config", None) or getattr(outer, "loss_scaler", None)
    return own, getattr(outer, "torch_autocast_gradscaler", None)


def _plain(value: object) -> bool:
    return value is None or isinstance(value, int | float | bool)
