"""What the server of `clip-select browse` refuses, and that hostile captions, keys and URLs stay inert."""

import html
import io
import json
import os
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from PIL.ExifTags import Base

from dagster_project.browser.token import TokenError, stored_token
from tests.support.browse_site import TOKEN, Site, open_site
from tests.support.pool_factory import picture, sample, uid, write_shard
from tests.support.scenario import Scenario

SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(2)> {{ 7*7 }} ' OR 1=1 --"
TURNED = "safe \u202e gpj.exe \u2066 \u0000x"
LINK = 'javascript:alert(3)//"><script>alert(4)</script>'
HUGE = "word " * 200_000
CAPTIONS = [SCRIPT, TURNED.replace("\u0000", ""), HUGE, "=cmd|' /C calc'!A0"]


def with_comment() -> bytes:
    """Return a JPEG whose EXIF data and trailing bytes hold markup."""
    exif = Image.Exif()
    exif[Base.ImageDescription] = "<script>alert(5)</script>"
    out = io.BytesIO()
    Image.open(io.BytesIO(picture(3))).save(out, "JPEG", exif=exif)
    return out.getvalue() + b"<script>alert(6)</script>"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, tiny_clip) -> Iterator[Site]:
    """Serve a pool of hostile samples of which only `raw_pool` is computed."""
    scenario = Scenario(tmp_path_factory.mktemp("hostile"), tiny_clip)
    samples = [
        sample(
            number,
            key=f"{number}'><b>key",
            text=text.encode(),
            image=with_comment(),
            meta={"uid": uid("hostile", number), "caption": text, "url": LINK},
        )
        for number, text in enumerate(CAPTIONS)
    ]
    samples.append(sample(90, key="90<i>", image=b"not an image", meta={"uid": uid("hostile", 90), "url": LINK}))
    write_shard(scenario.folder / "pool", samples, "00000")
    assert scenario.execute("raw_pool", shard="00000").success
    with open_site(scenario.open()) as opened:
        yield opened
    scenario.instance.dispose()


def test_another_host_another_site_or_no_token_is_refused(site: Site) -> None:
    for host in ("evil.example", f"evil.example:{site.port}", "127.0.0.1", f"127.0.0.1:{site.port}.evil.example"):
        assert site.get("/", Host=host)[0] == 403, host
    assert site.get("/", Origin="http://evil.example")[0] == 403
    assert site.get("/", Origin="null")[0] == 403
    for path in ("/", "/api/rows", "/image/00000/0", "/static/browse.js", f"/sample/{uid('hostile', 0)}", "/nothing"):
        assert site.get(path, cookie="")[0] == 403, path
        assert site.get(f"{path}?token=wrong", cookie="wrong")[0] == 403, path
    assert site.get("/tags", cookie="", data=b"uids=&format=txt")[0] == 403
    assert site.get("/", data=b"x")[0] == 405


def test_a_link_without_the_token_asks_for_it_and_then_opens_the_page(site: Site) -> None:
    status, _, page = site.get("/?where=%3Cb%3E&recipe=x", cookie="", Accept="text/html")
    assert status == 403
    assert '<input type="hidden" name="where" value="&lt;b&gt;">' in page.decode()
    assert TOKEN not in page.decode()
    given = urllib.parse.urlencode({"token": TOKEN, "shard": "00000"})
    assert site.get(f"/api/rows?{given}", cookie="")[0] == 403, "the redirect carries no token any more"


def test_the_token_leaves_the_address_for_a_cookie_that_scripts_cannot_read(site: Site) -> None:
    import http.client

    for path in ("/rejects", "//evil.example/"):
        connection = http.client.HTTPConnection("127.0.0.1", site.port)
        connection.request("GET", f"{path}?shard=00000&token={TOKEN}")
        answer = connection.getresponse()
        assert answer.status == 303
        assert answer.headers["Location"] == f"/{path.lstrip('/')}?shard=00000"
        cookie = answer.headers["Set-Cookie"].lower()
        assert "httponly" in cookie
        assert "samesite=lax" in cookie
        connection.close()


def test_every_answer_has_the_policy(site: Site) -> None:
    for path in ("/", "/static/browse.js", "/nothing", "/api/rows?where=x", "/image/00000/0"):
        for cookie in (TOKEN, ""):
            headers = site.get(path, cookie=cookie)[1]
            policy = headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert headers["X-Content-Type-Options"] == "nosniff"


