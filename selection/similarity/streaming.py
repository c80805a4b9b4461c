"""Stream rows through a device in chunks, each read once.

Here: when a chunk is read and copied. Not here: the source of the rows, and what is computed from them.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from selection.similarity.reduction import spans


def resident(
    count: int, rows: int, device: torch.device, read: Callable[[slice], Sequence[Tensor]]
) -> Iterator[tuple[slice, list[Tensor]]]:
    """Yield chunks of rows on a device.

    Launch all work on a chunk before requesting the next one. On CUDA another thread reads the next chunk meanwhile and
    copies it from pinned memory on another stream.

    Args:
        count: number of rows.
        rows: rows of a chunk; the last one may have fewer.
        device: where the chunks are needed.
        read: returns the rows of a slice as tensors on CPU.

    Yields:
        The slice of rows, and its tensors on the device.
    """
    chunks = spans(count, rows)
    if device.type == "cpu":
        for at in chunks:
            yield at, list(read(at))
        return
    copies = torch.cuda.Stream(device)

    def fetch(at: slice) -> list[Tensor]:
        with torch.cuda.stream(copies):
            return [part.pin_memory().to(device, non_blocking=True) for part in read(at)]

    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(fetch, chunks[0]) if chunks else None
        for at, after in zip(chunks, [*chunks[1:], None], strict=True):
            assert following is not None
            parts = following.result()
            here = torch.cuda.current_stream(device)
            here.wait_stream(copies)
            for part in parts:
                part.record_stream(here)  # or the allocator could reuse its memory for the next copy too early
            following = thread.submit(fetch, after) if after is not None else None
            yield at, parts
