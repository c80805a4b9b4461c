"""The science: scores, reductions over similarities, negatives and recipes.

Here: functions from tensors, arrays and tables to tensors, arrays and tables. Not here: Dagster, files, encoders.
Names are imported on first use, so recipes load without torch, and scores need torch and NumPy alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selection.scores.clip_loss import clip_score, neg_clip_loss, neg_clip_loss_in_batches
    from selection.scores.norm_sim import (
        nearest_target,
        norm_sim,
        norm_sim_from_moment,
        second_moment,
    )

__all__ = [
    "clip_score",
    "nearest_target",
    "neg_clip_loss",
    "neg_clip_loss_in_batches",
    "norm_sim",
    "norm_sim_from_moment",
    "second_moment",
]

# No function may share the name of its module: importing the module would replace the function.
_MODULES = {
    "clip_score": "selection.scores.clip_loss",
    "neg_clip_loss": "selection.scores.clip_loss",
    "neg_clip_loss_in_batches": "selection.scores.clip_loss",
    "norm_sim": "selection.scores.norm_sim",
    "nearest_target": "selection.scores.norm_sim",
    "norm_sim_from_moment": "selection.scores.norm_sim",
    "second_moment": "selection.scores.norm_sim",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
