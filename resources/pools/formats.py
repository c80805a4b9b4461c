"""The registry of pool formats, and opening a pool.

To add a format: a module beside this one with a `FORMAT`, its line in `_DECLARED`, and its name in
`resources.settings.FormatName`.
"""

from collections.abc import Iterable, Mapping

from resources.pools import datacomp, image_folder, parquet_images, webdataset
from resources.pools.base import Pool, PoolError, PoolFormat, TarPool
from resources.pools.groups import ShardGroups
from resources.settings import EncoderSettings, PoolSettings

_DECLARED = (
    webdataset.FORMAT,
    datacomp.FORMAT,
    parquet_images.FORMAT,
    image_folder.FORMAT,
)
FORMATS: Mapping[str, PoolFormat] = {declared.name: declared for declared in _DECLARED}
"""All formats by name."""

_OPTIONS = frozenset[str]().union(*(declared.options for declared in _DECLARED))


def pool_format(settings: PoolSettings) -> PoolFormat:
    """Return the declaration of a pool's format; nothing is read."""
    return FORMATS[settings.format]


def open_pool(settings: PoolSettings, encoders: Mapping[str, EncoderSettings], lake: str | None = None) -> Pool:
    """Return the reader of a pool. Nothing is read yet.

    Args:
        settings: the pool.
        encoders: all encoders by name.
        lake: path or URL of the lake, which records groups of tars; without it every tar is a shard.

    Raises:
        PoolError: an encoder needs images or embeddings that the format does not have, or a setting belongs to
            another format.
    """
    declared = pool_format(settings)
    for option in sorted(_OPTIONS - declared.options):
        if getattr(settings, option) is not None:
            having = _either(other.name for other in FORMATS.values() if option in other.options)
            raise PoolError(f"pool.{option} is for format {having}, and pool.format is {declared.name}. Remove it.")
    for name, encoder in encoders.items():
        if encoder.precomputed is not None and not declared.has_embeddings:
            having = _either(other.name for other in FORMATS.values() if other.has_embeddings)
            raise PoolError(
                f"encoder {name} is precomputed, but the {declared.name} pool {settings.path} carries no embeddings. "
                f"Give the encoder a `model` and drop `precomputed`, or set the pool's format to {having}."
            )
        if encoder.precomputed is None and not declared.has_images:
            raise PoolError(
                f"encoder {name} has a model only, but the {declared.name} pool {settings.path} carries no images. Set "
                "`precomputed` to the embeddings it is to read (such as b32)."
            )
    pool = declared.open(settings, encoders)
    if isinstance(pool, TarPool) and lake is not None:
        pool.groups = ShardGroups(lake)
    return pool


def _either(names: Iterable[str]) -> str:
    return " or ".join(sorted(names))
