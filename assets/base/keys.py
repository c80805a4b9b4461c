"""Names that Dagster and the lake share: asset keys and the partitions, one a shard."""

import dagster as dg

SHARDS_NAME = "shards"
SHARDS = dg.DynamicPartitionsDefinition(name=SHARDS_NAME)


def asset_key(key: str) -> dg.AssetKey:
    """Return Dagster's key of an asset."""
    return dg.AssetKey(key.split("/"))
