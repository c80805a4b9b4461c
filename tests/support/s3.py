"""An S3 server in this process, on 127.0.0.1, with buckets that are empty at first."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "key-of-the-tests", "AWS_SECRET_ACCESS_KEY": "secret-of-the-tests"}
_numbers = itertools.count()


@contextmanager
def s3_server() -> Iterator[str]:
    """Start a server, and yield its address."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def new_bucket(address: str) -> str:
    """Create a bucket, and return its URL."""
    name = f"bucket-{next(_numbers)}"
    make_bucket(address, name)
    return f"s3://{name}"


def make_bucket(address: str, name: str) -> None:
    """Create a bucket of this name."""
    import boto3

    key, secret = CREDENTIALS.values()
    client = boto3.client(
        "s3", endpoint_url=address, aws_access_key_id=key, aws_secret_access_key=secret, region_name="us-east-1"
    )
    client.create_bucket(Bucket=name)


def settings(address: str) -> dict[str, str]:
    """Return the environment variables with which a process reaches the server."""
    return {**CREDENTIALS, "AWS_ENDPOINT_URL": address, "AWS_REGION": "us-east-1"}


@pytest.fixture(scope="session")
def s3_address() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture
def bucket(s3_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Create a bucket of its own; local copies and records go to the test's folder."""
    for name, value in settings(s3_address).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return new_bucket(s3_address)
