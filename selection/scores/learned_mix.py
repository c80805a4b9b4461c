"""Weights of score columns, learned through one training step on a labelled target (M-FLYT, arXiv 2503.08805).

A batch is weighed by softmax(x w), two linear heads on frozen embeddings take one step on the weighted contrastive
loss, and w follows the gradient of the heads' loss on the target through that step. Here: standardising columns, the
losses, the loop, and the mixed score. Not here: where columns and embeddings come from.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from selection.scores.negatives import keyed_hash

_POOL, _TARGET = 7 << 60, (7 << 60) + 1  # draw numbers in the keyed hash, which no other use has

Heads = tuple[Tensor, Tensor]
"""The linear heads of images and of texts, each [d, d]."""


@dataclass(frozen=True)
class Target:
    """A labelled target.

    Attributes:
        image: [m, d], unit norm.
        label: The class of each image, int64 [m].
        text: The text of each class, [classes, d], unit norm.
    """

    image: Tensor
    label: Tensor
    text: Tensor


@dataclass(frozen=True)
class MixTraining:
    """How the weights are learned.

    Attributes:
        steps: Number of batches.
        batch: Rows of the pool, and of the target, in a batch.
        head_rate: η, the step of the heads.
        weight_rate: Adam's step of the weights.
        temperature: τ of both losses.
        seed: Any integer; the rows of the batches.
    """

    steps: int = 200
    batch: int = 256
    head_rate: float = 1.0
    weight_rate: float = 0.05
    temperature: float = 0.07
    seed: int = 0


@dataclass(frozen=True)
class LearnedMix:
    """What was learned with one seed.

    Attributes:
        weights: w, [S], of the dtype of the columns.
        loss_at_start: The loss of all of the target's images before the first step, in nats.
        loss_at_end: The same after the last step.
    """

    weights: Tensor
    loss_at_start: float
    loss_at_end: float


def moments(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Compute the mean and the population standard deviation of columns; the deviation of a constant one is exactly 0.

    Args:
        values: Finite scores, [n, S].

    Returns:
        Two arrays [S]; not finite where values are too large to square.
    """
    constant = values.min(axis=0) == values.max(axis=0)
    with np.errstate(over="ignore", invalid="ignore"):
        return values.mean(axis=0), np.where(constant, 0.0, values.std(axis=0))


def standardise(
    values: NDArray[np.float64], mean: NDArray[np.float64], deviation: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Compute (x − mean) / deviation, float64 [n, S]; 0 in the columns whose deviation is 0."""
    return np.where(deviation > 0, (values - mean) / np.where(deviation > 0, deviation, 1.0), 0.0)


def weighted_loss(weights: Tensor, columns: Tensor, image: Tensor, text: Tensor, heads: Heads, tau: float) -> Tensor:
    """Compute L_w = ½ Σ_j −π_j [log(π_j e^{s_jj} / Σ_k π_k e^{s_jk}) + the same over columns], π = softmax(x w).

    Args:
        weights: w, [S].
        columns: x, the standardised scores of the batch, [B, S].
        image: [B, d].
        text: [B, d].
        heads: The heads.
        tau: s is the cosine of the heads' outputs over τ.
    """
    log_share = (columns @ weights).log_softmax(dim=0)
    similar = normalize(image @ heads[0], dim=1) @ normalize(text @ heads[1], dim=1).T / tau
    own = log_share + similar.diagonal()
    both = (own - (log_share + similar).logsumexp(dim=1)) + (own - (log_share[:, None] + similar).logsumexp(dim=0))
    return -(log_share.exp() * both).sum() / 2


def target_loss(target: Target, heads: Heads, tau: float) -> Tensor:
    """Compute the cross entropy of the target's images among the texts of its classes."""
    logits = normalize(target.image @ heads[0], dim=1) @ normalize(target.text @ heads[1], dim=1).T / tau
    return cross_entropy(logits, target.label)


def stepped(
    weights: Tensor, columns: Tensor, image: Tensor, text: Tensor, heads: Heads, training: MixTraining
) -> Heads:
    """Return the heads after one step θ' = θ − η ∇L_w, as a function of the weights."""
    leaves = [head.detach().requires_grad_() for head in heads]
    loss = weighted_loss(weights, columns, image, text, (leaves[0], leaves[1]), training.temperature)
    first, second = torch.autograd.grad(loss, leaves, create_graph=True)
    return leaves[0] - training.head_rate * first, leaves[1] - training.head_rate * second


def learn_mix(
    columns: Tensor,
    image: Tensor,
    text: Tensor,
    target: Target,
    training: MixTraining,
    on_step: Callable[[], None] = lambda: None,
) -> LearnedMix:
    """Learn the weights of score columns.

    Args:
        columns: Standardised scores of n rows, float [n, S].
        image: Image embeddings, float [n, d], unit norm; each batch is converted to the dtype of `columns`.
        text: Text embeddings, likewise.
        target: A labelled target; its embeddings likewise.
        training: The settings.
        on_step: Called after each step.

    Raises:
        ValueError: shapes differ, a value is not finite, or a label has no class.
    """
    _check(columns, image, text, target)
    weights = torch.zeros(columns.shape[1], dtype=columns.dtype, device=columns.device, requires_grad=True)
    eye = torch.eye(image.shape[1], dtype=columns.dtype, device=columns.device)
    heads: Heads = (eye, eye.clone())
    kind, tau = columns.dtype, training.temperature
    target = Target(target.image.to(kind), target.label, target.text.to(kind))
    start = float(target_loss(target, heads, tau))
    optimizer = torch.optim.Adam([weights], lr=training.weight_rate)
    with torch.enable_grad():
        for step in range(training.steps):
            rows = _drawn(training, _POOL, step, len(columns)).to(columns.device)
            own = _drawn(training, _TARGET, step, len(target.image)).to(columns.device)
            heads = stepped(weights, columns[rows], image[rows].to(kind), text[rows].to(kind), heads, training)
            loss = target_loss(Target(target.image[own], target.label[own], target.text), heads, tau)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            heads = (heads[0].detach(), heads[1].detach())
            on_step()
    return LearnedMix(weights.detach(), start, float(target_loss(target, heads, tau)))


def _drawn(training: MixTraining, purpose: int, step: int, n: int) -> Tensor:
    place = np.arange(training.batch, dtype=np.uint64)
    hashes = keyed_hash(training.seed, purpose, np.full(training.batch, step, np.uint64), place)
    return torch.from_numpy((hashes % np.uint64(n)).astype(np.int64)).unique()


def _check(columns: Tensor, image: Tensor, text: Tensor, target: Target) -> None:
    if columns.ndim != 2 or image.shape != text.shape or len(columns) != len(image) or not len(columns):
        raise ValueError(
            f"columns are [n, S], image and text [n, d], not {tuple(columns.shape)}, {tuple(image.shape)} and "
            f"{tuple(text.shape)}"
        )
    if target.image.shape[1:] != image.shape[1:] or target.text.shape[1:] != image.shape[1:]:
        raise ValueError(f"the target's embeddings have another width than the pool's {image.shape[1]}")
    if len(target.label) != len(target.image) or not 0 <= int(target.label.min()) <= int(target.label.max()) < len(
        target.text
    ):
        raise ValueError(f"labels are from 0 to {len(target.text) - 1}, one an image of the target")
    for name, values in {"columns": columns, "image": image, "text": text, "target": target.image}.items():
        if not values.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity")
