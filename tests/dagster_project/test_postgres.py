"""Dagster's records in PostgreSQL, with the configuration that `docs/operations.md` shows, on a real server."""

import os
import pwd
import re
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import dagster as dg
import pytest

from assets.base.events import DATA_VERSION_TAG
from assets.base.keys import SHARDS_NAME, asset_key
from dagster_project import cli
from dagster_project.definitions import build_defs
from dagster_project.instance import SETTINGS, open_instance
from resources.lake.files import LakeError
from tests.support.history import age_runs, stale
from tests.support.scenario import SHARDS, Scenario

PAGE = Path(__file__).resolve().parents[2] / "docs" / "operations.md"


class Server:
    """A PostgreSQL server of its own, on 127.0.0.1; it refuses to run as root, so root starts it as another user.

    Args:
        folder: empty; the other user must be able to reach it.
    """

    def __init__(self, folder: Path) -> None:
        self.programs = find_programs()
        self.folder = folder
        self.owner: dict[str, object] = {}
        if os.geteuid() == 0:
            try:
                user = pwd.getpwnam("postgres")
            except KeyError:
                user = pwd.getpwnam("nobody")
            os.chown(folder, user.pw_uid, user.pw_gid)
            self.owner = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.password = secrets.token_hex(8)

    def run(self, program: str, *arguments: str) -> None:
        """Run one of PostgreSQL's programs."""
        log = self.folder / "output.txt"  # a pipe would stay open in the server
        with open(log, "a") as output:
            done = subprocess.run(
                [self.programs / program, *arguments],
                cwd=self.folder,
                stdout=output,
                stderr=output,
                check=False,
                **self.owner,  # type: ignore[call-overload]
            )
        assert done.returncode == 0, log.read_text()

    def start(self) -> None:
        """Create the database and wait until it answers."""
        secret = self.folder / "password"
        secret.write_text(self.password)
        secret.chmod(0o644)
        data = str(self.folder / "data")
        self.run(
            "initdb", "-D", data, "-U", "dagster", "-A", "scram-sha-256", "--pwfile", str(secret), "-E", "UTF8", "-N"
        )
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -k {self.folder} -c fsync=off -c shared_buffers=16MB"
        self.run("pg_ctl", "-D", data, "-o", options, "-w", "start")

    def stop(self) -> None:
        """Stop the server."""
        self.run("pg_ctl", "-D", str(self.folder / "data"), "-m", "immediate", "-w", "stop")


def find_programs() -> Path:
    """Return the folder of PostgreSQL's programs; skip where there is none."""
    pytest.importorskip("dagster_postgres", reason="dagster-postgres is not installed (the extra `postgres`)")
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    found = shutil.which("initdb", path=os.pathsep.join([os.environ["PATH"], *map(str, folders)]))
    if found is None:
        pytest.skip("no PostgreSQL is installed: `initdb` is neither on PATH nor in /usr/lib/postgresql/*/bin")
    return Path(found).resolve().parent


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DAGSTER_HOME with the project's dagster.yaml with the page's block in the place of its event log."""
    (block,) = re.findall(r"```yaml\n(storage:\n.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    section = r"event_log_storage:\n(?:  .*\n)+"
    ours, replaced = re.subn(section, block, SETTINGS.read_text(encoding="utf-8"))
    assert replaced == 1
    home = tmp_path / "home"
    home.mkdir()
    (home / "dagster.yaml").write_text(ours, encoding="utf-8")
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    return home


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Yield a running server, with the page's environment variables set."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        server.start()
        for name, value in (("HOST", "127.0.0.1"), ("PORT", server.port), ("PASSWORD", server.password)):
            monkeypatch.setenv(f"DAGSTER_PG_{name}", str(value))
        monkeypatch.setenv("DAGSTER_PG_USER", "dagster")
        monkeypatch.setenv("DAGSTER_PG_DB", "postgres")
        try:
            yield server
        finally:
            server.stop()


@pytest.mark.slow
@pytest.mark.usefixtures("server")
def test_the_page_s_configuration_keeps_all_of_dagsters_records_in_postgresql(
    scenario: Scenario, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = scenario.folder / "project.yaml"
    project, graph = scenario.open_graph()
    assert cli.main(["run", str(config)]) == 0
    assert not list(home.rglob("*.db"))

    with dg.DagsterInstance.from_config(str(home)) as instance:
        modules = {type(s).__module__.split(".")[0] for s in (instance.run_storage, instance.event_log_storage)}
        assert modules == {"dagster_postgres"}
        assert instance.get_dynamic_partitions(SHARDS_NAME) == list(SHARDS)
        runs = instance.get_runs()
        assert len(runs) == len(graph.nodes) + len(graph.subsets) + 1
        assert {run.status for run in runs} == {dg.DagsterRunStatus.SUCCESS}

        key = asset_key("neg_clip_loss/tiny")
        versions = instance.event_log_storage.get_latest_tags_by_partition(
            key, dg.DagsterEventType.ASSET_MATERIALIZATION, [DATA_VERSION_TAG]
        )
        stored = {shard: project.lake.stored("neg_clip_loss/tiny", shard) for shard in SHARDS}
        assert {shard: tags[DATA_VERSION_TAG] for shard, tags in versions.items()} == {
            shard: file.fingerprint for shard, file in stored.items() if file is not None
        }

        check = dg.AssetCheckKey(key, "within_bounds")
        history = instance.event_log_storage.get_asset_check_execution_history(check, limit=10)
        told = [record.event.dagster_event.asset_check_evaluation_data for record in history]  # type: ignore[union-attr]
        assert sorted((result.partition, result.passed) for result in told) == [(shard, True) for shard in SHARDS]

        scenario.write_shard("00003")
        context = dg.build_sensor_context(instance=instance, definitions=build_defs(project, graph))
        tick = build_defs(project, graph).resolve_sensor_def("discover_shards").evaluate_tick(context)
        (request,) = tick.dynamic_partitions_requests or []
        assert request.partition_keys == ["00003"]

    (scenario.folder / "pool" / "00003.tar").unlink()
    capsys.readouterr()
    assert cli.main(["run", str(config)]) == 0
    assert "nothing was computed" in capsys.readouterr().out
    with dg.DagsterInstance.from_config(str(home)) as instance:
        assert len(instance.get_runs()) == len(runs)
        scenario.instance = instance
        assert scenario.execute("subset/paper", "catalog").success
        age_runs(instance, timedelta(days=31))
        capsys.readouterr()
        assert cli.main(["prune", str(config), "--runs-older-than", "30d"]) == 0
        assert "runs: deleted: 2; " in capsys.readouterr().out  # the pass's, of these two assets
        assert len(instance.get_runs()) == len(runs) - 1
        assert not any(stale(scenario).values())


@pytest.mark.usefixtures("home")
def test_settings_that_dagster_can_not_open_are_named_in_one_message(
    scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("dagster_postgres", reason="dagster-postgres is not installed (the extra `postgres`)")
    project = scenario.open()
    monkeypatch.delenv("DAGSTER_PG_HOST", raising=False)
    with (
        pytest.raises(LakeError, match=r"dagster\.yaml: Dagster can't open .*DAGSTER_PG_.* not set.*\. Remedy"),
        open_instance(project),
    ):
        pass
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        values = {"HOST": "127.0.0.1", "PORT": str(nobody.getsockname()[1]), "USER": "u", "PASSWORD": "p", "DB": "d"}
        for name, value in values.items():
            monkeypatch.setenv(f"DAGSTER_PG_{name}", value)
        with pytest.raises(LakeError, match=r"refused.* start the database"), open_instance(project):
            pass
