"""Growth of scoring with the rows, which are streamed from a file once for all draws and targets.

    python -m benchmarks.streaming [--rows N ...] [--draws K] [--negatives B] [--targets N] [--json PATH]

Rows, negatives and targets are synthetic. `benchmarks.gpu` calls `measure` for a GPU. Not here: the speed of one score
(`scores`), and the disk: the file is written beforehand, and small ones stay in the page cache.
"""

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.scores import TEMPERATURE, WIDTH, machine
from selection import nearest_target, neg_clip_loss, norm_sim_from_moment, second_moment
from selection.similarity.streaming import resident

ROWS = (25_000, 50_000, 100_000)
CHUNK = 16_384
DRAWS, NEGATIVES, TARGETS = 2, 512, 2048


def measure(
    rows: Sequence[int] = ROWS,
    *,
    draws: int = DRAWS,
    negatives: int = NEGATIVES,
    targets: int = TARGETS,
    device: str = "cpu",
) -> dict[str, Any]:
    """Score files with increasing numbers of rows.

    Args:
        rows: Rows of the files, ascending.
        draws: K.
        negatives: B.
        targets: Number of target images.
        device: Device of the scores.

    Returns:
        The machine, the shapes, and by number of rows: seconds, rows a second, and the peak of memory beyond the
        mapped file in MB; also `time_for_linear`, the rows' growth over the time's (1 where time is linear), and
        `memory_growth_mb`.
    """
    where = torch.device(device)
    sides = [_unit(draws * negatives, seed, where).view(draws, negatives, WIDTH) for seed in (1, 2)]
    target = _unit(targets, 3, where)
    moment = second_moment(target)
    found: dict[str, Any] = {
        "machine": machine() | {"device": str(where)},
        "shapes": {"draws": draws, "negatives": negatives, "targets": targets, "width": WIDTH, "chunk": CHUNK},
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "embeddings"
        _write(path, max(rows), where)
        taken, peaks = [], []
        for count in [min(rows[0], CHUNK), *rows]:  # the first one warms up
            stored = torch.from_file(str(path), shared=False, size=count * 2 * WIDTH, dtype=torch.float16)
            with _peak_of_own_memory() as peak:
                start = time.perf_counter()
                _score_all(stored.view(count, 2, WIDTH), sides, target, moment, where)
                taken.append(time.perf_counter() - start)
            peaks.append(peak[0])
            found[f"seconds_{count}"], found[f"peak_mb_{count}"] = taken[-1], peaks[-1]
            found[f"rows_per_second_{count}"] = count / taken[-1]
    found["time_for_linear"] = (rows[-1] / rows[0]) / (taken[-1] / taken[1])
    found["memory_growth_mb"] = peaks[-1] - peaks[1]
    return found


def _score_all(
    stored: torch.Tensor, sides: list[torch.Tensor], target: torch.Tensor, moment: torch.Tensor, device: torch.device
) -> None:
    read = 0

    def rows(at: slice) -> list[torch.Tensor]:
        nonlocal read
        read += at.stop - at.start
        return [stored[at, 0].contiguous(), stored[at, 1].contiguous()]

    for _, (image, text) in resident(len(stored), CHUNK, device, rows):
        scores = [
            *neg_clip_loss(image, text, *sides, temperature=TEMPERATURE),
            norm_sim_from_moment(image, moment),
            *nearest_target(image, target),
        ]
        for score in scores:
            score.cpu()
    if read != len(stored):
        raise RuntimeError(f"{read} rows were read of {len(stored)}")


def _unit(rows: int, seed: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    drawn = torch.randn(rows, WIDTH, generator=generator, device=device)
    return torch.nn.functional.normalize(drawn, dim=1).half()


def _write(path: Path, rows: int, device: torch.device) -> None:
    with path.open("wb") as file:
        for start in range(0, rows, CHUNK):
            file.write(_unit(2 * min(CHUNK, rows - start), start + 4, device).cpu().numpy().data)


@contextmanager
def _peak_of_own_memory() -> Iterator[list[float]]:
    """Sample the peak of the process's memory beyond mapped files every 5 ms, in MB above the start."""
    before, peak, done = _own_memory(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], _own_memory() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def _own_memory() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def main() -> None:
    """Print the results, and write them to a file with --json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS), metavar="N")
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--negatives", type=int, default=NEGATIVES)
    parser.add_argument("--targets", type=int, default=TARGETS)
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results to this file")
    arguments = parser.parse_args()
    figures = measure(
        arguments.rows,
        draws=arguments.draws,
        negatives=arguments.negatives,
        targets=arguments.targets,
    )
    for name, figure in figures.items():
        print(f"{name:32} {f'{figure:,.2f}' if isinstance(figure, float) else figure}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
