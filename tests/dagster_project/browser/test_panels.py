"""What `clip-select browse` shows of optional inputs: near duplicates, generated captions, pools without images, S3."""

from pathlib import Path

import numpy as np

from dagster_project.browser import search
from dagster_project.browser.queries import Place, Table
from dagster_project.headless import materialize
from resources.storage.by_location import open_store
from tests.support.automation import Automation
from tests.support.browse_site import open_site
from tests.support.captioning import SPEECH
from tests.support.pool_factory import picture, sample, write_shard
from tests.support.scenario import Scenario, keep


def test_tagged_samples_are_a_uid_list_that_recipes_read(finished: Scenario) -> None:
    with open_site(finished.open()) as site:
        uids = [row["uid"] for row in site.rows(sort="clip_score/tiny")["rows"][:5]]
        for kind in ("npy", "txt"):
            (finished.folder / f"tagged.{kind}").write_bytes(site.tagged(uids, kind))
    top = {"steps": [{"except": "tagged.txt"}, keep("clip_score/tiny", count=7)]}
    finished.set("recipes", value={"without": top, "only": {"from": "tagged.npy", "steps": [{"where": "true"}]}})
    assert finished.run().failures == {}
    scores = finished.scores("clip_score/tiny").sort("clip_score", descending=True)
    order = [f"{f0:016x}{f1:016x}" for f0, f1 in scores.select("f0", "f1").rows()]
    assert set(order[:5]) == set(uids)
    assert set(finished.manifest("without")["uid"]) == set(order[5:12])
    assert set(finished.manifest("only")["uid"]) == set(uids)


def test_a_better_duplicate_and_generated_captions_are_beside_the_sample(scenario: Scenario, tiny_coca: Path) -> None:
    same = picture(5)
    write_shard(scenario.folder / "pool", [sample(0, "00000", image=same), sample(1, "00000", image=same)], "00000")
    for shard in ("00001", "00002"):
        (scenario.folder / "pool" / f"{shard}.tar").unlink()
    coca = {"model": f"local-dir:{tiny_coca}", "workers": 0, "batch_size": 5, **SPEECH}
    scenario.document |= {
        "captioners": {"coca": coca},
        "text_encoders": {"own": {"encoder": "tiny"}},
        "targets": {},
        "scores": {
            "clip_score": ["tiny"],
            "neg_clip_loss": {},
            "norm_sim": {},
            "near_duplicates": {"tiny": {"best": "clip_score/tiny"}},
            "sieve": {"coca": ["own"]},
        },
        "recipes": {
            "apart": {
                "steps": [{"deduplicate": {"by": "near_duplicate/tiny", "above": 0.9}}, keep("sieve/coca/own", count=1)]
            }
        },
    }
    assert scenario.run().failures == {}
    worse, better = scenario.scores("clip_score/tiny", ["00000"]).sort("clip_score").select("f0", "f1").rows()
    words = lambda row: f"{row[0]:016x}{row[1]:016x}"  # noqa: E731
    said = scenario.scores("sieve/coca/own", ["00000"])["sieve_caption"]
    with open_site(scenario.open()) as site:
        page = site.text(f"/sample/{words(worse)}")
        assert "Better near duplicate" in page
        assert f'href="/sample/{words(better)}"' in page
        assert "Generated caption" in page
        assert any(text and text in page for text in said)
        assert "Better near duplicate" not in site.text(f"/sample/{words(better)}")
        found = site.json("/api/trial", recipe="apart", limit1="threshold:1.5")
        assert [step["kept"] for step in found["steps"]] == [2, 1]
        assert found["steps"][0]["limits"] == ["threshold"]
        assert sum(found["steps"][0]["histogram"]["counts"]) == 2
        assert site.rows(recipe="apart", member="dropped", step=1)["rows"][0]["uid"] == words(worse)


def test_a_pool_without_images_shows_the_url_as_text_and_never_fetches_it(tmp_path: Path) -> None:
    project = Automation(tmp_path)
    project.write(0)
    assert materialize(project.project, project.graph, project.instance, notice=lambda *_: None).failures == {}
    with open_site(project.project) as site:
        row = site.rows(sort="neg_clip_loss/b32")["rows"][0]
        assert row["url"].startswith("src://00000/")
        page = site.text(f"/sample/{row['uid']}")
        assert f"<code>{row['url']}</code>" in page
        assert "<img" not in page
        assert 'href="src:' not in page
        assert site.get("/image/00000/0")[0] == 404
        assert "needs its model" in site.json("/api/rows", text="a dog")["error"]
        assert site.rows(like=row["uid"], side="text")["rows"][0]["uid"] == row["uid"]
    project.instance.dispose()


def test_a_lake_and_a_pool_on_s3_are_browsed_in_place(scenario: Scenario, bucket: str) -> None:
    store = open_store(bucket)
    for tar in sorted((scenario.folder / "pool").glob("*.tar")):
        store.put(f"{bucket}/pool/{tar.name}", tar.read_bytes())
    scenario.document |= {"lake": f"{bucket}/lake", "pool": {"path": f"{bucket}/pool"}}
    scenario.document["recipes"] = {"clip_third": {"steps": [keep("clip_score/tiny", fraction=0.34)]}}
    scenario.document["targets"] = {}
    scenario.document["scores"] = {"clip_score": ["tiny"], "neg_clip_loss": {}, "norm_sim": {}}
    assert scenario.run().failures == {}
    with open_site(scenario.open()) as site:
        found = site.rows(sort="clip_score/tiny", where="width > 0", recipe="clip_third")
        assert found["total"] == 12
        row = found["rows"][0]
        assert row["shard"] in ("00000", "00001", "00002")
        assert site.get(f"/image/{row['shard']}/{row['row']}")[1]["Content-Type"] == "image/jpeg"
        assert "clip_third v0001" in site.text(f"/sample/{row['uid']}")
        assert site.json("/api/trial", recipe="clip_third", limit1="count:3")["rows"] == 3
        assert site.rows(text="red boat")["note"] == "Searched all 36 rows."


def test_a_search_states_how_much_it_read_within_its_budget(finished: Scenario) -> None:
    table = Table(finished.open())
    query = search.of_row(table, "tiny", Place("00001", 4), "image")
    part = search.nearest(table, "tiny", query, "image", rows=13)
    assert (part.part.rows, part.part.total) == (12, 36)
    assert part.part.note("Searched") == "Searched 12 of 36 rows: whole shards, in the order of a keyed hash."
    whole = search.nearest(table, "tiny", query, "image", seconds=1e9)
    vectors = np.concatenate(
        [table.context.lake.vectors("embeddings/tiny", s, columns=["image"])[0][:] for s in ("00000", "00001", "00002")]
    )
    exact = np.sort(vectors.astype(np.float64) @ query.astype(np.float64))[::-1]
    np.testing.assert_allclose(whole.cosines, exact, atol=1e-6)
    assert whole.places[0] == Place("00001", 4)
