"""Measure everything in one run and print it: `make bench`.

python -m benchmarks [--json PATH]
"""

import argparse
import json
from pathlib import Path

from benchmarks import overhead, reading, scores


def main() -> None:
    """Run the benchmarks; print, and write where asked, what came out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures there")
    arguments = parser.parse_args()
    found = {
        "scores": scores.measure(),
        "reading": reading.measure(embedding=True),
        "framework": overhead.measure(),
    }
    for part, figures in found.items():
        print(part)
        for name, figure in figures.items():
            shown = f"{figure:,.3f}" if isinstance(figure, float) else figure
            print(f"  {name:46} {shown}")
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
