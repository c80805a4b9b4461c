"""NormSim: similarity of an image to the images of a target set (arXiv 2405.19547); vision embeddings only.

Notation: v_i the image embedding of pool row i, u_t the embedding of target image t, all of unit norm.
"""

import math

import torch
from torch import Tensor

from selection.similarity.reduction import Arithmetic, Tiles, check_matrices, for_each_tile, largest

SAME_IMAGE = 0.99999  # cosine above which two embeddings are of one image
_NORM_TOLERANCE = 0.01  # by which a product of embeddings of unit norm may be below their cosine
_BLOCKS = 4  # of columns of a triangular factor


@torch.no_grad()
def norm_sim(image: Tensor, target: Tensor, *, p: float, arithmetic: Arithmetic = "float32") -> Tensor:
    """Compute NormSim_p(i) = (Σ_t |u_t · v_i|^p)^(1/p) for p = 2, and max_t |u_t · v_i| for p = ∞.

    p = 2 uses the targets' second moment. To score many shards against one target set, compute `second_moment` once
    and call `norm_sim_from_moment`.

    Args:
        image: [n, d] float16, bfloat16 or float32, unit norm.
        target: [N_T, d], likewise.
        p: 2 or infinity.
        arithmetic: for p = ∞, as in `nearest_target`.

    Returns:
        float32 [n].

    Raises:
        ValueError: p is another number, shapes, dtypes or devices do not fit, or an argument is empty or not finite.
    """
    if p == 2:
        _check(image=image, target=target)
        return norm_sim_from_moment(image, second_moment(target))
    if p == math.inf:
        return nearest_target(image, target, arithmetic=arithmetic)[0]
    raise ValueError(f"p must be 2 or infinity, not {p}")


@torch.no_grad()
def nearest_target(image: Tensor, target: Tensor, *, arithmetic: Arithmetic = "float32") -> tuple[Tensor, Tensor]:
    """Compute NormSim_∞ and the target that attains it.

    Args:
        image: [n, d] float16, bfloat16 or float32, unit norm.
        target: [N_T, d], likewise.
        arithmetic: "float32", or "bfloat16" for a faster search on CPU, which may return a target that is not quite
            the nearest (docs/performance.md); the value is the float32 similarity to that target.

    Returns:
        max_t |u_t · v_i|, float32 [n]; its t, int64 [n], the lowest of equals.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or an argument is empty or not finite.
    """
    _check(image=image, target=target)
    return largest(image, target, arithmetic=arithmetic)


@torch.no_grad()
def second_moment(target: Tensor) -> Tensor:
    """Compute Σ_t u_t u_tᵀ, float64 [d, d], for target [N_T, d] in float16, bfloat16 or float32."""
    _check(target=target)
    moment = target.new_zeros(target.shape[1], target.shape[1], dtype=torch.float64)
    for part in target.split(4096):
        wide = part.double()
        moment.addmm_(wide.T, wide)
    return moment


@torch.no_grad()
def norm_sim_from_moment(image: Tensor, moment: Tensor) -> Tensor:
    """Compute NormSim_2(i) = sqrt(v_iᵀ M v_i) from the second moment M.

    It is |Lᵀ v_i| with M = L Lᵀ: a sum of squares, which cannot cancel in float32 as the quadratic form can. The
    absolute error is about 1e-6 · sqrt(trace M), which is 1e-6 of the largest possible score.

    Args:
        image: [n, d] float16, bfloat16 or float32.
        moment: float64 [d, d] from `second_moment`, on the same device.

    Returns:
        float32 [n].

    Raises:
        ValueError: shapes or devices do not fit, or an argument is empty or not finite.
    """
    _check(image=image)
    d = image.shape[1]
    if moment.shape != (d, d) or moment.dtype != torch.float64 or moment.device != image.device:
        raise ValueError(
            f"moment must be float64 [{d}, {d}] on {image.device}, "
            f"not {moment.dtype} {list(moment.shape)} on {moment.device}"
        )
    return norm_sim_from_factor(image, moment_factor(moment))


def moment_factor(moment: Tensor) -> Tensor:
    """Return the lower triangular L with L Lᵀ = M, float32 [d, d], for a second moment M, float64 [d, d].

    Raises:
        ValueError: the moment is not finite.
    """
    # With fewer targets than dimensions the moment is singular, and Cholesky needs a shift. This one changes a score by
    # less than float32 resolves beside the largest score.
    trace = moment.trace()
    if not torch.isfinite(trace):
        raise ValueError("moment holds NaN or infinity")
    d = len(moment)
    shift = trace.clamp(min=1e-200) * (d * torch.finfo(torch.float64).eps)
    eye = torch.eye(d, dtype=torch.float64, device=moment.device)
    return torch.linalg.cholesky(moment + shift * eye).float()


@torch.no_grad()
def norm_sim_from_factor(image: Tensor, factor: Tensor) -> Tensor:
    """Compute NormSim_2(i) = |Lᵀ v_i|, float32 [n], for image [n, d] and L of `moment_factor`."""
    _check(image=image)
    d = image.shape[1]
    # L is lower triangular, so a block of its columns is multiplied from its first nonzero row on.
    width = -(-d // _BLOCKS)
    blocks = [(start, factor[start:, start : start + width]) for start in range(0, d, width)]
    score = torch.empty(len(image), device=image.device)

    def task(tiles: Tiles, at: slice) -> None:
        wide = tiles.rows(image, at).float()
        squares = torch.zeros(tiles.height, device=image.device)
        for start, block in blocks:
            squares += (wide[:, start:] @ block).square_().sum(1)
        score[at] = squares[: at.stop - at.start].sqrt()

    for_each_tile(len(image), image, task)
    return score


@torch.no_grad()
def same_images(image: Tensor, target: Tensor, nearest: Tensor, value: Tensor) -> Tensor:
    """Return which images also occur in the target set: their cosine to the nearest target is above 0.99999.

    Both are scaled to unit norm first, because rounding to float16 alone can change the cosine of a copy by more than
    1e-5.

    Args:
        image: [n, d] float16, bfloat16 or float32, of about unit norm.
        target: [m, d], likewise.
        nearest: integers [n], as `nearest_target` returns them.
        value: [n], as `nearest_target` returns it.

    Returns:
        bool [n].
    """
    same = torch.zeros(len(image), dtype=torch.bool, device=image.device)
    for rows in (value > SAME_IMAGE - _NORM_TOLERANCE).nonzero()[:, 0].split(8192):
        v, u = image[rows].double(), target[nearest[rows].long()].double()
        same[rows] = (v * u).sum(1).abs() > SAME_IMAGE * v.norm(dim=1) * u.norm(dim=1)
    return same


def _check(**matrices: Tensor) -> None:
    for name, matrix in matrices.items():
        if matrix.ndim != 2:
            raise ValueError(f"{name} must have shape [n, d], not {list(matrix.shape)}")
    check_matrices(**matrices)
