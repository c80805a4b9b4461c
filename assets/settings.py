"""The YAML of a project, read and checked, with the settings of every score kind.

Here: the model of the file and its error messages. Not here: the meaning of a score's settings (its module in
`assets.scores`), nor pools, encoders and targets (`resources.settings`).
"""

import re
import reprlib
from collections.abc import Mapping, Sequence
from datetime import date
from decimal import Decimal
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import pyarrow as pa
import yaml
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, ValidationInfo, create_model, model_validator

from assets.base.context import Context
from assets.base.evaluation_settings import check_evaluation
from assets.base.score_kind import ScoreKind, Scores, check_embedded_subsets
from assets.base.settings import Name, ProjectSettings
from assets.scores import KINDS
from core.errors import UserError
from core.names import suggestion
from resources.lake.files import Lake
from resources.models.by_name import Models
from resources.pools.base import RAW_POOL_SCHEMA
from resources.pools.formats import open_pool
from resources.settings import NAME_PATTERN, Settings
from selection.recipes.recipe import Recipe, check_recipes

Kinds = tuple[ScoreKind[Any], ...]


class ConfigError(UserError):
    """The project's YAML is wrong; the message names the file, the field and the remedy."""


@cache
def settings_model(kinds: Kinds = KINDS) -> type[ProjectSettings]:
    """Return the model of a YAML whose `scores` are of the given kinds."""
    fields: dict[str, Any] = {kind.name: (kind.settings, kind.default) for kind in kinds if kind.settings is not None}
    for kind in kinds:
        fields |= kind.extra_settings
    scores: Any = create_model("ScoreSettings", __base__=Settings, **fields)
    model = create_model("ProjectSettings", __base__=_CheckedSettings, scores=(scores, scores()))
    model.kinds = kinds
    return model


_MERGE_TAG = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, of which YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        # The key `<<` merges another mapping, whose keys this one may override.
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != _MERGE_TAG]
        twice = {str(key) for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"{', '.join(sorted(twice))}: given more than once. Remedy: keep one", node.start_mark
            )
        return super().construct_mapping(node, deep)


