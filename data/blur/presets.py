"""Named starting points for the blur settings; each lists only what differs from the defaults."""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {"severe": {}}
