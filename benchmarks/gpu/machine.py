"""The machine and the versions that a measurement belongs to."""

import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.scores import machine

PACKAGES = ("torch", "triton", "open_clip_torch", "torchvision", "timm", "pillow", "numpy")


def describe(device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield the machine, the GPU with its driver, the packages' versions and the commit; None for what is not there.

    Raises:
        RuntimeError: there is no CUDA device, and one was asked for.
    """
    yield machine() | {"packages": {name: _version(name) for name in PACKAGES}, "commit": _commit()}
    if device.type != "cuda":
        yield {"gpu": None}
        return
    if not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} sees no CUDA device")
    found = torch.cuda.get_device_properties(device)
    yield {
        "gpu": found.name,
        "capability": f"{found.major}.{found.minor}",
        "memory_gib": found.total_memory / 2**30,
        "multiprocessors": found.multi_processor_count,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "power_limit": _output("nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader", "--id=0"),
        "cuda": torch.version.cuda,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the repository's commit, with + for changes since."""
    folder = str(Path(__file__).resolve().parents[2])
    commit = _output("git", "-C", folder, "rev-parse", "HEAD")
    return commit and commit + ("+" if _output("git", "-C", folder, "status", "--porcelain", "-uno") else "")


def _output(program: str, *arguments: str) -> str | None:
    """Return what a program prints, or None if it is missing or fails."""
    if shutil.which(program) is None:
        return None
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
