"""Prefixes of a model's name that say where it is, apart from the settings, which need pydantic."""

LOCAL_DIR = "local-dir:"
HF_HUB = "hf-hub:"
