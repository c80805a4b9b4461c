"""The tier `heads`: two linear heads on frozen embeddings, trained in seconds with open_clip's loss.

A proxy: it shows what a subset teaches a linear map, not what it teaches a model that is trained from scratch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from resources.training.measures import Task, measure
from resources.training.order import training_order

_SCALE = 14.3
"""Factor of the similarities, learned from this value on as in CLIP: 1 / 0.07."""


@dataclass(frozen=True)
class HeadsTask:
    """A task: its name, its texts, and the frozen embeddings of its images, float16 [m, d]."""

    name: str
    texts: Sequence[str]
    images: np.ndarray


@dataclass(frozen=True)
class HeadsRun:
    """A run: the rows of its samples, int64 [n], and how they train."""

    samples: np.ndarray
    seed: int
    steps: int
    points: int
    batch_size: int
    learning_rate: float
    weight_decay: float


def train_heads(
    run: HeadsRun,
    image: np.ndarray,
    text: np.ndarray,
    encoder: Any,
    tasks: Sequence[HeadsTask],
    templates: Sequence[str],
    on_samples: Callable[[int], None],
) -> list[dict[str, Any]]:
    """Train two linear heads, and measure them at each point of the learning curve.

    Args:
        run: the run.
        image: float16 [n, d], frozen embeddings of all arms' images.
        text: float16 [n, d], of their captions.
        encoder: the loaded encoder that they come from; it embeds the tasks' captions.
        tasks: what to measure.
        templates: captions of a class.
        on_samples: called with the number of samples just seen.

    Returns:
        For each point, `seen` and `measures`.
    """
    import torch
    from open_clip.loss import ClipLoss

    device = encoder.device
    with torch.random.fork_rng():
        torch.manual_seed(run.seed)
        heads = _heads(image.shape[1], text.shape[1], encoder).to(device)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=run.learning_rate, weight_decay=run.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, run.steps)
    loss, curve = ClipLoss(), []
    frozen = [(task, torch.from_numpy(task.images.astype(np.float32)).to(device)) for task in tasks]
    for step in range(run.steps):
        order = training_order(len(run.samples), step * run.batch_size, (step + 1) * run.batch_size, seed=run.seed)
        rows = run.samples[order]
        pair = [torch.from_numpy(part[rows].astype(np.float32)).to(device) for part in (image, text)]
        loss(*heads(*pair)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % (run.steps // run.points) == 0:
            seen = (step + 1) * run.batch_size
            with torch.inference_mode():
                found = [Task(task.name, task.texts, _features(heads, images)) for task, images in frozen]
            curve.append({"seen": seen, "measures": measure(heads, encoder.tokenizer, found, templates, device)})
            on_samples(run.steps // run.points * run.batch_size)
    return curve


def _features(heads: Any, images: Any) -> Callable[[], Any]:
    return lambda: heads.encode_image(images)


def _heads(image: int, text: int, encoder: Any) -> Any:
    """Return the two heads as a model of open_clip's shape."""
    import torch
    from torch.nn import functional

    class Heads(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image = torch.nn.Linear(image, image, bias=False)
            self.text = torch.nn.Linear(text, image, bias=False)
            self.logit_scale = torch.nn.Parameter(torch.tensor(_SCALE).log())

        def encode_image(self, frozen: Any) -> Any:
            return functional.normalize(self.image(frozen), dim=-1)

        def encode_text(self, tokens: Any, normalize: bool = True) -> Any:
            del normalize
            frozen = functional.normalize(encoder.encode_text(tokens).float(), dim=-1)
            return functional.normalize(self.text(frozen), dim=-1)

        def forward(self, image: Any, text: Any) -> Any:
            pair = self.encode_image(image), functional.normalize(self.text(text), dim=-1)
            return *pair, self.logit_scale.exp()

    return Heads()
