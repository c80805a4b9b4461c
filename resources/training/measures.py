"""What a trained model is measured by: open_clip's zero-shot classifier and retrieval.

Here: both, over features that the caller computes. Not here: the images (`resources.training.decoded`).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from resources.models.clip_models import class_texts

ACCURACY, RECALL = "accuracy", "recall_at_1"
COMPARED = (ACCURACY, RECALL)
"""The measures that are compared; the others are for reading."""
RETRIEVAL = "retrieval"
"""The name of the task of held-out pairs."""


@dataclass(frozen=True)
class Task:
    """A task as a model meets it.

    Attributes:
        name: a target, or `retrieval`.
        texts: the class of each image; for `retrieval`, its caption.
        features: returns the images' features of unit norm, [m, d], of the model as it is now.
    """

    name: str
    texts: Sequence[str]
    features: Callable[[], Any]


def measure(
    model: Any, tokenizer: Any, tasks: Iterable[Task], templates: Sequence[str], device: Any
) -> dict[str, dict[str, float]]:
    """Measure a model.

    Args:
        model: has open_clip's `encode_text`.
        tokenizer: the model's.
        tasks: what to measure.
        templates: captions of a class, with {} for its name.
        device: of the model.

    Returns:
        By task and measure: `accuracy` of zero-shot classification, or `recall_at_1` and `recall_at_5`, each the mean
        of both directions.
    """
    import torch

    with torch.inference_mode():
        return {
            task.name: _retrieval(model, tokenizer, task, device)
            if task.name == RETRIEVAL
            else _zero_shot(model, tokenizer, task, templates, device)
            for task in tasks
        }


def _zero_shot(model: Any, tokenizer: Any, task: Task, templates: Sequence[str], device: Any) -> dict[str, float]:
    import torch

    classes = sorted(set(task.texts))
    texts = class_texts(model, tokenizer, classes, templates, device)
    found = (task.features().float() @ texts.float().T).argmax(dim=1).cpu()
    wanted = torch.tensor([classes.index(label) for label in task.texts])
    return {ACCURACY: (found == wanted).double().mean().item()}


def _retrieval(model: Any, tokenizer: Any, task: Task, device: Any) -> dict[str, float]:
    import torch
    from open_clip_train.train import get_clip_metrics

    tokens = tokenizer(list(task.texts))
    text = torch.cat([model.encode_text(part.to(device), normalize=True) for part in tokens.split(256)])
    metrics = get_clip_metrics(task.features().float().cpu(), text.float().cpu(), torch.ones(()))
    return {
        f"recall_at_{k}": float(metrics[f"image_to_text_R@{k}"] + metrics[f"text_to_image_R@{k}"]) / 2 for k in (1, 5)
    }