def _recipe_file(recipe: object, info: ValidationInfo) -> object:
    """Read a recipe that is given as a path, or as `file` and the `names` that replace {…} in it.

    Raises:
        ValueError: the file is missing, not a recipe, or needs a name that is not given.
    """
    if isinstance(recipe, str):
        recipe = {"file": recipe}
    if not isinstance(recipe, dict) or "file" not in recipe:
        return recipe
    path = Path((info.context or {}).get("base", ".")) / str(recipe["file"])
    names = recipe.get("names", {})
    if not isinstance(names, dict) or not set(recipe) <= {"file", "names"}:
        raise ValueError(f"{path}: a recipe from a file has `file` and `names`. Remedy: leave the rest out")
    if not path.is_file():
        raise ValueError(
            f"{path}: no such recipe file. Remedy: correct the path, which is relative to the project's folder"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file: {error}. Remedy: save the recipe as UTF-8") from error
    for name, value in names.items():
        text = text.replace(f"{{{name}}}", str(value))
    try:
        found = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    wanted = sorted(set(re.findall(r"\{([a-z_]+)\}", yaml.safe_dump(found))))
    if wanted:
        raise ValueError(f"{path}: it needs names for {', '.join(wanted)}. Remedy: names: {{{wanted[0]}: …}}")
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected one recipe, a mapping with steps")
    return found


class _CheckedSettings(ProjectSettings):
    """The YAML, with the checks that need more than one field."""

    recipes: dict[Name, Annotated[Recipe, BeforeValidator(_recipe_file)]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _names_differ(self) -> "_CheckedSettings":
        named = {field: getattr(self, field) for field in _NAMED_FIELDS}
        for kind in self.kinds:
            if isinstance(value := getattr(self.scores, kind.name, None), dict):
                named[kind.name] = value
        for field, names in named.items():
            folded: dict[str, str] = {}
            for name in names:
                if "__" in name:
                    raise ValueError(f"{field}.{name}: Dagster joins names by __. Remedy: a name with single _")
                if name.casefold() in folded:
                    raise ValueError(
                        f"{field}: SQL can't tell {folded[name.casefold()]!r} from {name!r}. Remedy: rename one"
                    )
                folded[name.casefold()] = name
        return self

    @model_validator(mode="after")
    def _names_exist(self) -> "_CheckedSettings":
        for kind in self.kinds:
            kind.validate(self)
        scores = Scores(self)
        check_recipes(
            self.recipes,
            scores=scores.by_name.keys(),
            pool_columns=[name for name in RAW_POOL_SCHEMA.names if name not in ("f0", "f1")],
            texts=[
                *(name for name, score in scores.by_name.items() if not score.column.is_number),
                *(field.name for field in RAW_POOL_SCHEMA if pa.types.is_string(field.type)),
            ],
            uid_lists=[f"external_uids/{name}" for name in self.external_uids],
            tables=[declared.key for kind in self.kinds for declared in kind.upstream(self)],
        )
        check_embedded_subsets(self)
        for kind in self.kinds:
            kind.validate_recipes(self)
        for name, evaluation in self.evaluations.items():
            check_evaluation(self, f"evaluations.{name}", evaluation)
        return self


_NAMED_FIELDS = (
    "encoders",
    "targets",
    "captioners",
    "text_encoders",
    "external_scores",
    "external_uids",
    "recipes",
    "evaluations",
)


def load_settings(path: Path, kinds: Kinds = KINDS) -> ProjectSettings:
    """Read and check a project's YAML.

    Args:
        path: the file. Relative paths in it are relative to its folder.
        kinds: the score kinds that it may configure.

    Raises:
        ConfigError: the file is missing, not YAML, or wrong; one message names every wrong field.
    """
    if not path.is_file():
        wrong = "not a file" if path.exists() else "no such file"
        raise ConfigError(f"{path}: {wrong}. Remedy: give the path of a project's YAML")
    try:
        with path.open("rb") as file:  # its name is in the errors, and YAML tells UTF-8 from UTF-16
            document = yaml.load(file, Loader=_Loader)
    except yaml.reader.ReaderError as error:
        raise ConfigError(f"{path}: not a text file: {error}. Remedy: save the YAML as UTF-8") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: expected a mapping with name, lake, pool, encoders, recipes")
    model = settings_model(kinds)
    try:
        return model.model_validate(document, context={"base": path.resolve().parent})
    except ValidationError as error:
        raise ConfigError(f"{path}: {_explain(error, model)}") from error


_TEXT, _NUMBER, _WHOLE, _LIST = "text", "a number", "a whole number", "a list: [a, b], or lines that begin with -"
_SHAPES = {
    "tuple_type": _LIST,
    "list_type": _LIST,
    "set_type": _LIST,
    "frozen_set_type": _LIST,
    "dict_type": "a mapping: lines such as `name: value`",
    "string_type": _TEXT,
    "string_too_short": "text that is not empty",
    "int_type": _WHOLE,
    "int_parsing": _WHOLE,
    "int_from_float": _WHOLE,
    "float_type": _NUMBER,
    "float_parsing": _NUMBER,
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "too_short": "at least {min_length} entry",
    "too_long": "at most {max_length} entries",
    "literal_error": "{expected}",
    "string_pattern_mismatch": "text of the form {pattern}",
    "invalid_key": "a name, which is text",
}
"""What a YAML should have, by pydantic's name of the problem; the fields are pydantic's."""


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Return one line for each wrong field of a YAML that `model` refused."""
    lines: dict[str, list[str]] = {}
    given: dict[str, str] = {}
    for problem in error.errors(include_url=False):
        field = ".".join(str(part) for part in _written(model, problem["loc"]))
        message = _message(problem, model)
        known = lines.setdefault(field, [])
        # a field with alternatives, such as text or a mapping, has a problem for each
        known.append(message.replace("expected ", "or ", 1) if known else message)
        given[field] = "" if isinstance(problem["input"], dict) else f" (given: {_given(problem)})"
    found = [f"{field}: {', '.join(m)}{given[field]}" if field else "\n".join(m) for field, m in lines.items()]
    return found[0] if len(found) == 1 else "\n  " + "\n  ".join(found)


def _given(problem: Mapping[str, Any]) -> str:
    """Return a wrong value, shortened, as a YAML has it."""
    value = problem["input"]
    if value is None:
        return "nothing"
    given = str(value).lower() if isinstance(value, bool | date) else reprlib.repr(value)
    if problem["type"] == "string_type" and isinstance(value, int | float | date):
        given += "; quotes make it text"
    return given


def _message(problem: Mapping[str, Any], model: type[BaseModel]) -> str:
    """Return what is wrong with a field, in terms of the YAML, and the remedy."""
    kind, place = problem["type"], problem["loc"]
    if place and place[-1] == "fraction" and (percent := _percent(problem["input"])):
        return percent
    if kind == "extra_forbidden":
        known = _fields_at(model, _written(model, place)[:-1])
        hint = f"; {suggestion(str(place[-1]), known)}" if known else ""
        return f"no such field{hint}. Remedy: check its spelling and where it is indented"
    if kind == "missing":
        return "is missing. Remedy: add it"
    if kind == "model_type":
        return f"expected a mapping with fields such as {', '.join(_fields_at(model, _written(model, place))[:3])}"
    if kind == "string_pattern_mismatch" and problem["ctx"]["pattern"] == NAME_PATTERN:
        return "expected a name. Remedy: letters, digits and _ only, not a digit first"
    if kind in _SHAPES:
        return f"expected {_SHAPES[kind].format(**problem.get('ctx', {}))}"
    return str(problem["msg"]).removeprefix("Value error, ")


def _written(annotation: Any, place: Sequence[int | str]) -> list[int | str]:
    """Return a place as the YAML has it: without pydantic's names of alternatives and its mark of keys."""
    found = []
    for part in place:
        options = [option for option in _options(annotation) if option is not type(None)]
        if len(options) > 1:
            annotation = next((option for option in options if getattr(option, "__name__", "") == part), None)
        elif part != "[key]":
            found.append(part)
            annotation = _inside(annotation, part)
    return found


def _percent(given: object) -> str | None:
    """Return the remedy for a fraction that is written as a percentage, such as 30 or "30 %"; None for others."""
    written = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%?\s*", str(given))
    if written is None or isinstance(given, bool) or not 1 < (number := Decimal(written[1])) <= 100:
        return None
    decimals = 2 + len(written[1].partition(".")[2])
    return f"a fraction is above 0 and at most 1. Remedy: {number} % is {number / 100:.{decimals}f}"


def _fields_at(annotation: Any, place: Sequence[int | str]) -> list[str]:
    """List the fields of the model at a place of a YAML, as the YAML names them; empty where none is found.

    Args:
        annotation: type of the whole, a model.
        place: names of fields, keys of mappings and positions in lists.
    """
    for part in place:
        annotation = _inside(annotation, part)
    models = [option for option in _options(annotation) if isinstance(option, type) and issubclass(option, BaseModel)]
    return [field.alias or name for model in models for name, field in model.model_fields.items()]


def _inside(annotation: Any, part: int | str) -> Any:
    """Return the type of a field of a model, of the values of a mapping, or of the entries of a list; else None."""
    found = None
    for option in _options(annotation):
        if isinstance(option, type) and issubclass(option, BaseModel):
            named = {field.alias or name: field for name, field in option.model_fields.items()}
            found = named[part].annotation if part in named else found
        elif get_origin(option) in (dict, Mapping, tuple, list):
            found = next((inner for inner in reversed(get_args(option)) if inner is not Ellipsis), None)
    return found


def _options(annotation: Any) -> list[Any]:
    """Return the alternatives of a union, without the metadata of `Annotated`."""
    if get_origin(annotation) is Annotated:
        return _options(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [option for each in get_args(annotation) for option in _options(each)]
    return [annotation]


def open_context(settings: ProjectSettings, config: Path) -> Context:
    """Open a project's lake, pool and models. Nothing is read yet.

    Raises:
        ConfigError: the lake's location can't be opened.
        PoolError: the pool's format and the encoders don't fit.
    """
    try:
        lake = Lake(settings.lake)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"{config}: lake: {settings.lake} can't be opened: {error}. Remedy: a folder, or a URL whose file "
            "system is installed"
        ) from error
    pool = open_pool(settings.pool, settings.encoders, settings.lake)
    models = Models(settings.encoders, settings.captioners, settings.text_encoders)
    return Context(settings, config, lake, pool, models)


def open_project(config: Path, kinds: Kinds = KINDS) -> Context:
    """Read a project's YAML and open the project.

    Raises:
        ConfigError: see `load_settings`.
    """
    return open_context(load_settings(config, kinds), config)
