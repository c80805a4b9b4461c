"""Measure everything in its short form, print it, and compare the ratios with the bars: `make bench`.

python -m benchmarks [--only PART ...] [--enforce] [--json PATH]
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import discovery, engines, growth, overhead, reading, scores, selecting
from benchmarks.bars import Compared, compare, read_bars, still_broken


def _scores() -> dict[str, Any]:
    return {"neg_clip_loss_bfloat16_of_float32": None, "norm_sim_inf_bfloat16_of_float32": None} | scores.measure()


def _selecting() -> dict[str, Any]:
    found = selecting.measure()
    return found | {"by_hand_of_time": 1 / found["time_of_by_hand"]}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "scores": _scores,
    "reading": lambda: reading.measure(embedding=True),
    "selecting": _selecting,
    "framework": overhead.measure,
    "discovery": lambda: discovery.measure(1_000),
    "growth": growth.measure,
    "engines": engines.measure,
}


def main() -> int:
    """Run the benchmarks, print the results, and write them to a file if asked.

    Returns:
        The exit code of the process: 1 if bars are enforced and one is broken in three runs.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument(
        "--enforce", action="store_true", help="repeat broken measurements, and fail if they stay broken"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results to this file")
    arguments = parser.parse_args()
    capability = torch.backends.cpu.get_cpu_capability()
    bars = read_bars(capability)
    found: dict[str, Mapping[str, Any]] = {}
    compared: list[Compared] = []
    broken: list[Compared] = []
    for part in arguments.only:
        found[part] = _measured(part)
        compared += compare(bars.get(part, {}), part, found[part])
        if arguments.enforce:
            broken += still_broken(bars.get(part, {}), part, found[part], partial(_measured, part))
    print(f"bars of a CPU with {capability}")
    print(_table(compared))
    for one in broken:
        print(f"{one.part}: {one.name} was more than a third below its bar in three runs of three")
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if broken else 0


def _measured(part: str) -> dict[str, Any]:
    """Run one benchmark and print its results."""
    gc.collect()  # memory that earlier parts left is not this part's
    started = time.perf_counter()
    results = PARTS[part]()
    print(f"{part} ({time.perf_counter() - started:.0f} s)")
    for name, value in results.items():
        shown = f"{value:,.3f}" if isinstance(value, float) else value
        print(f"  {name:46} {shown}", flush=True)
    return results


def _table(compared: Sequence[Compared]) -> str:
    lines = [f"{'ratio':58} {'measured':>9} {'bar':>7}"]
    lines += [f"{f'{one.part}: {one.name}':58} {one.ratio:9.2f} {one.bar:7.2f}  {one.mark}" for one in compared]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
