"""The project that the code location loads, and the module that holds it.

Here: constants and paths that the command line, the server and the definitions share. Not here: anything that takes
time to import; `clip-select --help` imports this module.
"""

import os
from pathlib import Path

CONFIG_VARIABLE = "CLIP_SELECTION_CONFIG"
"""Environment variable with the path of the project's YAML."""

DEMO_CONFIG = Path(__file__).resolve().parent.parent / "config" / "demo.yaml"
MODULE = "dagster_project.definitions"


def config_path() -> Path:
    """Return the path of the project's YAML: the environment's, else the demo's."""
    return Path(os.environ.get(CONFIG_VARIABLE) or DEMO_CONFIG)


def lake_folder(config: Path) -> Path:
    """Return the folder of a project's lake, and read nothing else of its YAML.

    Enough for questions to the catalog, and 20 times faster than opening the project, which imports every asset.

    Args:
        config: the project's YAML.

    Raises:
        ConfigError: the YAML is missing or wrong.
        LakeError: the lake is not in a local folder.
    """
    import yaml
    from pydantic import BaseModel

    from resources.settings import Location

    class Lake(BaseModel):
        lake: Location

    try:
        document = yaml.safe_load(config.read_text(encoding="utf-8"))
        lake = Lake.model_validate(document, context={"base": config.resolve().parent}).lake
    except (OSError, ValueError, yaml.YAMLError):  # pydantic's and Unicode's errors are ValueErrors
        lake = ""
    if lake and "://" not in lake:
        return Path(lake)
    from assets.settings import open_project

    return open_project(config).lake.local_root()  # a URL; or a mistake, which the whole check explains
