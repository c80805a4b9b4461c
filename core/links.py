"""Addresses of the pages of `clip-select browse`, for Dagster's metadata, reports and the terminal.

Here: paths and queries. An address has no token: links are stored in event logs and reports, which others may read.
"""

import os
from urllib.parse import quote, urlencode

BROWSE_PORT = 3002
BROWSE_VARIABLE = "CLIP_SELECTION_BROWSE"
"""Environment variable with the address of `clip-select browse`, by default http://127.0.0.1:3002."""


def browse_link(path: str = "/", **query: object) -> str:
    """Return the address of a page.

    Args:
        path: of the page, quoted.
        query: its parameters; None is left out.
    """
    address = (os.environ.get(BROWSE_VARIABLE) or f"http://127.0.0.1:{BROWSE_PORT}").rstrip("/")
    asked = urlencode({name: value for name, value in query.items() if value is not None})
    return f"{address}{path}{'?' + asked if asked else ''}"


def sample_link(uid: str) -> str:
    """Return the address of a sample's page."""
    return browse_link(f"/sample/{quote(uid, safe='')}")


def asset_link(asset: str, shard: str | None) -> str:
    """Return the address of the page that shows best what an asset holds: rejects, a subset, a shard, or the pool."""
    if asset == "raw_pool":
        return browse_link("/rejects", shard=shard)
    if asset.startswith("subset/"):
        return browse_link(recipe=asset.removeprefix("subset/"))
    return browse_link(shard=shard)
