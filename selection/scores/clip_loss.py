"""CLIPScore and negCLIPLoss: scores of a pair's image against its own text.

Notation, as in the negCLIPLoss paper (arXiv 2405.19547; s-CLIPLoss in its final version): s_ij is the dot product
of image embedding i and text embedding j, both of unit norm, τ the temperature. Larger is better.
"""

import math

import torch
from torch import Tensor

from selection.similarity.reduction import (
    Arithmetic,
    Tiles,
    check_matrices,
    for_each_tile,
    log_sum_exp,
    log_sum_exp_both,
    row_dots,
    spans,
)

TEMPERATURES = (0.001, 10.0)
_FEISTEL_ROUNDS = 6
_CHUNK = 65_536  # rows whose scores by draw are in memory


@torch.no_grad()
def clip_score(image: Tensor, text: Tensor) -> Tensor:
    """Compute CLIPScore, the similarity s_ii of each pair. With a filtering encoder it is the DFN score.

    Args:
        image: [n, d] float16, bfloat16 or float32, unit norm.
        text: [n, d], likewise.

    Returns:
        float32 [n].

    Raises:
        ValueError: shapes, dtypes or devices differ, or an argument is empty or not finite.
    """
    _check_pairs(image, text)
    return _own(image, text)


@torch.no_grad()
def neg_clip_loss(
    image: Tensor,
    text: Tensor,
    negative_image: Tensor,
    negative_text: Tensor,
    *,
    temperature: float,
    member: Tensor | None = None,
    arithmetic: Arithmetic = "float32",
) -> tuple[Tensor, Tensor]:
    """Compute negCLIPLoss against reference negatives, and its standard error.

    For row i and draw k, with β the batch of B rows (arXiv 2405.19547, eq. for R and s-CLIPLoss):

        R_k(i) = τ/2 · [ log Σ_{j∈β} exp(s_ij/τ) + log Σ_{j∈β} exp(s_ji/τ) ]
        score(i) = mean over k of ( s_ii - R_k(i) )

    β is the draw if i is a member of it, else row i and the draw's first B-1 rows. So each sum has exactly B terms, i
    among them. Draws are read a tile at a time and may be memory-mapped.

    The score never exceeds 0, because s_ii is a term of both sums. A member's s_ii is computed twice, by itself and
    inside the draw, and the two may differ in the last bit; a positive score is that rounding, and becomes 0.

    Args:
        image: [n, d] float16, bfloat16 or float32, unit norm.
        text: [n, d], likewise.
        negative_image: [K, B, d], likewise: K draws of B pool rows.
        negative_text: [K, B, d], the same rows' texts.
        temperature: τ, from 0.001 to 10.
        member: bool [K, n], row i is in draw k; None if no row is in any draw.
        arithmetic: "float32", or "bfloat16" for a faster product on CPU; its error is in docs/performance.md.

    Returns:
        score float32 [n], at most 0; standard error over the draws float32 [n], NaN when K is 1.

    Raises:
        ValueError: an argument's shape, dtype, device or value is not as above.
    """
    _check_pairs(image, text, negative_image=negative_image, negative_text=negative_text)
    _check_temperature(temperature)
    draws = _check_draws(negative_image, negative_text)
    n = len(image)
    if member is not None:
        _check_member(member, (draws, n), image.device)

    score = torch.empty(n, device=image.device)
    stderr = torch.full((n,), math.nan, device=image.device)
    for at in spans(n, _CHUNK):
        v, t = image[at], text[at]
        own = _own(v, t)
        by_draw = own.double().repeat(draws, 1)
        for k in range(draws):
            for queries, draw in ((v, negative_text[k]), (t, negative_image[k])):
                # All batches share the draw's first B-1 rows; the last term is s_ii, for a member the draw's last row.
                last = own
                if member is not None:
                    last = torch.where(member[k, at], _own(queries, draw[-1:].expand_as(queries)), own)
                by_draw[k] -= log_sum_exp(queries, draw[:-1], last, temperature=temperature, arithmetic=arithmetic) / 2
        by_draw.clamp_(max=0)
        score[at] = by_draw.mean(0).float()
        if draws > 1:
            stderr[at] = (by_draw.std(0, correction=1) / math.sqrt(draws)).float()
    return score, stderr


