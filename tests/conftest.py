"""Fixtures that every test may use."""

from tests.pool_factory import tiny_clip
from tests.scenario import scenario

__all__ = ["scenario", "tiny_clip"]
