"""Rules of the whole test suite: benchmarks run only with --benchmark-only, tests only without it."""

import logging
import sys
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
    # What takes minutes begins first, so that it does not run alone at the end of a parallel run.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def _log_as_imported():
    """A run in this process sends the program's log to its own console and file: no other test is to see that."""
    for name in ("sharpprior", "sharpprior.data"):
        log = logging.getLogger(name)
        while log.handlers:
            handler = log.handlers[0]
            log.removeHandler(handler)
            handler.close()
        log.propagate = True
        log.setLevel(logging.NOTSET)


@pytest.fixture
def sharpprior(monkeypatch, capsys):
    """Run the command in this process: (status, stdout, stderr)."""
    from train.cli.app import main

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sharpprior", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, error = capsys.readouterr()
        return ended.value.code or 0, out, error

    return run
