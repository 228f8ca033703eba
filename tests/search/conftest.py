"""Fixtures of the tests of the search."""

import pytest
from common import PROCESS, mixture


@pytest.fixture(scope="module")
def score_fn():
    """The exact network of a three-component mixture in four dimensions."""
    return mixture().score_fn(PROCESS, "edm_f")
