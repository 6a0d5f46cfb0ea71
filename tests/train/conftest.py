"""One place for the runs of the session, and a finished one; a browser."""

from collections.abc import Iterator

import pytest

from tests.browser import Browser, started
from tests.train.runs import Runs


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Runs:
    """One place for all runs of the session."""
    return Runs(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="session")
def unbroken(runs) -> str:
    """A finished run of 12 steps (4 of them distill), with checkpoints at 6 and 12."""
    runs.run("unbroken", train__steps=12, train__distill_steps=4, checkpoint__every=6)
    return "unbroken"


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    """A headless Chromium, which takes part of a core as long as it runs: not longer than a file's tests."""
    yield from started(tmp_path_factory.mktemp("browser"))
