"""The web server of reports that `clip-select ui` starts: only files of reports, only to this machine's names."""

import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from assets.subsets.report import reports_address
from resources.lake.files import Lake

START = """
import sys
from pathlib import Path
from dagster_project.instance import start_report_server
from resources.lake.files import Lake
print(start_report_server(Lake(sys.argv[1]), 0), flush=True)
sys.stdin.read()
"""


def status(address: str, host: str | None = None, method: str = "GET") -> int:
    """Return the status of an answer."""
    request = urllib.request.Request(address, headers={"Host": host} if host else {}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_only_files_of_reports_are_served_and_the_server_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    subsets = tmp_path / "subset"
    report = subsets / "paper" / "v0001" / "report"
    (report / "images").mkdir(parents=True)
    (report / "index.html").write_text("page")
    (report / ".hidden").write_text("no")
    (report / "images" / "a.jpg").write_bytes(b"x")
    (report.parent / "lineage.json").write_text("{}")
    (tmp_path / "secret").write_text("no")
    (report / "link").symlink_to(tmp_path / "secret")
    command = [sys.executable, "-c", START, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        base = f"{address}/paper/v0001"
        assert [status(f"{base}/report/{name}") for name in ("index.html", "images/a.jpg")] == [200, 200]
        for name in (
            "",
            "images",
            "images/",
            ".hidden",
            "link",
            "gone",
            "../lineage.json",
            "%2e%2e/lineage.json",
            "%00",
        ):
            assert status(f"{base}/report/{name}") == 404, name
        for path in ("", "/paper", "/paper/v0001/lineage.json", "/%2e%2e/v0001/report/index.html", "//secret"):
            assert status(f"{address}{path}") == 404, path
        server = address.rpartition("/")[0]
        for another in ("", "/00000000"):  # of another lake, whose recipe may have the same name
            assert status(f"{server}{another}/paper/v0001/report/index.html") == 404
        assert address == reports_address(Lake(str(tmp_path)), int(server.rpartition(":")[2]))
        assert status(f"{base}/report/index.html", host="evil.example") == 400
        assert status(f"{base}/report/index.html", method="POST") == 405
        process.communicate()
    deadline = time.monotonic() + 60
    while answers(address):
        assert time.monotonic() < deadline


def answers(address: str) -> bool:
    """Check whether a server still answers."""
    try:
        status(address)
    except OSError:
        return False
    return True
