"""A k-sparse autoencoder on image embeddings: the concepts of target distribution matching (SDM).

z = TopK_k(ReLU(W_e (v − b) + b_e)), v̂ = W_d z + b, trained to a small |v − v̂|² (openreview cgmo3v18sx). Here: training
and encoding. Not here: which rows are trained on, files, and the selection (`selection.recipes.distribution`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selection.scores.negatives import keyed_hash
from selection.similarity.reduction import check_matrices

_ROWS = 4_096  # encoded at once
_SET = 16  # rows of a set of the monotonicity loss
_NEIGHBOURS = 4_096  # rows among which the nearest are looked for
_SMALL = 1e-3  # smallest |Δ|
# First draw number in the keyed hash; those of negatives count from 0.
_APART = 3 << 61


@dataclass(frozen=True)
class SparseAutoencoder:
    """The parameters of a trained autoencoder, float32.

    Attributes:
        encoder: W_e, [d, D].
        encoder_bias: b_e, [d].
        decoder: W_d as rows of unit norm, [d, D].
        bias: b, [D].
        k: Largest number of concepts of a row.
    """

    encoder: Tensor
    encoder_bias: Tensor
    decoder: Tensor
    bias: Tensor
    k: int

    @torch.no_grad()
    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the concepts of rows and their values z.

        Args:
            image: [n, D] float16, bfloat16 or float32.

        Returns:
            The concepts, int32 [n, k], and z, float16 [n, k]. Concepts of a row ascend, behind entries of concept 0 and
            value 0 that fill rows with fewer than k concepts.

        Raises:
            ValueError: shapes or devices do not fit, an argument is empty or not finite, or z exceeds float16.
        """
        check_matrices(image=image.float(), encoder=self.encoder)
        found = [_top(self, part.float()) for part in image.split(_ROWS)]
        value = torch.cat([value for value, _ in found]).half()
        if not value.isfinite().all():
            raise ValueError("a feature exceeds float16. Remedy: encode embeddings of unit norm")
        index = torch.where(value > 0, torch.cat([index for _, index in found]), 0)
        order = index.sort(dim=1, stable=True).indices
        index, value = index.gather(1, order), value.gather(1, order)
        # Entries of value 0 stand before concept 0 itself.
        order = (value > 0).to(torch.uint8).sort(dim=1, stable=True).indices
        return index.gather(1, order).int(), value.gather(1, order)

    @torch.no_grad()
    def reconstruct(self, index: Tensor, value: Tensor) -> Tensor:
        """Compute v̂ = W_d z + b, float32 [n, D], of the result of `encode`."""
        return (self.decoder[index.long()] * value.float()[..., None]).sum(dim=1) + self.bias


@dataclass(frozen=True)
class Training:
    """How an autoencoder is trained.

    Attributes:
        concepts: d.
        k: Largest number of concepts of a row.
        steps: Number of batches, 0 or more.
        batch: Rows of a batch, drawn with repeats.
        learning_rate: Adam's.
        monotonicity: Weight of the monotonicity loss, 0 or more.
        seed: Any integer; the rows of each batch and the noise of the start.
    """

    concepts: int
    k: int
    steps: int
    batch: int = 256
    learning_rate: float = 1e-3
    monotonicity: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        positive = self.batch >= 1 and self.learning_rate > 0 and self.monotonicity >= 0
        if not 1 <= self.k <= self.concepts or self.steps < 0 or not positive:
            raise ValueError(
                f"k is from 1 to the {self.concepts} concepts, batch and learning_rate are above 0, steps and "
                f"monotonicity are not negative; found k {self.k}, steps {self.steps}, batch {self.batch}, "
                f"learning_rate {self.learning_rate}, monotonicity {self.monotonicity}"
            )


Checkpoint = dict[str, NDArray[Any]]
"""Arrays of an unfinished training by name: parameters, Adam's moments, and the number of steps that are done."""


