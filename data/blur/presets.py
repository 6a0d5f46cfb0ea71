"""Named starting points for the blur settings; each lists only what differs from the defaults."""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # The defaults: mostly 30–160 px of every kind, all of photometry.
    "severe": {},
    # Handheld snapshots and a warm-up for training.
    "mild": {
        "tiers": {
            "identity": {"share": 0.10},
            "mild": {"share": 0.60},
            "moderate": {"share": 0.25},
            "severe": {"share": 0.05},
            "extreme": {"share": 0.0},
        },
    },
    # Photometry of RSBlur's camera (Rim et al., ECCV 2022): its noise alone, the sRGB response, saturation, no JPEG;
    # hand shake with roll, as their rig records.
    "realistic-rsblur": {
        "tiers": {
            "identity": {"share": 0.05},
            "mild": {"share": 0.25},
            "moderate": {"share": 0.40},
            "severe": {"share": 0.30},
            "extreme": {"share": 0.0},
        },
        "generators": {"gaussian_process": 0.45, "boracchi_foi": 0.10, "rotation": 0.30, "layers": 0.15},
        "photometry": {
            "curves": {"srgb": 1.0},
            "noise": {"shot": 1e-4, "read": 9.15e-4, "scale": [0.5, 1.5], "phone_share": 0.0},
            "jpeg": {"probability": 0.0},
        },
    },
    # As GoPro's pairs are made (Nah et al., CVPR 2017): an action camera's smooth motion and moving people, averaged
    # after a gamma of 2.2, without noise, saturation or compression of its own.
    "gopro-like": {
        "tiers": {
            "identity": {"share": 0.0},
            "mild": {"share": 0.35},
            "moderate": {"share": 0.35},
            "severe": {"share": 0.30},
            "extreme": {"share": 0.0},
        },
        "generators": {
            "gaussian_process": 0.25,
            "linear": 0.10,
            "arc": 0.10,
            "accelerated": 0.10,
            "rotation": 0.20,
            "layers": 0.25,
        },
        "photometry": {
            "curves": {"gamma": 1.0},
            "gamma": [2.2, 2.2],
            "highlight_boost": [0.0, 0.0],
            "noise": {"shot": 0.0, "read": 0.0, "phone_share": 0.0},
            "jpeg": {"probability": 0.0},
        },
    },
}
