"""Speed of the scores on CPU relative to a bare matrix product of the same shapes, and their memory.

    python -m benchmarks.scores [--whole] [--json PATH]

Each call of a score follows a call of the product by the fastest library, and the median of their ratios is reported,
so that other work on the machine slows both alike. Not here: GPUs (`benchmarks.gpu`).
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
    neg_clip_loss_in_batches,
    norm_sim_from_moment,
    second_moment,
)
from selection.similarity.reduction import PowerSum, Tiles, for_each_tile

WIDTH = 768
BATCH = 32768
ROWS = 960 * torch.get_num_threads()  # of each timed call
MEMORY_ROWS = 4800
REPEATS = 3
PLAIN = 16384  # rows and columns of the plain way in the short form
TEMPERATURE = 0.01


def measure(repeats: int = REPEATS, plain: int = PLAIN) -> dict[str, Any]:
    """Time the scores on CPU and find their peak memory.

    Args:
        repeats: Number of timed pairs of a product and a score.
        plain: Rows and columns of the similarities that the plain method holds as a whole.

    Returns:
        The machine, the shapes, and one result each by name. Fractions are the product's time over the score's; those
        of bfloat16 are float32's time over its own; those of the plain method are its time or memory over ours.
    """
    image, text = _embeddings(ROWS, seed=1), _embeddings(ROWS, seed=2)
    batch_image, batch_text = _embeddings(BATCH, seed=3), _embeddings(BATCH, seed=4)
    draw = batch_image.half()[None], batch_text.half()[None]
    wide_draw = batch_image[None], batch_text[None]
    half_image, half_text = image.half(), text.half()
    moment = second_moment(batch_image)
    many = half_image.repeat(10, 1)

    def loss(**settings: Any) -> Callable[[], Any]:
        return lambda: neg_clip_loss(half_image, half_text, *draw, temperature=TEMPERATURE, **settings)

    def nearest(**settings: Any) -> Callable[[], Any]:
        return lambda: nearest_target(half_image, draw[0][0], **settings)

    seconds, bare = best_product((image, batch_text), (text, batch_image), repeats=repeats)
    library = min(seconds, key=seconds.__getitem__)
    loss_seconds, loss_ratio = _beside(bare, loss(), repeats)
    _, wide_ratio = _beside(bare, lambda: neg_clip_loss(image, text, *wide_draw, temperature=TEMPERATURE), repeats)
    nearest_seconds, nearest_ratio = _beside(bare, nearest(), repeats)
    by_moment, _ = _beside(bare, lambda: norm_sim_from_moment(many, moment), 1)
    by_force, _ = _beside(bare, lambda: _brute_force(half_image, draw[0][0]), 1)
    found: dict[str, Any] = {
        "machine": machine(),
        "shapes": {"rows": ROWS, "batch": BATCH, "targets": BATCH, "width": WIDTH, "draws": 1, "plain": plain},
        "product_gflops": {name: 4 * ROWS * BATCH * WIDTH / taken / 1e9 for name, taken in seconds.items()},
        "best_product": library,
        "neg_clip_loss_of_product": loss_ratio,
        "neg_clip_loss_float32_of_product": wide_ratio,
        "neg_clip_loss_rows_per_second": ROWS / loss_seconds,
        "norm_sim_inf_of_product": nearest_ratio / 2,
        "norm_sim_inf_rows_per_second": ROWS / nearest_seconds,
        "norm_sim_2_rows_per_second": len(many) / by_moment,
        "norm_sim_2_brute_force_rows_per_second": ROWS / by_force,
    }
    if has_bfloat16():
        found["neg_clip_loss_bfloat16_of_float32"] = _beside(loss(), loss(arithmetic="bfloat16"), repeats)[1]
        found["norm_sim_inf_bfloat16_of_float32"] = _beside(nearest(), nearest(arithmetic="bfloat16"), repeats)[1]
    both = _embeddings(plain, seed=5).half(), _embeddings(plain, seed=6).half()
    found["plain_of_time"] = _beside(lambda: _plain(*both), lambda: _in_one_batch(*both), 2)[1]
    ours, whole = _peak_of("in_one_batch", plain), _peak_of("plain", plain)
    found |= {"plain_of_memory": whole / ours, "plain_peak_mb": whole, "in_one_batch_peak_mb": ours}
    return found | {
        f"{score}_peak_mb": _peak_of(score, plain) for score in ("neg_clip_loss", "norm_sim_inf", "norm_sim_2")
    }


def has_bfloat16() -> bool:
    """Return whether the CPU has instructions for products of bfloat16."""
    flags = Path("/proc/cpuinfo")
    return flags.exists() and any(flag in flags.read_text() for flag in ("avx512_bf16", "amx_bf16", " bf16 "))


def _beside(first: Callable[[], Any], second: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Return the median seconds of the second task, and the median of the first one's seconds over the second's."""
    first()
    second()
    pairs = [(_seconds(first), _seconds(second)) for _ in range(repeats)]
    return median(own for _, own in pairs), median(other / own for other, own in pairs)