PATHS = [
    "/image/..%2F..%2Fetc/0",
    "/image/00000/999",
    "/image/00000/-1",
    "/image/%00/0",
    "/static/..%2fapp.py",
    "/static/%2e%2e/app.py",
    "/static/../../app.py",
    "/target/a/b/0",
    "/target/..%2F../x/0",
]


@pytest.mark.parametrize("path", PATHS)
def test_no_path_leaves_the_pool(site: Site, path: str) -> None:
    assert site.get(path)[0] == 404


PREDICATES = """
true) OR (SELECT count(*) FROM read_csv('/etc/passwd')) > 0 --
true; ATTACH '/tmp/x.db'
getenv('HOME') = ''
caption IN (SELECT 1)
glob('/etc/*') IS NOT NULL
true) UNION SELECT 1, 2 --
/* x
"/etc/passwd" = ''
filename = ''
f0 > 0 AND pg_sleep(9)
""".strip().split("\n")


@pytest.mark.parametrize("where", [*PREDICATES, "\0"])
def test_no_sql_beyond_a_predicate_is_run(site: Site, where: str) -> None:
    for path in ("/api/rows", "/api/count"):
        status, _, body = site.get(f"{path}?{urllib.parse.urlencode({'where': where})}")
        assert status == 400
        assert json.loads(body)["error"]


ASKED = [
    "sort=x;+DROP",
    "sort=the+row",
    "shard=../x",
    "shard=0';+--",
    "offset=-1",
    "offset=9999999999999999999999999999",
    "sort=random&seed=1)",
    "recipe=../x",
    "recipe=paper&version=../../x",
    "recipe=paper&member=x",
    "like='+OR+1",
    "rejected=a&where=1",
]


@pytest.mark.parametrize("asked", ASKED)
def test_names_and_numbers_are_checked(site: Site, asked: str) -> None:
    status, _, body = site.get(f"/api/rows?{asked}")
    assert (status, bool(json.loads(body)["error"])) == (400, True)


def test_hostile_text_is_text(site: Site) -> None:
    page = site.text(f"/sample/{uid('hostile', 0)}")
    assert html.escape(SCRIPT, quote=False).replace("'", "&#39;") in page
    assert "<script>alert" not in page
    assert "onerror=alert(2)>" not in page
    assert "49" not in page.partition("Scores")[0], "a template in a caption is not run"
    assert 'href="javascript:' not in page
    assert "<b>key" not in page
    rejects = site.text("/rejects")
    assert "<i>" not in rejects
    assert "90&lt;i&gt;" in rejects
    for name in ("grid", "rejects"):
        assert "javascript:" not in site.text("/" if name == "grid" else "/rejects")
    kind = site.get("/api/rows")[1]["Content-Type"]
    assert kind == "application/json"


def test_a_huge_caption_is_cut_on_a_tile_and_readable_on_its_page(site: Site) -> None:
    (tile,) = [row for row in site.rows()["rows"] if row["caption"].startswith("word word")]
    assert len(tile["caption"]) == 500
    assert site.text(f"/sample/{tile['uid']}").count("word ") >= 2000


def test_an_image_is_encoded_again_without_its_metadata(site: Site) -> None:
    status, headers, data = site.get("/image/00000/0")
    assert (status, headers["Content-Type"]) == (200, "image/jpeg")
    assert b"script" not in data
    assert not Image.open(io.BytesIO(data)).getexif()


def test_a_formula_in_a_caption_is_no_formula_in_csv(site: Site) -> None:
    uids = [row["uid"] for row in site.rows()["rows"]]
    lines = site.tagged(uids, "csv").decode()
    assert "'=cmd" in lines
    assert ",=cmd" not in lines
    assert ',"=cmd' not in lines


def test_a_form_of_too_many_tags_is_refused(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dagster_project.browser.subset_pages.LARGEST_TAGS", 1)
    assert site.get("/tags", data=b"uids=" + b"a" * 100)[0] == 400


def test_a_token_is_made_once_for_its_owner_only(tmp_path: Path) -> None:
    token = stored_token(tmp_path / "state")
    assert len(token) >= 32
    assert stored_token(tmp_path / "state") == token
    path = tmp_path / "state" / "browse-token"
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    with pytest.raises(TokenError, match="other users can read"):
        stored_token(tmp_path / "state")
    path.chmod(0o600)
    path.write_text("short")
    with pytest.raises(TokenError, match="Remedy"):
        stored_token(tmp_path / "state")


def test_a_folder_for_the_token_that_is_a_file_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    with pytest.raises(TokenError, match="XDG_STATE_HOME"):
        stored_token(tmp_path / "state")
    assert os.listdir(tmp_path) == ["state"]
