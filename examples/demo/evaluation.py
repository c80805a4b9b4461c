"""The demo's evaluation: `python -m examples.demo.evaluation`, about 25 minutes on two idle cores.

Draws the pool and the held-out pictures as far as they are missing, selects the subsets, trains fifteen small models
and prints what they show. `docs/evaluation.md` has the result. An interrupted run resumes.
"""

from pathlib import Path

from rich.console import Console

from assets.settings import open_project
from dagster_project import console as terminal
from dagster_project.interrupts import Interrupts, run_interruptible
from dagster_project.location import DEMO_CONFIG
from examples.demo.held_out import make_held_out
from examples.demo.pool import SHARDS, make_pool, make_targets

CONFIG = DEMO_CONFIG.parent / "demo-evaluation.yaml"


def main(interrupts: Interrupts) -> int:
    """Run the evaluation and return the exit status."""
    project, console = open_project(CONFIG), Console()
    pool = Path(project.settings.pool.path)
    missing = [number for number in range(SHARDS) if not (pool / f"{number:05d}_stats.json").exists()]
    if missing:
        make_pool(pool, missing)
    if not (pool.parent / "targets").exists():
        make_targets(pool.parent / "targets")
    if not (pool.parent / "held_out" / "pairs.tar").exists():
        make_held_out(pool.parent / "held_out")
    if status := terminal.run(project, console, interrupts=interrupts):
        return status
    return terminal.evaluate(project, "small", console, interrupts=interrupts)


if __name__ == "__main__":
    terminal.leave(run_interruptible(main, "python -m examples.demo.evaluation"))
