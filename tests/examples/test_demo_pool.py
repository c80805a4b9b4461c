"""The demo's pool, targets, encoder and truth table are as docs/demo.md describes them."""

import hashlib
import io
import itertools
import json
import tarfile
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import open_clip
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from examples.demo import pool, truth
from examples.demo.pictures import Group, Scene, caption, draw, random_scene

ENCODER = Path(__file__).resolve().parents[2] / "examples" / "demo" / "encoder"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    pool.make_pool(folder / "pool", [0, 3], workers=2)
    pool.make_truth(folder / "truth.parquet")
    pool.make_targets(folder / "targets", each=5)
    return folder


def members(tar: Path) -> dict[str, bytes]:
    with tarfile.open(tar) as archive:
        return {m.name: archive.extractfile(m).read() for m in archive}


def test_a_shard_is_what_img2dataset_leaves(made):
    files = members(made / "pool" / "00003.tar")
    sidecar = pl.read_parquet(made / "pool" / "00003.parquet")
    stats = json.loads((made / "pool" / "00003_stats.json").read_text())
    there = sidecar.filter(pl.col("status") == "success")
    assert (len(sidecar), len(there)) == (stats["count"], stats["successes"]) == (1006, 1000)
    assert sorted(files) == sorted(f"{k}.{e}" for k in there["key"] for e in ("jpg", "json", "txt"))
    for row in there.iter_rows(named=True):
        jpeg = files[row["key"] + ".jpg"]
        assert json.loads(files[row["key"] + ".json"]) == row
        assert files[row["key"] + ".txt"].decode() == row["caption"]
        assert hashlib.sha256(jpeg).hexdigest() == row["sha256"]
        image = Image.open(io.BytesIO(jpeg))
        assert (image.format, image.size) == ("JPEG", (row["width"], row["height"]))


def test_a_shard_has_the_same_bytes_whatever_is_made_beside_it(made, tmp_path):
    pool.make_pool(tmp_path, [3], workers=1)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (made / "pool" / path.name).read_bytes()
    assert len(list(tmp_path.iterdir())) == 3


def test_the_truth_knows_every_row_and_lies_outside_the_pool(made):
    table = pl.read_parquet(made / "truth.parquet")
    assert len(table) == table["uid"].n_unique() == pool.SHARDS * pool.SHARD_ROWS
    assert Counter(table["kind"]) == {k: n * pool.SHARDS for k, n in pool.KINDS.items()}
    sidecars = pl.read_parquet(made / "pool" / "*.parquet").filter(pl.col("status") == "success")
    assert set(sidecars["uid"]) == set(table.filter(pl.col("shard").is_in(["00000", "00003"]))["uid"])
    assert not list((made / "pool").glob("truth*"))


def test_nothing_but_picture_and_caption_tells_the_kind(made):
    sidecar = pl.read_parquet(made / "pool" / "*.parquet")
    for column in ("url", "key", "exif"):
        for kind in pool.KINDS:
            assert not sidecar[column].str.contains(kind).any()
    table = sidecar.join(pl.read_parquet(made / "truth.parquet"), on="uid")
    positions = table.with_columns(pl.col("key").str.slice(5).cast(int)).group_by("kind")
    means = positions.agg(pl.col("key").mean())["key"]
    assert all(400 < mean < 600 for mean in means)


def test_shuffled_rows_exchange_captions_among_themselves_and_none_keeps_its_own():
    kinds = ["clean", "shuffled", "empty_talk", "shuffled", "shuffled", "clean"]
    before = [pool.Row(str(i), kind, "", None, f"caption {i}") for i, kind in enumerate(kinds)]
    after = list(before)
    pool.shuffle_captions(after)
    assert sorted(row.caption for row in after) == sorted(row.caption for row in before)
    for old, new in zip(before, after, strict=True):
        assert (new.source, new.kind) == (old.source, old.kind)
        assert (new.caption != old.caption) == (old.kind == "shuffled")


def test_a_wrong_attribute_is_one_attribute_and_the_caption_says_it():
    said = Counter()
    for i in range(400):
        rng = Random(f"wrong/{i}")
        scene = random_scene(rng)
        other, attribute = pool.change_attribute(scene, rng)
        said[attribute] += 1
        if attribute == "layout":
            assert other.groups == scene.groups[::-1]
            continue
        changed = [
            (a, getattr(g, a), getattr(h, a))
            for g, h in zip(scene.groups, other.groups, strict=True)
            for a in ("shape", "colour", "texture", "size", "count")
            if getattr(g, a) != getattr(h, a)
        ]
        assert [a for a, _, _ in changed] == [attribute]
        if attribute == "colour":
            assert changed[0][2] in caption(other, rng, required="colour")
    assert set(said) == {"colour", "shape", "texture", "count", "layout"}


