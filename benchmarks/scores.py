"""How fast the scores run beside a bare matrix product of the same shapes, and how much memory they take.

    python -m benchmarks.scores [--json PATH]

Each call of a score follows a call of the product, and the median of their ratios is told, so that other work on
the machine slows both alike.
"""

import argparse
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from selection import (
    nearest_target,
    neg_clip_loss,
    norm_sim_from_moment,
    second_moment,
)
from selection.reduction import PowerSum, Tiles, for_each_tile

WIDTH = 768
BATCH = 32768
ROWS = 1920  # of each timed call
MEMORY_ROWS = 4800
REPEATS = 5


def measure(repeats: int = REPEATS) -> dict[str, Any]:
    """Time the scores and find their peak memory.

    Args:
        repeats: pairs of a product and a score that are timed.

    Returns:
        The machine, the shapes, and one figure each by name; fractions are the product's time over the score's.
    """
    image, text = _embeddings(ROWS, seed=1), _embeddings(ROWS, seed=2)
    batch_image, batch_text = _embeddings(BATCH, seed=3), _embeddings(BATCH, seed=4)
    draw = batch_image.half()[None], batch_text.half()[None]
    wide_draw = batch_image[None], batch_text[None]
    half_image, half_text = image.half(), text.half()
    products = torch.empty(ROWS, BATCH)
    moment = second_moment(batch_image)
    many = half_image.repeat(10, 1)

    def two_products() -> None:
        torch.mm(image, batch_text.T, out=products)
        torch.mm(text, batch_image.T, out=products)

    def seconds(task: Callable[[], Any]) -> float:
        start = time.perf_counter()
        task()
        return time.perf_counter() - start

    def compare(task: Callable[[], Any]) -> tuple[float, float]:
        """Median seconds of the task, and median of the two products' seconds over the task's."""
        task()
        pairs = [(seconds(two_products), seconds(task)) for _ in range(repeats)]
        product_seconds.extend(product for product, _ in pairs)
        return median(own for _, own in pairs), median(product / own for product, own in pairs)

    product_seconds: list[float] = []
    two_products()
    loss, loss_ratio = compare(lambda: neg_clip_loss(half_image, half_text, *draw, temperature=0.01))
    _, wide_ratio = compare(lambda: neg_clip_loss(image, text, *wide_draw, temperature=0.01))
    nearest, nearest_ratio = compare(lambda: nearest_target(half_image, draw[0][0]))
    by_moment, _ = compare(lambda: norm_sim_from_moment(many, moment))
    by_force, _ = compare(lambda: _brute_force(half_image, draw[0][0]))
    return {
        "machine": machine(),
        "shapes": {"rows": ROWS, "batch": BATCH, "targets": BATCH, "width": WIDTH, "draws": 1},
        "product_gflops": 4 * ROWS * BATCH * WIDTH / median(product_seconds) / 1e9,
        "neg_clip_loss_of_product": loss_ratio,
        "neg_clip_loss_float32_of_product": wide_ratio,
        "neg_clip_loss_rows_per_second": ROWS / loss,
        "norm_sim_inf_of_product": nearest_ratio / 2,
        "norm_sim_inf_rows_per_second": ROWS / nearest,
        "norm_sim_2_rows_per_second": len(many) / by_moment,
        "norm_sim_2_brute_force_rows_per_second": ROWS / by_force,
        "neg_clip_loss_peak_mb": _peak_of("neg_clip_loss"),
        "norm_sim_inf_peak_mb": _peak_of("norm_sim_inf"),
        "norm_sim_2_peak_mb": _peak_of("norm_sim_2"),
    }


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return {
        "cpu": model,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _embeddings(rows: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, WIDTH, generator=generator), dim=1)


def _brute_force(image: torch.Tensor, target: torch.Tensor) -> None:
    """NormSim_2 from all similarities, as if there were no second moment."""

    def task(tiles: Tiles, at: slice) -> None:
        total = PowerSum(tiles.height, 2, image.device)
        for _, similarities in tiles.similarities(tiles.rows(image, at), target):
            total.update(similarities)

    for_each_tile(len(image), image, task)


def _peak_of(score: str) -> float:
    """Peak memory beyond inputs in MB, outputs included, in a process of its own."""
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.scores", "--peak-of", score],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    return float(child.stdout)


def _measure_peak(score: str) -> float:
    # Filled in place: random inputs would leave a peak of their own behind.
    image = torch.full((MEMORY_ROWS, WIDTH), 1 / math.sqrt(WIDTH), dtype=torch.float16)
    batch = torch.full((1, BATCH, WIDTH), 1 / math.sqrt(WIDTH), dtype=torch.float16)
    before = _memory("VmRSS")
    if score == "neg_clip_loss":
        neg_clip_loss(image, image, batch, batch, temperature=0.01)
    elif score == "norm_sim_inf":
        nearest_target(image, batch[0])
    else:
        norm_sim_from_moment(image, second_moment(batch[0]))
    return _memory("VmHWM") - before


def _memory(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def main() -> None:
    """Print the figures, and write them where --json says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures there")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="timed pairs (default: %(default)s)")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        print(_measure_peak(arguments.peak_of))
        return
    figures = measure(arguments.repeats)
    for name, figure in figures.items():
        shown = f"{figure:,.3f}" if isinstance(figure, float) and figure < 10 else figure
        shown = f"{figure:,.0f}" if isinstance(figure, float) and figure >= 10 else shown
        if isinstance(figure, dict):
            shown = ", ".join(f"{key} {value}" for key, value in figure.items())
        print(f"{name:42} {shown}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
