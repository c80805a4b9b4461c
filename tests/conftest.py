"""Fixtures that every test may use."""

from tests.support.automation import automation
from tests.support.captioning import tiny_coca
from tests.support.pool_factory import tiny_clip
from tests.support.scenario import scenario

__all__ = ["automation", "scenario", "tiny_clip", "tiny_coca"]
