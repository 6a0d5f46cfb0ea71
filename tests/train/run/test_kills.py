"""A run that is killed ends as if nothing had happened. `tests/studies/kill_often.py` kills more often."""

import random

import pytest

from tests.studies.kill_often import compare, torment

pytestmark = pytest.mark.slow


def test_a_run_killed_while_training_and_while_saving_ends_as_the_unbroken_one(runs, unbroken):
    settings = {"train__steps": 12, "train__distill_steps": 4, "checkpoint__every": 1}
    told = torment(runs, "killed", 3, random.Random(1), 1, settings, ("training", "saving", "saving"))
    assert len(told.lines) == 3
    compare(runs, "killed", unbroken, 12)
