"""Clusters of image embeddings by cosine, as DataComp's image-based filter wants them (arXiv 2304.14108).

Here: the nearest centroid of each row, and k-means on the sphere. Which rows are clustered is the caller's choice.
"""

import torch
from torch import Tensor

from selection.similarity.reduction import check_matrices, largest


@torch.no_grad()
def nearest_centroid(image: Tensor, centroid: Tensor) -> Tensor:
    """argmax_c v_i · m_c, the lowest c of equals; products in float32.

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
def spherical_k_means(image: Tensor, *, clusters: int, iterations: int) -> Tensor:
    """Cluster unit vectors by cosine: rows go to the nearest centroid, a centroid is the unit vector of its rows' sum.

    The first `clusters` rows are the centroids to begin with, so the rows should come in random order. A centroid that
    no row goes to stays where it is. It ends early when no row changes its cluster.

    Args:
        image: [n, d] float16, bfloat16 or float32, unit norm.
        clusters: K.
        iterations: how often rows are assigned at most.

    Returns:
        float32 [K, d], unit norm.

    Raises:
        ValueError: there are fewer rows than clusters.
    """
    if len(image) < clusters:
        raise ValueError(f"{len(image)} rows are fewer than {clusters} clusters. Remedy: fewer clusters, or more rows")
    centroid = torch.nn.functional.normalize(image[:clusters].float(), dim=1)
    before: Tensor | None = None
    for _ in range(iterations):
        nearest = nearest_centroid(image, centroid)
        if before is not None and torch.equal(nearest, before):
            break
        before = nearest
        # On CPU, where rows are added one after the other: CUDA adds them in any order, and bits would differ.
        sums = torch.zeros(clusters, image.shape[1], dtype=torch.float64)
        for rows, some in zip(image.split(16_384), nearest.split(16_384), strict=True):
            sums.index_add_(0, some.cpu(), rows.cpu().double())
        norms = sums.norm(dim=1, keepdim=True)
        centroid = torch.where(norms > 0, sums / norms.clamp(min=1e-12), centroid.cpu().double()).float()
        centroid = centroid.to(image.device)
    return centroid
