"""The project that the code location loads, and the module that holds it.

Here: constants and paths that the command line, the server and the definitions share. Not here: anything that takes
time to import; `clip-select --help` imports this module.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from resources.lake.files import Lake

CONFIG_VARIABLE = "CLIP_SELECTION_CONFIG"
"""Environment variable with the path of the project's YAML."""

ENGINES = ("in_process", "processes", "ray")
"""Names of the engines (`dagster_project.engines`)."""

DEMO_CONFIG = Path(__file__).resolve().parent.parent / "config" / "demo.yaml"
MODULE = "dagster_project.definitions"


def config_path() -> Path:
    """Return the path of the project's YAML: the environment's, else the demo's."""
    return Path(os.environ.get(CONFIG_VARIABLE) or DEMO_CONFIG)


def lake_of(config: Path) -> "Lake":
    """Return a project's lake, and read nothing else of its YAML.

    Enough for questions to the catalog, and 20 times faster than opening the project, which imports every asset.

    Args:
        config: the project's YAML.

    Raises:
        ConfigError: the YAML is missing or wrong.
        StorageError: the lake is a URL of another kind than `s3://`, `gs://` and `az://`.
    """
    import yaml
    from pydantic import BaseModel

    from resources.settings import Location

    class _Lake(BaseModel):
        lake: Location

    try:
        document = yaml.safe_load(config.read_text(encoding="utf-8"))
        lake = _Lake.model_validate(document, context={"base": config.resolve().parent}).lake
    except (OSError, ValueError, yaml.YAMLError):  # pydantic's and Unicode's errors are ValueErrors
        lake = ""
    if lake:
        from resources.lake.files import Lake

        return Lake(lake)
    from assets.settings import open_project

    return open_project(config).lake  # a mistake, which the whole check explains
