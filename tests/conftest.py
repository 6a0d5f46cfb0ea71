"""Rules of the whole test suite: benchmarks run only with --benchmark-only, tests only without it."""

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("--benchmark-only", default=False)
    chosen = [item for item in items if (BENCHMARKS in item.path.parents) == bool(wanted)]
    dropped = [item for item in items if item not in set(chosen)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = chosen
