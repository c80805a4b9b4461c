"""A Ray cluster of one node on this machine, with token authentication, as a deployment starts it."""

import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def ray_head(folder: Path) -> Iterator[dict[str, str]]:
    """Start a head, yield the environment that connects to it, and stop it.

    Args:
        folder: for Ray's files; its path must be short.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--node-ip-address=127.0.0.1"]
    command += [f"--port={port}", "--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats", "--block"]
    head = subprocess.Popen(
        [*command, f"--temp-dir={folder}"],
        env={**os.environ, **access},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        assert head.stdout is not None
        lines = []
        for line in head.stdout:
            lines.append(line)
            if "Ray runtime started" in line:
                break
        else:
            raise AssertionError("".join(lines))
        yield {"RAY_ADDRESS": f"127.0.0.1:{port}", **access}
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        head.communicate()
