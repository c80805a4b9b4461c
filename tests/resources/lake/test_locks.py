"""Locks in an object store."""

import json
import threading
import time

import pytest

from resources.lake.files import LakeError
from resources.lake.locks import held_lock
from resources.lake.owners import token
from resources.storage.by_location import open_store


def test_a_lock_is_held_by_one_and_free_afterwards(bucket: str) -> None:
    store, location = open_store(bucket), f"{bucket}/lake/.pass.lock"
    with (
        held_lock(store, location),
        pytest.raises(LakeError, match=r"\.pass\.lock: another `clip-select`"),
        held_lock(store, location),
    ):
        pass
    assert store.stat(location) is None
    with held_lock(store, location):
        pass


def test_an_expired_lock_is_taken_over_and_stays_with_its_new_owner(bucket: str) -> None:
    store, location = open_store(bucket), f"{bucket}/lake/.pass.lock"
    for expires, free in ((time.time() + 1000, False), (time.time() - 1, True)):
        store.delete(location)
        assert store.put_if_absent(location, json.dumps({"owner": "elsewhere-1-a", "expires": expires}).encode())
        if free:
            with held_lock(store, location):
                assert json.loads(store.read(location))["owner"] != "elsewhere-1-a"
        else:
            with pytest.raises(LakeError, match="elsewhere-1-a"), held_lock(store, location):
                pass


def test_a_lock_is_renewed_while_it_is_held(bucket: str) -> None:
    store, location = open_store(bucket), f"{bucket}/lake/.pass.lock"
    renewed = threading.Event()
    with held_lock(store, location, renewed_every=0.01):
        first = json.loads(store.read(location))["expires"]
        while not renewed.is_set():
            if json.loads(store.read(location))["expires"] > first:
                renewed.set()


def test_the_lock_of_a_process_of_this_machine_that_ended_is_free(bucket: str) -> None:
    store, location = open_store(bucket), f"{bucket}/lake/.pass.lock"
    place, _, rest = token().split("-")
    dead = f"{place}-4194303-{rest}"  # above every process id that Linux gives by default
    assert store.put_if_absent(location, json.dumps({"owner": dead, "expires": time.time() + 1000}).encode())
    with held_lock(store, location):
        assert json.loads(store.read(location))["owner"] != dead
