"""A finished project, and its pages behind a server, for the tests of a module."""

from collections.abc import Iterator

import pytest

from tests.support.browse_site import Site, open_site
from tests.support.scenario import FinishedPass, Scenario


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_clip, finished_pass: FinishedPass) -> Iterator[Scenario]:
    scenario = Scenario(tmp_path_factory.mktemp("browse"), tiny_clip)
    finished_pass.restore(scenario)
    yield scenario
    scenario.instance.dispose()


@pytest.fixture(scope="module")
def site(project: Scenario) -> Iterator[Site]:
    with open_site(project.open()) as opened:
        yield opened
