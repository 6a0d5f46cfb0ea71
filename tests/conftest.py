"""Rules of the whole test suite: benchmarks run only with --benchmark-only, tests only without it."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"
# Files that take minutes go first, so that they do not run alone at the end of a parallel run.
SLOW = (
    "test_slurm",
    "test_ranks",
    "test_universal",
    "test_lanes",
    "test_runs",
    "test_kills",
    "test_robustness_stop",
    "test_robustness_ranks",
    "test_cluster_plan",
    "test_distillation",
    "test_bad_input",
    "test_cli",
    "test_prepare",
    "test_loader",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("--benchmark-only", default=False)
    chosen = [item for item in items if (BENCHMARKS in item.path.parents) == bool(wanted)]
    dropped = [item for item in items if item not in set(chosen)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = chosen
    items.sort(key=lambda item: SLOW.index(item.path.stem) if item.path.stem in SLOW else len(SLOW))


@pytest.fixture
def sharpprior(monkeypatch, capsys):
    """Run the command in this process: (status, stdout, stderr)."""
    from train.cli import main

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sharpprior", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, error = capsys.readouterr()
        return ended.value.code or 0, out, error

    return run
