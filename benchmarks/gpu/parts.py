"""The parts of the benchmark: their sizes, time limits and targets."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

LIMIT = 480
"""Seconds that all parts together may take."""

# n, m, d, τ: blocks that are full, ragged and more than one, columns beyond one span, both shifts, two launches
_RAGGED = [(1, 1, 1, 0.07), (130, 300, 97, 0.001), (3, 700, 768, 0.05)]
_LARGE = [(257, 8500, 40, 10.0), (4097, 33_001, 768, 0.01), (4097, 33_001, 1280, 0.05), (70_001, 1000, 512, 0.01)]
_WIDTHS = (768, 1280)
_REDUCTIONS = ("log_sum_exp", "log_sum_exp_both", "largest")


@dataclass(frozen=True)
class Part:
    """One part of the benchmark.

    Attributes:
        module: of `benchmarks.gpu`.
        function: takes the device and the sizes, and yields results by name.
        limit: seconds after which the part is ended.
        sizes: keywords of the function.
        targets: by path of a result, the values to reach on an H200, ascending.
    """

    module: str
    function: str
    limit: float
    sizes: Mapping[str, Any] = field(default_factory=dict)
    targets: Mapping[tuple[str, ...], tuple[float, ...]] = field(default_factory=dict)

    def results(self, device: str) -> Iterator[dict[str, Any]]:
        """Run the part on a device."""
        import torch

        module = import_module(f"benchmarks.gpu.{self.module}")
        yield from getattr(module, self.function)(torch.device(device), **self.sizes)


MACHINE = Part("machine", "describe", 30)

FULL = {
    "parity": Part("kernels", "parity", 75, {"problems": _RAGGED + _LARGE}),
    "speed": Part(
        "kernels",
        "speed",
        60,
        {"size": 32_768, "widths": _WIDTHS},
        {(f"d={width}", f"{name}_tflops"): (600, 700) for width in _WIDTHS for name in _REDUCTIONS},
    ),
    "tuning": Part("kernels", "tuning", 80, {"size": 32_768, "width": 768}),
    "streaming": Part(
        "streamed",
        "streaming",
        85,
        {"rows": (500_000, 2_000_000), "draws": 10, "negatives": 32_768, "targets": 1_300_000},
    ),
    "ViT-B-32": Part(
        "encoders",
        "encoder",
        60,
        {"model": "ViT-B-32", "batch": 256, "batches": 64},
        {("of_bare_forward",): (0.9,)},
    ),
    "ViT-L-14": Part(
        "encoders",
        "encoder",
        85,
        {"model": "ViT-L-14", "batch": 256, "batches": 64},
        {("pairs_per_second",): (2300,), ("of_bare_forward",): (0.9,)},
    ),
}
"""What is measured on a GPU."""

_LONG = 600  # seconds; on a busy machine the smoke run must not fail
SMOKE = {
    "parity": Part("kernels", "parity", _LONG, {"problems": _RAGGED}),
    "speed": Part("kernels", "speed", _LONG, {"size": 300, "widths": (64, 96)}, FULL["speed"].targets),
    "tuning": Part("kernels", "tuning", _LONG, {"size": 100, "width": 32}),
    "streaming": Part(
        "streamed", "streaming", _LONG, {"rows": (500, 1000), "draws": 2, "negatives": 64, "targets": 64}
    ),
    "ViT-L-14": Part(
        "encoders",
        "encoder",
        _LONG,
        {"model": "tiny", "batch": 4, "batches": 3, "workers": 1},
        FULL["ViT-L-14"].targets,
    ),
}
"""The same code with tiny sizes, on CPU; a tiny model stands for both."""
