"""Fixtures that every test may use, and the threads that test processes and their subprocesses may use."""

import os
from collections.abc import Iterator

import pytest

# Before anything loads OpenMP. By default its threads spin while they wait, which takes the cores from the other test
# process; and each process would start a thread for every core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

from tests.support.automation import automation
from tests.support.captioning import tiny_coca
from tests.support.cascading import cascade, computed_cascade, small_clip
from tests.support.pool_factory import tiny_clip
from tests.support.s3 import bucket, s3_address
from tests.support.scenario import finished, finished_pass, scenario

__all__ = [
    "automation",
    "bucket",
    "cascade",
    "computed_cascade",
    "finished",
    "finished_pass",
    "s3_address",
    "scenario",
    "small_clip",
    "tiny_clip",
    "tiny_coca",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the tests first that mostly wait, so that one process waits while the others compute."""
    items.sort(key=lambda item: "waits" not in item.keywords)


@pytest.fixture(scope="session", autouse=True)
def cache_of_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the records of the tests' lakes out of the person's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