def _seconds(task: Callable[[], Any]) -> float:
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


def best_product(
    *operands: tuple[torch.Tensor, torch.Tensor], repeats: int
) -> tuple[dict[str, float], Callable[[], Any]]:
    """Time the product rows · columnsᵀ of each pair of operands by each library.

    Returns:
        The median seconds of all pairs by library, and the fastest library's products as a task.
    """
    tasks: dict[str, Callable[[], Any]] = {
        "torch.mm": lambda: [rows @ columns.T for rows, columns in operands],
        "numpy": lambda: [rows.numpy() @ columns.numpy().T for rows, columns in operands],
    }
    if torch.backends.mkldnn.is_available():
        by_onednn = torch.ops.mkldnn._linear_pointwise
        tasks["oneDNN"] = lambda: [by_onednn(rows, columns, None, "none", [], "") for rows, columns in operands]
    taken: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(repeats + 1):  # the first one warms up
        for name, task in tasks.items():
            taken[name].append(_seconds(task))
    seconds = {name: median(of_task[1:]) for name, of_task in taken.items()}
    return seconds, tasks[min(seconds, key=seconds.__getitem__)]


def _plain(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Compute negCLIPLoss of all rows as one batch: the whole matrix, its exponentials in place, and their sums."""
    s = image.float() @ text.float().T
    own = s.diag().clone()
    terms = s.div_(TEMPERATURE).exp_()
    return own - TEMPERATURE / 2 * (terms.sum(1).log() + terms.sum(0).log())


def _in_one_batch(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    return neg_clip_loss_in_batches(image, text, temperature=TEMPERATURE, batch_size=len(image), draws=1, seed=0)


def machine() -> dict[str, Any]:
    """Return the machine and the versions of the libraries."""
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
    """Compute NormSim_2 from all similarities, without the second moment."""

    def task(tiles: Tiles, at: slice) -> None:
        total = PowerSum(tiles.height, 2, image.device)
        for _, similarities in tiles.similarities(tiles.rows(image, at), target):
            total.update(similarities)

    for_each_tile(len(image), image, task)


def _peak_of(score: str, plain: int) -> float:
    """Return the peak memory beyond inputs in MB, outputs included, in a separate process."""
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.scores", "--peak-of", score, "--plain", str(plain)],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    return float(child.stdout)


def _measure_peak(score: str, plain: int) -> float:
    # Filled in place: random inputs would leave a peak of their own behind.
    rows = plain if score in ("plain", "in_one_batch") else MEMORY_ROWS
    image = torch.full((rows, WIDTH), 1 / math.sqrt(WIDTH), dtype=torch.float16)
    batch = torch.full((1, BATCH, WIDTH), 1 / math.sqrt(WIDTH), dtype=torch.float16)
    before = _memory("VmRSS")
    if score == "plain":
        _plain(image, image)
    elif score == "in_one_batch":
        _in_one_batch(image, image)
    elif score == "neg_clip_loss":
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
    """Print the results, and write them to a file with --json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results to this file")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="timed pairs (default: %(default)s)")
    parser.add_argument(
        "--whole", action="store_true", help=f"the plain method at {BATCH} x {BATCH}: needs 6 GB, takes minutes"
    )
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--plain", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        print(_measure_peak(arguments.peak_of, arguments.plain))
        return
    figures = measure(arguments.repeats, BATCH if arguments.whole else PLAIN)
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
