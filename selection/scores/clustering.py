"""Clusters of image embeddings by cosine, as in DataComp's image-based filter (arXiv 2304.14108).

Here: the nearest centroid of each row, and spherical k-means. Not here: which rows are clustered.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from selection.similarity.reduction import check_matrices, largest


@torch.no_grad()
def nearest_centroid(image: Tensor, centroid: Tensor) -> Tensor:
    """Compute argmax_c v_i · m_c, the lowest c of equals, with products in float32.

    Args:
        image: [n, d] float16, bfloat16 or float32.
        centroid: float32 [K, d].

    Returns:
        int64 [n].

    Raises:
        ValueError: shapes or devices do not fit, or an argument is empty or not finite.
    """
    wide = image.float()
    check_matrices(image=wide, centroid=centroid)
    return largest(wide, centroid, signed=True)[1]


@torch.no_grad()
def spherical_k_means(
    image: Tensor, *, clusters: int, iterations: int, nearest: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Cluster unit vectors by cosine: rows join the nearest centroid; a centroid is the normalised sum of its rows.

    The first `clusters` rows are the first centroids, so rows should come in random order. A centroid without rows
    keeps its place. Iteration ends early when no row changes its cluster.

    Args:
        image: [n, d] float16, bfloat16 or float32, unit norm.
        clusters: K.
        iterations: largest number of assignments.
        nearest: returns `nearest_centroid` of all rows, int64 [n], for centroids, float32 [K, d], such as by several
            workers; by default here.

    Returns:
        float32 [K, d], unit norm.

    Raises:
        ValueError: there are fewer rows than clusters.
    """
    if len(image) < clusters:
        raise ValueError(
            f"{len(image)} rows are fewer than {clusters} clusters. Remedy: set fewer clusters, or use more rows"
        )
    centroid = torch.nn.functional.normalize(image[:clusters].float(), dim=1)
    before: Tensor | None = None
    for _ in range(iterations):
        found = nearest_centroid(image, centroid) if nearest is None else nearest(centroid)
        if before is not None and torch.equal(found, before):
            break
        before = found
        # On CPU, which adds rows in order; CUDA's order varies, and the bits with it.
        sums = torch.zeros(clusters, image.shape[1], dtype=torch.float64)
        for rows, some in zip(image.split(16_384), found.split(16_384), strict=True):
            sums.index_add_(0, some.cpu(), rows.cpu().double())
        norms = sums.norm(dim=1, keepdim=True)
        centroid = torch.where(norms > 0, sums / norms.clamp(min=1e-12), centroid.cpu().double()).float()
        centroid = centroid.to(image.device)
    return centroid