@torch.no_grad()
def neg_clip_loss_in_batches(
    image: Tensor,
    text: Tensor,
    *,
    temperature: float,
    batch_size: int,
    draws: int,
    seed: int,
    fill_image: Tensor | None = None,
    fill_text: Tensor | None = None,
    fill_allowed: Tensor | None = None,
    arithmetic: Arithmetic = "float32",
) -> Tensor:
    """Compute negCLIPLoss by the paper's estimator: random partitions of the rows into batches.

    The equation is that of `neg_clip_loss`, with β the row's batch in each partition. Every batch has exactly
    `batch_size` different rows: the last batch of a partition is filled up with rows of its start, which are not scored
    again. Where n is below `batch_size` and fill is given, partition k is one batch: all rows, and the first allowed
    rows of the k-th draw of fill. Without fill the batch has n rows, and scores of different n do not compare: a
    smaller batch raises them. One pass over the similarities gives the sums of both sides. Memory grows with B, not
    with n.

    Args:
        image: [n, d] float16, bfloat16 or float32, unit norm.
        text: [n, d], likewise.
        temperature: τ, from 0.001 to 10.
        batch_size: B, at least 1.
        draws: number of partitions K, at least 1.
        seed: determines the partitions on every device.
        fill_image: [K, F, d], likewise: K draws of other rows, to fill batches with where n is below `batch_size`.
        fill_text: [K, F, d], the same rows' texts.
        fill_allowed: bool [K, F], the row of the fill is not one of the n rows; None if none is.
        arithmetic: as in `neg_clip_loss`.

    Returns:
        score float32 [n], at most 0.

    Raises:
        ValueError: an argument's shape, dtype, device or value is not as above.
    """
    fill = {} if fill_image is None or fill_text is None else {"fill_image": fill_image, "fill_text": fill_text}
    _check_pairs(image, text, **fill)
    _check_temperature(temperature)
    for name, value in (("batch_size", batch_size), ("draws", draws)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")

    n = len(image)
    size = min(batch_size, n)
    beside = _check_fill(fill_image, fill_text, fill_allowed, draws=draws, missing=batch_size - size)
    score = torch.zeros(n, device=image.device)
    generator = torch.Generator().manual_seed(seed)
    for k in range(draws):
        keys = torch.randint(2**32, (_FEISTEL_ROUNDS,), generator=generator).tolist()
        for start in range(0, n, size):
            positions = torch.arange(start, start + size, device=image.device) % n
            batch = _shuffled(positions, n, keys)
            fresh = min(size, n - start)
            v, t = image[batch], text[batch]
            if beside is not None and fill_image is not None and fill_text is not None:
                v, t = torch.cat([v, fill_image[k, beside[k]]]), torch.cat([t, fill_text[k, beside[k]]])
            sums = log_sum_exp_both(v, t, temperature=temperature, arithmetic=arithmetic)
            in_batch = (_own(v, t) - (sums[0] + sums[1]) / 2).clamp_(max=0).float()
            score[batch[:fresh]] += in_batch[:fresh] / draws
    return score


def _own(left: Tensor, right: Tensor) -> Tensor:
    """Return the dot product of each row of left [n, d] with the same row of right [n, d], float32 [n]."""
    dots = torch.empty(len(left), device=left.device)

    def task(tiles: Tiles, at: slice) -> None:
        dots[at] = row_dots(tiles.rows(left, at), tiles.rows(right, at))[: at.stop - at.start]

    for_each_tile(len(left), left, task)
    return dots


def _shuffled(positions: Tensor, n: int, keys: list[int]) -> Tensor:
    """Return the rows at the given positions of a keyed random permutation of range(n), without storing it.

    A Feistel network permutes the numbers of 2h bits. Results outside range(n) go through it again until they are
    inside (cycle walking), which permutes range(n).
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    low = 2**half - 1
    rows = positions
    outside = torch.ones_like(rows, dtype=torch.bool)
    while outside.any():
        left, right = rows >> half, rows & low
        for key in keys:
            # Factors below 2^31 and operands below 2^32 keep the products inside int64.
            mixed = (right ^ key) & 0xFFFFFFFF
            mixed = ((mixed ^ (mixed >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
            mixed = ((mixed ^ (mixed >> 15)) * 0x6C8E9CF5) & 0xFFFFFFFF
            left, right = right, left ^ ((mixed ^ (mixed >> 16)) & low)
        rows = torch.where(outside, (left << half) | right, rows)
        outside = rows >= n
    return rows


def _check_pairs(image: Tensor, text: Tensor, **others: Tensor) -> None:
    for name, matrix in (("image", image), ("text", text)):
        if matrix.ndim != 2:
            raise ValueError(f"{name} must have shape [n, d], not {list(matrix.shape)}")
    if image.shape != text.shape:
        raise ValueError(
            f"text has shape {list(text.shape)}, but image has {list(image.shape)}: row i of both must be one pair"
        )
    check_matrices(image=image, text=text, **others)


def _check_temperature(temperature: float) -> None:
    low, high = TEMPERATURES
    if not low <= temperature <= high:
        raise ValueError(f"temperature must lie between {low} and {high}, not {temperature}")


def _check_draws(negative_image: Tensor, negative_text: Tensor) -> int:
    for name, draws in (("negative_image", negative_image), ("negative_text", negative_text)):
        if draws.ndim != 3:
            raise ValueError(f"{name} must have shape [K, B, d], not {list(draws.shape)}")
    if negative_image.shape != negative_text.shape:
        raise ValueError(
            f"negative_text has shape {list(negative_text.shape)}, but negative_image has {list(negative_image.shape)}"
        )
    return len(negative_image)


def _check_fill(
    image: Tensor | None, text: Tensor | None, allowed: Tensor | None, *, draws: int, missing: int
) -> Tensor | None:
    """Return which rows of each draw of the fill complete the batches, int64 [K, missing]; None where none do."""
    if image is None and text is None:
        return None
    if image is None or text is None:
        raise ValueError("fill_image and fill_text go together: give both or neither")
    for name, part in (("fill_image", image), ("fill_text", text)):
        if part.ndim != 3 or len(part) != draws:
            raise ValueError(f"{name} must have shape [K, F, d] with K = {draws}, not {list(part.shape)}")
    if image.shape != text.shape:
        raise ValueError(f"fill_text has shape {list(text.shape)}, but fill_image has {list(image.shape)}")
    if allowed is None:
        allowed = torch.ones(image.shape[:2], dtype=torch.bool, device=image.device)
    elif allowed.dtype != torch.bool or allowed.shape != image.shape[:2]:
        raise ValueError(
            f"fill_allowed must be bool of shape [K, F] = {list(image.shape[:2])}, not {allowed.dtype} of "
            f"{list(allowed.shape)}"
        )
    if not missing:
        return None
    least = int(allowed.sum(1).min())
    if least < missing:
        raise ValueError(f"fill_allowed leaves {least} rows of a draw, and each batch lacks {missing}")
    # A stable sort puts the allowed rows first and keeps their order.
    return (~allowed).to(torch.uint8).sort(dim=1, stable=True).indices[:, :missing]


def _check_member(member: Tensor, shape: tuple[int, int], device: torch.device) -> None:
    if member.dtype != torch.bool or tuple(member.shape) != shape:
        raise ValueError(
            f"member must be bool of shape [K, n] = {list(shape)}, not {member.dtype} of {list(member.shape)}"
        )
    if member.device != device:
        raise ValueError(f"member is on {member.device}, but image is on {device}")
