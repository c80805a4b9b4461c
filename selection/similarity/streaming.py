"""Rows that pass through a device chunk by chunk, each read once.

Here belongs when a chunk is read and copied. Where rows come from is the caller's, what is done with them as well.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from selection.similarity.reduction import spans


def resident(
    count: int, rows: int, device: torch.device, read: Callable[[slice], Sequence[Tensor]]
) -> Iterator[tuple[slice, list[Tensor]]]:
    """Give chunk by chunk what `read` gives, on the device.

    All that wants a chunk's rows shall run before the next one is asked for. On CUDA the next chunk is read, and copied
    from pinned memory, by another thread and on another stream while this one is worked on.

    Args:
        count: number of rows.
        rows: of a chunk; the last one may have fewer.
        device: where the chunks shall be.
        read: gives the rows of a slice as tensors on CPU.

    Yields:
        Which rows, and their tensors on the device.
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
                part.record_stream(here)
            following = thread.submit(fetch, after) if after is not None else None
            yield at, parts
