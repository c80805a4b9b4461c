"""Fixtures that every test may use."""

from tests.support.pool_factory import tiny_clip
from tests.support.scenario import scenario

__all__ = ["scenario", "tiny_clip"]
