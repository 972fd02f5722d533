"""Hypothesis profiles: `ci` unless HYPOTHESIS_PROFILE or --hypothesis-profile says otherwise.

What pays is the same on all machines here: no test depends on how fast the one is that it runs on.
"""

import gc
import os
import re

import pytest
from hypothesis import HealthCheck, settings
from machines import STEADY

from conjoin.policy import machine

settings.register_profile(
    "ci",
    max_examples=12,
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "nightly",
    settings.get_profile("ci"),
    max_examples=1000,
    derandomize=False,
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(scope="session", autouse=True)
def _steady_machine():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "constants", lambda device, dtype: STEADY)
        yield


def pytest_collection_finish():
    """What is imported by now stays: collections of the tests' own garbage pass it over."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With `--dist loadgroup` the tests of one public model run in one worker, which makes it once.

    xdist's own groups are names that it appends to those of the tests, which pytest 9 undoes.
    """
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByModel(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return re.sub(r".*test_zoo\.py::\w+\[(\w+).*", r"\1", nodeid)

    return ByModel(config, log)
