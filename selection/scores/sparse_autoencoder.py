"""A k-sparse autoencoder on image embeddings: the concepts of target distribution matching (SDM).

z = TopK_k(ReLU(W_e (v − b) + b_e)), v̂ = W_d z + b, trained to a small |v − v̂|² (openreview cgmo3v18sx). Here: training
and encoding. Not here: which rows are trained on, files, and the selection (`selection.recipes.distribution`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from selection.similarity.reduction import check_matrices

_ROWS = 4_096  # encoded at once


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


def train_sparse_autoencoder(
    image: Tensor, *, concepts: int, k: int, steps: int, batch: int = 256, learning_rate: float = 1e-3, seed: int = 0
) -> SparseAutoencoder:
    """Train an autoencoder with Adam on the mean of |v − v̂|² over batches.

    Each concept starts as a row of `image` less the mean, so rows should come in random order. Decoder rows are
    scaled to unit norm after every step. Equal arguments give equal parameters on one CPU with one number of threads.

    Args:
        image: [n, D] float16, bfloat16 or float32, on the device to train on.
        concepts: d.
        k: Largest number of concepts of a row.
        steps: Number of batches, 0 or more.
        batch: Rows of a batch, drawn with repeats.
        learning_rate: Adam's.
        seed: Any integer; the order of the batches and the noise of the start.

    Raises:
        ValueError: image is empty or not finite, or a number is out of its range.
    """
    wide = image.float()
    check_matrices(image=wide)
    if not 1 <= k <= concepts or steps < 0 or batch < 1 or not learning_rate > 0:
        raise ValueError(
            f"k is from 1 to the {concepts} concepts, steps is not negative, batch and learning_rate are above 0; "
            f"found k {k}, steps {steps}, batch {batch}, learning_rate {learning_rate}"
        )
    generator = torch.Generator().manual_seed(seed)
    bias = wide.mean(dim=0)
    noise = torch.randn(concepts, wide.shape[1], generator=generator).to(wide.device)
    rows = torch.arange(concepts, device=wide.device) % len(wide)
    # Noise separates concepts that start from the same row.
    start = torch.nn.functional.normalize(wide[rows] - bias + 0.01 * noise, dim=1)
    model = SparseAutoencoder(start.clone(), torch.zeros(concepts, device=wide.device), start.clone(), bias.clone(), k)
    parameters = [model.encoder, model.encoder_bias, model.decoder, model.bias]
    for parameter in parameters:
        parameter.requires_grad_()
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    with torch.enable_grad():
        for _ in range(steps):
            drawn = torch.randint(len(wide), (batch,), generator=generator).to(wide.device)
            part = wide[drawn]
            value, index = _top(model, part)
            dense = torch.zeros(batch, concepts, device=wide.device).scatter(1, index, value)
            loss = (part - dense @ model.decoder - model.bias).square().sum(dim=1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                model.decoder.copy_(torch.nn.functional.normalize(model.decoder, dim=1))
    encoder, encoder_bias, decoder, bias_ = (parameter.detach() for parameter in parameters)
    return SparseAutoencoder(encoder, encoder_bias, decoder, bias_, k)


@torch.no_grad()
def reconstruction_error(model: SparseAutoencoder, image: Tensor) -> float:
    """Compute Σ |v − v̂|² / Σ |v − mean|², the share of the variance that is lost; image is [n, D]."""
    wide = image.float()
    lost = (wide - model.reconstruct(*model.encode(image))).double().square().sum()
    return float(lost / (wide - wide.mean(dim=0)).double().square().sum())


def dead_share(model: SparseAutoencoder, image: Tensor) -> float:
    """Compute the share of the d concepts that no row of image, [n, D], has."""
    index, value = model.encode(image)
    return 1 - len(index[value > 0].unique()) / len(model.encoder)


def _top(model: SparseAutoencoder, image: Tensor) -> tuple[Tensor, Tensor]:
    """Return the k largest values of ReLU(W_e (v − b) + b_e) and their concepts."""
    active = torch.relu((image - model.bias) @ model.encoder.T + model.encoder_bias)
    value, index = active.topk(model.k, dim=1)
    return value, index
