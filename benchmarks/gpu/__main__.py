"""Measure on a GPU, and write one JSON file: parity, speed and block sizes of the kernels, streaming, and encoders.

    python -m benchmarks.gpu [--json PATH] [--only PART ...] [--smoke]

Needs the repository, torch, triton and open_clip: no other package, no network and no data. Takes eight minutes at
most, because each part runs in a process of its own with a time limit. The file is written anew with every result, so
that an interrupted run leaves what it had. Exits with 1 if a part failed, and with 2 if nothing can be measured.

`--smoke` runs the same code on CPU with tiny sizes, the kernels in Triton's interpreter. Its numbers mean nothing.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

from benchmarks.gpu.parts import FULL, SMOKE
from benchmarks.gpu.report import NoDeviceError, Report, measure, print_targets


def main() -> int:
    """Run the parts and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--json", type=Path, default=Path("gpu.json"), metavar="PATH", help="the file to write (default: %(default)s)"
    )
    parser.add_argument("--only", nargs="+", choices=FULL, default=FULL, metavar="PART", help=", ".join(FULL))
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on CPU, to check that the benchmark works")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # ends the part's process, too
    device, parts = ("cpu", SMOKE) if arguments.smoke else ("cuda", FULL)
    if arguments.smoke:
        os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # read on import
    try:
        report = Report(arguments.json, smoke=arguments.smoke)
        measure(report, device, {name: part for name, part in parts.items() if name in arguments.only})
    except NoDeviceError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{arguments.json}: {error.strerror}. Remedy: name another file by --json", file=sys.stderr)
        return 2
    print_targets(report)
    print(f"Written: {arguments.json}")
    return 1 if report.failed() else 0


if __name__ == "__main__":
    sys.exit(main())
