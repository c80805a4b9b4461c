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
