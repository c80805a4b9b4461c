"""One shard as an asset's function sees it: its inputs as tables or tensors, and its scores as a `Result`."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from assets.base.asset import Step
from assets.base.results import Result
from assets.base.score_tables import chunks, device, in_pool_order, score_stats, score_table
from resources.lake.files import Lake
from resources.lake.sealed import Vectors

if TYPE_CHECKING:
    import torch

EMBEDDINGS = "embeddings/{encoder}"


@dataclass(frozen=True)
class Shard:
    """A shard that a step computes.

    Attributes:
        step: the step.
        name: the shard's name.
    """

    step: Step
    name: str

    @property
    def lake(self) -> Lake:
        """The lake."""
        return self.step.context.lake

    def read(self, key: str, columns: list[str] | None = None) -> pa.Table:
        """Read an asset's file of this shard; `{names}` in the key are filled in.

        Raises:
            LakeError: there is no such file, or it can't be read.
        """
        return self.step.read(key, self.name, columns)

    @cached_property
    def embeddings(self) -> pa.Table:
        """The identity of the rows of the shard's `embeddings/<encoder>`: f0 and f1."""
        return self.read(EMBEDDINGS, ["f0", "f1"])

    @cached_property
    def _vectors(self) -> Mapping[str, Vectors]:
        key = EMBEDDINGS.format(**self.step.names)
        columns = ("image", "text")
        return dict(zip(columns, self.lake.vectors(key, self.name, columns=columns), strict=True))

    def vectors(self, column: str) -> np.ndarray:
        """Return the `image` or `text` embeddings, float16 `[n, d]`, memory-mapped and verified.

        Raises:
            LakeError: there is no such file, or it is damaged.
        """
        return self._vectors[column][:]

    def chunks(self, *columns: str) -> Iterator[tuple[slice, list["torch.Tensor"]]]:
        """Yield the embeddings chunk by chunk on the device, `[rows, d]` tensors, one a column.

        The next chunk is read and verified while the caller computes. Reports each chunk as done when the next one is
        asked for.
        """
        for rows, parts in chunks([self._vectors[column] for column in columns]):
            yield rows, parts
            self.step.progress(rows.stop - rows.start, self.name)

    def map(
        self, function: Callable[..., "torch.Tensor | tuple[torch.Tensor, ...]"], *columns: str
    ) -> list[np.ndarray]:
        """Apply a function to the embeddings chunk by chunk.

        Args:
            function: takes one `[rows, d]` tensor a column, and returns one `[rows]` tensor or several.
            columns: `image`, `text` or both.

        Returns:
            Each of the function's results for the whole shard, `[n]`.
        """
        found: list[np.ndarray] | None = None
        for rows, parts in self.chunks(*columns):
            results = function(*parts)
            arrays = [part.cpu().numpy() for part in (results if isinstance(results, tuple) else (results,))]
            if found is None:
                found = [np.empty(self.embeddings.num_rows, array.dtype) for array in arrays]
            for whole, array in zip(found, arrays, strict=True):
                whole[rows] = array
        return found if found is not None else self._empty(function, columns)

    def _empty(self, function: Callable[..., Any], columns: tuple[str, ...]) -> list[np.ndarray]:
        """Return the results for a shard without rows, `[0]` each, with the dtypes that `function` returns."""
        import torch

        # `selection` refuses empty matrices, so one unit vector stands in, and its scores are cut off.
        widths = [self._vectors[column].shape[1] for column in columns]
        results = function(*(torch.eye(1, width, dtype=torch.float16, device=device()) for width in widths))
        return [part[:0].cpu().numpy() for part in (results if isinstance(results, tuple) else (results,))]

    def scores(self, summary: dict[str, Any] | None = None, /, **columns: np.ndarray) -> Result:
        """Return the shard's score table, with statistics of each column that ranks.

        Its rows are those of `raw_pool`. If the encoder embeds only the rows of a subset, the others have no values.

        Args:
            summary: further statistics.
            columns: `[n]` values of each column of the asset, one for each row of its embeddings.

        Raises:
            ValueError: a score is not finite.
        """
        declared = {column.name: column for column in self.step.asset.declared.columns}
        identity = self.read(self.step.asset.row_source, ["f0", "f1"])
        stats = {}
        for name, values in columns.items():
            if declared[name].direction is not None:
                stats.update(score_stats(name, values))
        table = score_table(self.name, identity, **columns)
        if self.step.asset.declared.of is not None:
            table = in_pool_order(self.name, table, self.read("raw_pool", ["f0", "f1"]))
        return Result(table, {**(summary or {}), **stats})
