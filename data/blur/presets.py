"""Named starting points for the blur settings; each lists only what differs from the defaults."""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # The default: severities as in `severe`, moved as cameras and hands move (most paths turn little), with lamps that
    # draw trails, defocus, rolling shutter, parallax and a phone's processing.
    "camera": {
        "generators": {
            "gaussian_process": 0.10,
            "boracchi_foi": 0.16,
            "linear": 0.12,
            "arc": 0.12,
            "accelerated": 0.10,
            "tremor": 0.12,
            "settling": 0.04,
            "rotation": 0.07,
            "rolling_shutter": 0.03,
            "layers": 0.08,
            "parallax": 0.04,
            "defocus": 0.02,
        },
        "motion": {
            "anxiety": [1e-4, 3e-3],
            "correlation": [0.6, 2.0],
            "arc": [10.0, 90.0],
            "straight_layers": True,
        },
        "defocus": {"share": 0.15},
        "photometry": {"trails": {"share": 0.35}, "isp": {"share": 0.25}},
    },
    # Very curly paths, mostly of 30–160 px: the default until this preset was called so, for runs begun with it.
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
