"""Streaming on a GPU: `benchmarks.streaming` at the sizes of a real pool."""

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks import streaming as on_any_device


def streaming(device: torch.device, **sizes: Any) -> Iterator[dict[str, Any]]:
    """Score rows from a memory-mapped file against all draws and targets; see `benchmarks.streaming.measure`."""
    yield on_any_device.measure(device=str(device), **sizes)
    if device.type == "cuda":
        yield {"gpu_peak_mb": torch.cuda.max_memory_allocated(device) / 2**20}
