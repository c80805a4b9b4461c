"""The server of `clip-select browse`: what it answers, and what it refuses."""

import io
import json
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator

import numpy as np
import pytest
import uvicorn
from PIL import Image

from dagster_project.browser.app import application
from dagster_project.browser.queries import BrowseError, Query, Table
from tests.support.scenario import ROWS, SHARDS, FinishedPass, Scenario

TOKEN = "a-token-of-the-test"


class Site:
    """A running server, and requests to it with the token's cookie."""

    def __init__(self, server: uvicorn.Server) -> None:
        self.port = server.servers[0].sockets[0].getsockname()[1]

    def get(self, path: str, *, cookie: str = TOKEN, data: bytes | None = None, **headers: str):
        """Return status, headers and body."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers=headers)
        request.add_header("Cookie", f"browse-{self.port}={cookie}")
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read()

    def rows(self, **asked: str):
        """Return the JSON of a part of the grid."""
        asked_for = urllib.parse.urlencode(asked)
        found = json.loads(self.get(f"/api/rows?{asked_for}")[2])
        return found | json.loads(self.get(f"/api/count?{asked_for}")[2]) if found.get("total", 0) is None else found


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_clip, finished_pass: FinishedPass) -> Iterator[Scenario]:
    scenario = Scenario(tmp_path_factory.mktemp("browse"), tiny_clip)
    finished_pass.restore(scenario)
    yield scenario
    scenario.instance.dispose()


@pytest.fixture(scope="module")
def site(project: Scenario) -> Iterator[Site]:
    server = uvicorn.Server(uvicorn.Config(application(project.open(), TOKEN), port=0, log_level="error"))
    started = threading.Event()
    startup = server.startup

    async def announced(*args, **kwargs):
        await startup(*args, **kwargs)
        started.set()

    server.startup = announced
    thread = threading.Thread(target=server.run)
    thread.start()
    assert started.wait(60)
    yield Site(server)
    server.should_exit = True
    thread.join(60)


def test_a_sort_returns_all_rows_in_the_order_of_the_score(site: Site) -> None:
    found = site.rows(sort="clip_score/tiny", show="clip_score/tiny")
    shown = [row["scores"]["clip_score/tiny"] for row in found["rows"]]
    assert found["total"] == ROWS * len(SHARDS)
    assert shown == sorted(shown, reverse=True)


def test_a_filter_and_a_sort_by_different_assets_agree_with_polars(project: Scenario) -> None:
    query = Query(Table(project.open()))
    every = query.to_polars("clip_score/tiny", "neg_clip_loss/tiny")
    middle = every["clip_score/tiny"].median()
    found = query.where(f'"clip_score/tiny" > {middle}').order_by("neg_clip_loss/tiny", descending=False).to_polars()
    wanted = every.filter(every["clip_score/tiny"] > middle).sort("neg_clip_loss/tiny")
    assert found["uid"].to_list() == wanted["uid"].to_list()


@pytest.mark.parametrize("predicate", ["1; DROP TABLE x", "(SELECT 1) = 1", "read_text('/etc/passwd') = ''", "foo > 1"])
def test_only_a_recipes_predicate_is_accepted(site: Site, predicate: str) -> None:
    assert site.get(f"/api/rows?{urllib.parse.urlencode({'where': predicate})}")[0] == 400


def test_a_version_and_the_rows_that_a_step_dropped_are_shown(site: Site, project: Scenario) -> None:
    kept, dropped = site.rows(recipe="paper"), site.rows(recipe="paper", member="dropped", step="1")
    assert {row["uid"] for row in kept["rows"]} == set(project.manifest("paper")["uid"])
    assert dropped["total"] == ROWS * len(SHARDS) // 2


def test_the_nearest_image_of_an_example_is_itself(site: Site) -> None:
    uid = site.rows()["rows"][5]["uid"]
    found = site.rows(like=uid, side="image")
    assert found["rows"][0]["uid"] == uid
    assert found["note"] == "Searched all 36 rows."


def test_a_limit_tried_out_reports_rows_that_leave_and_a_valid_recipe(site: Site) -> None:
    found = json.loads(site.get("/api/trial?recipe=clip_third&limit1=count:5")[2])
    assert (found["rows"], found["current"], found["enter"]["total"], found["leave"]["total"]) == (5, 12, 0, 7)
    assert "count: 5" in found["yaml"]


def test_pages_answer_and_images_are_encoded_again(site: Site) -> None:
    row = site.rows()["rows"][0]
    for path in ("/", "/compare", "/what-if", "/rejects", f"/sample/{row['uid']}"):
        assert site.get(path)[0] == 200, path
    data = site.get(f"/image/{row['shard']}/0")[2]
    assert Image.open(io.BytesIO(data)).format == "JPEG"


def test_tags_are_a_uid_list(site: Site) -> None:
    uids = [row["uid"] for row in site.rows()["rows"][:3]]
    body = urllib.parse.urlencode({"uids": "\n".join(uids), "format": "npy"}).encode()
    found = np.load(io.BytesIO(site.get("/tags", data=body)[2]), allow_pickle=False)
    assert sorted(f"{f0:016x}{f1:016x}" for f0, f1 in found) == sorted(uids)


def test_another_host_another_site_or_no_token_is_refused(site: Site) -> None:
    assert site.get("/", cookie="wrong")[0] == 403
    assert site.get("/?token=wrong", cookie="")[0] == 403
    assert site.get("/", Host="evil.example")[0] == 403
    assert site.get("/", Origin="http://evil.example")[0] == 403


def test_every_answer_has_the_policy(site: Site) -> None:
    for path in ("/", "/static/browse.js", "/nothing", "/api/rows?where=x"):
        assert "default-src 'none'" in site.get(path)[1]["Content-Security-Policy"]


@pytest.mark.parametrize("path", ["/image/..%2F..%2Fetc/0", "/image/00000/999", "/static/..%2fapp.py", "/target/a/b/0"])
def test_no_path_leaves_the_pool(site: Site, path: str) -> None:
    assert site.get(path)[0] == 404


def test_an_unknown_order_names_what_is_known(project: Scenario) -> None:
    with pytest.raises(BrowseError, match="clip_score/tiny"):
        Query(Table(project.open())).order_by("clip_scor/tiny")
