"""A project's YAML is checked before anything runs, and its errors name file, field and remedy."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from assets.base.score_kind import Scores
from assets.base.settings import ProjectSettings
from assets.scores.neg_clip_loss_settings import configured
from assets.settings import ConfigError, load_settings

BASE: dict[str, Any] = {
    "name": "trial",
    "lake": "lake",
    "pool": {"path": "pool", "format": "webdataset"},
    "encoders": {"b32": {"model": "ViT-B-32", "pretrained": "openai"}},
    "targets": {"imagenet": {"path": "imagenet"}},
    "recipes": {"best": {"steps": [{"keep_top": {"score": "clip_score/b32", "fraction": 0.3}}]}},
}


def settings(tmp_path: Path, **changes: Any) -> ProjectSettings:
    path = tmp_path / "project.yaml"
    path.write_text(yaml.safe_dump({**copy.deepcopy(BASE), **changes}))
    return load_settings(path)


def test_every_encoder_and_target_gets_every_score_where_none_are_named(tmp_path: Path) -> None:
    found = settings(tmp_path)
    assert set(Scores(found).assets) == {"clip_score/b32", "neg_clip_loss/b32", "norm_sim/b32/imagenet"}
    assert configured(found)["b32"].model_dump() == {
        "temperature": None,
        "batch_size": 32768,
        "draws": 10,
        "seed": 0,
        "estimator": "reference_negatives",
        "arithmetic": "float32",
        "coverage": 0.5,
        "redraw_at_growth": None,
    }
    assert Scores(found).places(["norm_sim_inf/b32/imagenet"]) == {
        "norm_sim_inf/b32/imagenet": ("norm_sim/b32/imagenet", "norm_sim_inf")
    }


def test_relative_paths_start_at_the_yaml(tmp_path: Path) -> None:
    found = settings(tmp_path)
    assert found.lake == str(tmp_path / "lake")
    assert found.pool.path == str(tmp_path / "pool")


def test_a_url_is_left_as_it_is(tmp_path: Path) -> None:
    assert settings(tmp_path, lake="s3://bucket/lake").lake == "s3://bucket/lake"


def changed(*path: str, value: Any) -> dict[str, Any]:
    document = copy.deepcopy(BASE)
    place = document
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    return {path[0]: document[path[0]]}


def top(**limit: object) -> dict[str, Any]:
    return changed("recipes", "best", value={"steps": [{"keep_top": {"score": "clip_score/b32", **limit}}]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (changed("pool", "formt", value="x"), r"pool\.formt: no such field.*spelling"),
        (changed("pool", "format", value="zip"), r"pool\.format: .*'webdataset', 'datacomp', .* or 'image_folder'"),
        (changed("pool", "formt", value="x"), r"pool\.formt: no such field; did you mean format"),
        ({"scores": {"neg_clip_los": {}}}, r"scores\.neg_clip_los: no such field; did you mean neg_clip_loss"),
        (
            {"scores": {"neg_clip_loss": {"b32": {"drws": 5}}}},
            r"scores\.neg_clip_loss\.b32\.drws: no such field; did you mean draws",
        ),
        (
            changed("recipes", "best", value={"steps": [{"keep_tpo": {"score": "clip_score/b32", "count": 5}}]}),
            r"recipes\.best\.steps\.0\.keep_tpo: no such field; did you mean keep_top",
        ),
        (
            changed("recipes", "best", value={"steps": [{"exept": "other"}]}),
            r"recipes\.best\.steps\.0\.exept: no such field; did you mean except",
        ),
        (
            changed("recipes", "best", value={"steps": [{"keep_top": {"scor": "clip_score/b32", "count": 5}}]}),
            r"recipes\.best\.steps\.0\.keep_top\.scor: no such field; did you mean score",
        ),
        ({"scores": {"clip_score": ["b23"]}}, r"scores\.clip_score: there is no encoder 'b23'; did you mean b32"),
        (
            {"scores": {"norm_sim": {"b32": ["imagnet"]}}},
            r"there is no target 'imagnet'; did you mean imagenet",
        ),
        (top(fraction=30), r"steps\.0\.keep_top\.fraction: .*Remedy: 30 % is 0\.30 "),
        (top(fraction=12.5), r"Remedy: 12\.5 % is 0\.125 "),
        (top(fraction="30%"), r"Remedy: 30 % is 0\.30 "),
        (top(fraction=100), r"Remedy: 100 % is 1\.00 "),
        (top(fraction=300), r"fraction: expected at most 1 \(given: 300\)"),
        (top(fraction=0), r"fraction: expected more than 0 \(given: 0\)"),
        ({"lake": None}, r"lake: expected text \(given: nothing\)"),
        ({"pool": ["pool"]}, r"pool: expected a mapping with fields such as path, format, .*given: \['pool'\]"),
        ({"encoders": ["b32"]}, r"encoders: expected a mapping: lines such as `name: value`"),
        ({"scores": {"clip_score": "b32"}}, r"scores\.clip_score: expected a list: \[a, b\], or .*given: 'b32'"),
        (changed("recipes", "best", value={"steps": 3}), r"recipes\.best\.steps: expected a list"),
        (
            changed("recipes", "best", value={"steps": ["where"]}),
            r"steps\.0: expected a mapping with fields such as where",
        ),
        (top(count="many"), r"keep_top\.count: expected a whole number \(given: 'many'\)"),
        (changed("encoders", "b32", "compile", value="perhaps"), r"encoders\.b32\.compile: expected true or false"),
        (
            changed("encoders", "b32", "precomputed", value=["a"]),
            r"encoders\.b32\.precomputed: expected text, or a mapping with fields such as image, text \(given",
        ),
        ({"recipes": {"best": "absent.yaml"}}, r"recipes\.best: .*absent\.yaml: no such recipe file\. Remedy"),
        ({"encoders": {}}, r"encoders: expected at least 1 entry"),
        ({"encoders": {"b 32": {"model": "ViT-B-32"}}}, r"encoders\.b 32.*letters, digits and _"),
        ({"encoders": {"a__b": {"model": "ViT-B-32", "pretrained": "openai"}}}, r"encoders\.a__b.*single _"),
        (
            {"targets": {"cars": {"path": "a"}, "Cars": {"path": "b"}}},
            r"targets: SQL can't tell 'Cars' from 'cars'.*rename",
        ),
        ({"scores": {"clip_score": ["l14"]}}, r"scores\.clip_score: there is no encoder 'l14'; known: b32"),
        ({"scores": {"norm_sim": {"b32": ["cars"]}}}, r"scores\.norm_sim\.b32: there is no target 'cars'"),
        ({"scores": {"neg_clip_loss": {"b32": {"temperature": 0}}}}, r"scores\.neg_clip_loss\.b32\.temperature"),
        ({"encoders": {"b32": {"precomputed": "b32"}}}, r"encoders\.b32: .*temperature"),
        (
            {"encoders": {"b32": {"precomputed": "b32", "temperature": 0.01}}},
            r"targets\.imagenet: encoder 'b32' has no model.*features\.b32",
        ),
        (
            changed("recipes", "best", value={"steps": [{"keep_top": {"score": "clip_scor/b32", "count": 5}}]}),
            r"recipe best, step 1 .*clip_scor/b32.*clip_score/b32",
        ),
    ],
)
def test_an_error_names_the_file_the_field_and_the_remedy(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        settings(tmp_path, **changes)
    assert str(tmp_path / "project.yaml") in str(error.value)


def test_all_wrong_fields_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)name: .*pool\.formt: "):
        settings(tmp_path, pool={"path": "p", "formt": 1}, name=5)


def test_the_remedy_for_a_name_is_not_given_for_other_patterns(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"encoders\.b32\.device: .*auto\|cpu\|cuda") as caught:
        settings(tmp_path, **changed("encoders", "b32", "device", value="tpu"))
    assert "letters, digits" not in str(caught.value)


def test_a_mapping_may_be_merged_into_another_and_overridden(tmp_path: Path) -> None:
    path = tmp_path / "project.yaml"
    path.write_text(
        "name: a\nlake: x\npool: {path: p}\n"
        "encoders:\n  one: &one {model: local-dir:m, batch_size: 8}\n  two: {<<: *one, batch_size: 4}\n"
    )
    encoders = load_settings(path).encoders
    assert encoders["two"].model == encoders["one"].model
    assert (encoders["one"].batch_size, encoders["two"].batch_size) == (8, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        (b"a: [", r'not valid YAML: (?s:.*)in ".*project\.yaml", line 1'),
        (b"name: a\n\tlake: x", r"not valid YAML: (?s:.*)'\\t'"),
        (b"- a", "expected a mapping"),
        (b"name: a\nlake: x\nlake: y", "lake: given more than once"),
        (b"", "expected a mapping"),
        (b"name: a\n---\nname: b", "not valid YAML: expected a single document"),
        (b"name: a\x00", "not a text file: (?s:.*)Remedy: save the YAML as UTF-8"),
        (b"name: \xe4", "not a text file: (?s:.*)Remedy: save the YAML as UTF-8"),
        (b"name: !!python/name:os.system", "not valid YAML: could not determine a constructor"),
        (b"name: 2026-01-01", r"name: expected text \(given: 2026-01-01; quotes make it text\)"),
        (b"encoders: {no: {model: m}}", r"encoders.*: expected text \(given: false; quotes make it text\)"),
        (b"pool: &a [*a]", "pool: expected a mapping"),
    ],
)
def test_a_file_that_is_not_a_project_is_refused(tmp_path: Path, text: bytes | None, message: str) -> None:
    path = tmp_path / "project.yaml"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(ConfigError, match=message):
        load_settings(path)


def test_a_folder_is_not_a_project(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a file"):
        load_settings(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_the_encodings_and_line_ends_of_editors_are_read(tmp_path: Path, encoding: str, line_end: str) -> None:
    path, recipe = tmp_path / "project.yaml", tmp_path / "recipe.yaml"
    recipe.write_text(line_end.join(["steps:", "  - where: width > 96", ""]), encoding="utf-8-sig")
    lines = ["name: a", "lake: é", "pool: {path: p}", "encoders: {b32: {model: m}}", "recipes: {r: recipe.yaml}"]
    path.write_text(line_end.join(lines), encoding=encoding)
    found = load_settings(path)
    assert (Path(found.lake).name, len(found.recipes["r"].steps)) == ("é", 1)
