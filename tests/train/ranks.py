"""Starts the ranks of a job by hand: no launcher above them that would end all when one ends."""

import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def start_ranks(command: Sequence[str], world: int, environment: dict[str, str]) -> list[subprocess.Popen]:
    """One process a rank, with pipes for what they say."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment | {k: str(v) for k, v in (place | {"RANK": rank, "LOCAL_RANK": rank}).items()},
        )
        for rank in range(world)
    ]