def train_sparse_autoencoder(
    image: Tensor,
    training: Training,
    *,
    checkpoint: Checkpoint | None = None,
    on_step: Callable[[int, Callable[[], Checkpoint]], None] | None = None,
) -> SparseAutoencoder:
    """Train an autoencoder with Adam on the mean of |v − v̂|² over batches, and on the monotonicity loss if asked for.

    Each concept starts as a row of `image` less the mean, so rows should come in random order. Decoder rows are
    scaled to unit norm after every step. Equal arguments give equal parameters on one CPU with one number of threads,
    also if the training was interrupted and continued from a checkpoint.

    Args:
        image: [n, D] float16, bfloat16 or float32, on the device to train on.
        training: The settings.
        checkpoint: Where to continue.
        on_step: Called after each step with the number of steps that are done and a function that returns a checkpoint.

    Raises:
        ValueError: image is empty or not finite.
    """
    check_matrices(image=image)
    model = _start(image, training)
    parameters = [model.encoder, model.encoder_bias, model.decoder, model.bias]
    optimizer = torch.optim.Adam(parameters, lr=training.learning_rate)
    done = 0 if checkpoint is None else _restore(parameters, optimizer, checkpoint)
    for parameter in parameters:
        parameter.requires_grad_()
    for step in range(done, training.steps):
        part = image[_drawn(training, step, training.batch, len(image)).to(image.device)].float()
        with torch.enable_grad():
            dense = _dense(model, part)
            loss = (part - dense @ model.decoder - model.bias).square().sum(dim=1).mean()
            if training.monotonicity:
                others = image[_drawn(training, step, _NEIGHBOURS, len(image), 1).to(image.device)].float()
                loss = loss + training.monotonicity * _monotonicity(model, part, dense, others)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.decoder.copy_(torch.nn.functional.normalize(model.decoder, dim=1))
        if on_step is not None:
            on_step(step + 1, partial(_checkpoint, parameters, optimizer, step + 1))
    encoder, encoder_bias, decoder, bias = (parameter.detach() for parameter in parameters)
    return SparseAutoencoder(encoder, encoder_bias, decoder, bias, training.k)


def _start(image: Tensor, training: Training) -> SparseAutoencoder:
    generator = torch.Generator().manual_seed(training.seed)
    mean = torch.zeros(image.shape[1], dtype=torch.float64, device=image.device)
    for part in image.split(_ROWS):
        mean += part.double().sum(dim=0)
    bias = (mean / len(image)).float()
    noise = torch.randn(training.concepts, image.shape[1], generator=generator).to(image.device)
    rows = torch.arange(training.concepts, device=image.device) % len(image)
    # Noise separates concepts that start from the same row.
    start = torch.nn.functional.normalize(image[rows].float() - bias + 0.01 * noise, dim=1)
    zeros = torch.zeros(training.concepts, device=image.device)
    return SparseAutoencoder(start.clone(), zeros, start.clone(), bias, training.k)


def _drawn(training: Training, step: int, count: int, n: int, purpose: int = 0) -> Tensor:
    """Return rows of a step's batch, a keyed hash of the seed, the step and their place in it."""
    place = np.arange(count, dtype=np.uint64)
    hashes = keyed_hash(training.seed, _APART + purpose, np.full(count, step, np.uint64), place)
    return torch.from_numpy((hashes % np.uint64(n)).astype(np.int64))


def _dense(model: SparseAutoencoder, image: Tensor) -> Tensor:
    """Return z as a dense matrix [n, d]."""
    value, index = _top(model, image)
    return torch.zeros(len(image), len(model.encoder), device=image.device).scatter(1, index, value)


