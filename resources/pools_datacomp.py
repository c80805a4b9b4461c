"""DataComp metadata."""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from resources.pools import ShardRead
from resources.settings import EncoderSettings, PoolSettings


class DatacompPool:
    """A folder of parquet with npz. See `pools.Pool`."""

    def __init__(self, settings: PoolSettings, encoders: Mapping[str, EncoderSettings]) -> None:
        self.settings = settings
        self.encoders = encoders

    def list_shards(self) -> dict[str, str]:
        """See `pools.Pool`."""
        raise NotImplementedError

    def read_shard(self, name: str) -> ShardRead:
        """See `pools.Pool`."""
        raise NotImplementedError(name)

    def image_url(self, name: str) -> str:
        """See `pools.Pool`."""
        raise NotImplementedError(name)

    def embeddings(self, name: str, rows: pa.Table, encoder_name: str) -> tuple[np.ndarray, np.ndarray]:
        """See `pools.Pool`."""
        raise NotImplementedError(name, rows, encoder_name)