def test_captions_of_one_scene_vary_and_fit_the_text_tower():
    rng = Random("words")
    scene = Scene((Group("star", "red", "striped", "large", 3),), "row", "white")
    assert len({caption(scene, rng) for _ in range(200)}) > 60
    pair = Scene((Group("cross", "yellow", "checked", "small", 1),) * 2, "beside", "cream")
    tokens = open_clip.SimpleTokenizer(context_length=77)([caption(pair, rng) for _ in range(500)])
    length = json.loads((ENCODER / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    assert (tokens != 0).sum(1).max() <= length["context_length"]


def test_pictures_show_the_colour_and_the_count_of_their_scene():
    for n, layout in itertools.product((2, 3, 4), ("row", "column", "scattered")):
        scene = Scene((Group("circle", "blue", "plain", "medium", n),), layout, "white")
        pixels = np.asarray(draw(scene, Random(f"{n}/{layout}"))).astype(int)
        blue = (pixels[..., 2] - pixels[..., 0] > 90).astype(int)
        assert islands(blue) == n


def islands(mask: np.ndarray) -> int:
    todo, found = set(zip(*np.nonzero(mask), strict=True)), 0
    while todo:
        found, edge = found + 1, [todo.pop()]
        while edge:
            y, x = edge.pop()
            for near in itertools.product((y - 1, y, y + 1), (x - 1, x, x + 1)):
                if near in todo:
                    todo.remove(near)
                    edge.append(near)
    return found


def test_target_folders_are_classes_of_jpegs_that_are_not_in_the_pool(made):
    folders = sorted(p.name for p in (made / "targets").iterdir())
    assert folders == ["dotted_heart", "dotted_star", "striped_heart", "striped_star"]
    pictures = [p.read_bytes() for p in (made / "targets").rglob("*.jpg")]
    assert len(pictures) == len(set(pictures)) == 20
    shas = pl.read_parquet(made / "pool" / "*.parquet")["sha256"]
    assert not {hashlib.sha256(p).hexdigest() for p in pictures} & set(shas)


def test_target_like_speaks_of_the_picture_alone():
    rows = [row for shard in range(2) for row in pool.plan_shard(shard)]
    assert not any(row.target_like for row in rows if row.kind == "off_domain")
    assert {row.kind for row in rows if row.target_like} == set(pool.KINDS) - {"off_domain"}
    star, box = Group("star", "red", "dotted", "small", 1), Group("square", "red", "dotted", "small", 1)
    assert pool.shows_target(Scene((star, star), "beside", "white"))
    assert not pool.shows_target(Scene((star, box), "beside", "white"))


def test_the_committed_encoder_loads_without_network_and_knows_a_match_from_a_mismatch(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    weights = ENCODER / "open_clip_model.safetensors"
    assert weights.stat().st_size < 4_000_000
    name = f"local-dir:{ENCODER}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    model.eval()
    rows = [row for row in pool.plan_shard(11) if row.kind == "clean"][:200]
    drawn = [pool.picture(row) for row in rows]
    images = torch.stack([preprocess(Image.open(io.BytesIO(jpeg))) for jpeg, _, _ in drawn])
    with torch.no_grad():
        image = model.encode_image(images, normalize=True)
        text = model.encode_text(open_clip.get_tokenizer(name)([words for _, words, _ in drawn]), normalize=True)
    own = (image * text).sum(1).numpy()
    borrowed = (image * text.roll(1, 0)).sum(1).numpy()
    assert truth.auc(own, borrowed) > 0.9


@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=30),
    st.lists(st.integers(-3, 3), min_size=1, max_size=30),
)
def test_auc_is_the_share_of_pairs_in_order_with_ties_as_halves(better, worse):
    pairs = [1.0 if b > w else 0.5 if b == w else 0.0 for b in better for w in worse]
    value = truth.auc(np.array(better, np.float32), np.array(worse, np.float32))
    assert value == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)


@pytest.mark.parametrize("worse", [[], [float("nan"), 1.0]])
def test_auc_refuses_no_rows_and_nan(worse):
    with pytest.raises(ValueError, match="worse"):
        truth.auc(np.array([1.0]), np.array(worse))


@pytest.fixture
def small():
    table = pl.DataFrame(
        {
            "uid": ["a", "b", "c", "d", "later"],
            "kind": ["clean", "clean", "shuffled", "shuffled", "clean"],
            "variant": [""] * 5,
            "target_like": [True, False, True, False, True],
        }
    )
    scores = pl.DataFrame(
        {
            "uid": ["a", "b", "c", "d"],
            "clip_score": [0.9, 0.8, 0.1, 0.2],
            "neg_clip_loss": [-0.1, -0.3, -0.2, -0.4],
            "norm_sim_inf": [0.5, 0.5, 0.5, 0.5],
        }
    )
    return table, scores


def test_separation_counts_only_rows_that_have_scores(small):
    lines = truth.separation(*small)
    assert lines.filter(pl.col("kind") == "shuffled").rows(named=True) == [
        {"kind": "shuffled", "variant": "", "rows": 2} | {"clip_score": 1.0, "neg_clip_loss": 0.75, "norm_sim_inf": 0.5}
    ]


def test_kept_gives_share_and_lift_against_the_pool(small):
    lines = truth.kept(*small, {"best": ["a", "c"], "none": []})
    best = {r["kind"]: r for r in lines.filter(pl.col("recipe") == "best").rows(named=True)}
    assert (best["clean"]["share"], best["clean"]["lift"]) == (0.5, 1.0)
    assert (best[truth.TARGET_LIKE]["share"], best[truth.TARGET_LIKE]["lift"]) == (1.0, 2.0)
    assert lines.filter(pl.col("recipe") == "none")["lift"].is_nan().all()


def test_a_truth_of_another_pool_and_an_unknown_selected_uid_are_errors(small):
    table, scores = small
    with pytest.raises(ValueError, match="another pool"):
        truth.separation(table.filter(pl.col("uid") != "a"), scores)
    with pytest.raises(ValueError, match="recipe best: 1 selected"):
        truth.kept(table, scores, {"best": {"a", "later"}})


def test_the_printed_tables_name_every_kind_recipe_and_number(small):
    console = Console(record=True, width=120, file=io.StringIO())
    for table in truth.truth_table(*small, {"best": {"a", "c"}}):
        console.print(table)
    text = console.export_text()
    for piece in ("shuffled", "1.000", "0.750", "0.500", "best", "50.0% (×1.00)", "100.0% (×2.00)"):
        assert piece in text