def _monotonicity(model: SparseAutoencoder, image: Tensor, dense: Tensor, others: Tensor) -> Tensor:
    """Return the monotonicity loss of a batch, a scalar; 0 if it has fewer rows than a set.

    The batch is cut into mixed sets E. M holds the rows of `others` that are nearest to the first row of E. With
    f(A) = Σ_i log(1 + Σ_{j∈A} z_ji) and Δ the difference of the sets' mean pairwise dissimilarities 1 − cos of v:
    L = |Δ| log(1 + exp(1 − (f(E) − f(M)) / Δ)), averaged over the sets (openreview cgmo3v18sx, with the sign that its
    text states).
    """
    sets = len(image) // _SET
    if not sets or len(others) < _SET:
        return image.new_zeros(())
    mixed = image[: sets * _SET].view(sets, _SET, -1)
    near = (mixed[:, 0] @ others.T).topk(_SET, dim=1).indices
    alike = others[near]
    gap = _dissimilarity(mixed) - _dissimilarity(alike)
    gap = torch.where(gap.abs() < _SMALL, torch.full_like(gap, _SMALL), gap)
    counts = dense[: sets * _SET].view(sets, _SET, -1).sum(dim=1)
    other_counts = _dense(model, alike.flatten(0, 1)).view(sets, _SET, -1).sum(dim=1)
    rise = counts.log1p().sum(dim=1) - other_counts.log1p().sum(dim=1)
    return (gap.abs() * torch.nn.functional.softplus(1 - rise / gap)).mean()


def _dissimilarity(image: Tensor) -> Tensor:
    """Return the mean of 1 − cos over the pairs of different rows of each set; image is [sets, rows, D]."""
    unit = torch.nn.functional.normalize(image, dim=2)
    size = image.shape[1]
    total = unit.sum(dim=1).square().sum(dim=1)
    return 1 - (total - size) / (size * (size - 1))


def _checkpoint(parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer, done: int) -> Checkpoint:
    found: Checkpoint = {"done": np.array(done)}
    for number, parameter in enumerate(parameters):
        found[f"parameter{number}"] = parameter.detach().cpu().numpy()
        for name, value in optimizer.state[parameter].items():
            found[f"{name}{number}"] = value.cpu().numpy()
    return found


def _restore(parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer, checkpoint: Checkpoint) -> int:
    for number, parameter in enumerate(parameters):
        parameter.copy_(torch.from_numpy(checkpoint[f"parameter{number}"]))
        optimizer.state[parameter] = {
            "step": torch.from_numpy(checkpoint[f"step{number}"]),
            "exp_avg": torch.from_numpy(checkpoint[f"exp_avg{number}"]).to(parameter.device),
            "exp_avg_sq": torch.from_numpy(checkpoint[f"exp_avg_sq{number}"]).to(parameter.device),
        }
    return int(checkpoint["done"])


@dataclass(frozen=True)
class Fit:
    """How an autoencoder fits some rows.

    Attributes:
        reconstruction_error: Σ |v − v̂|² / Σ |v − mean|², the share of the variance that is lost.
        dead_share: Share of the d concepts that no row has.
    """

    reconstruction_error: float
    dead_share: float


@torch.no_grad()
def fit(model: SparseAutoencoder, image: Tensor) -> Fit:
    """Measure how an autoencoder fits rows; image is [n, D]."""
    lost, total = 0.0, 0.0
    used = torch.zeros(len(model.encoder), dtype=torch.bool, device=image.device)
    parts = image.split(_ROWS)
    mean = torch.stack([part.double().sum(dim=0) for part in parts]).sum(dim=0) / len(image)
    for part in parts:
        index, value = model.encode(part)
        used[index[value > 0].long()] = True
        lost += float((part.double() - model.reconstruct(index, value).double()).square().sum())
        total += float((part.double() - mean).square().sum())
    return Fit(lost / total if total else 0.0, 1 - float(used.double().mean()))


def _top(model: SparseAutoencoder, image: Tensor) -> tuple[Tensor, Tensor]:
    """Return the k largest values of ReLU(W_e (v − b) + b_e) and their concepts."""
    active = torch.relu((image - model.bias) @ model.encoder.T + model.encoder_bias)
    value, index = active.topk(model.k, dim=1)
    return value, index
