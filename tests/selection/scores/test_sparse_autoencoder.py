"""The k-sparse autoencoder against a float64 oracle, and what training achieves."""

import numpy as np
import pytest
import torch

from selection.recipes.distribution import Features, concept_distribution
from selection.scores.sparse_autoencoder import dead_share, reconstruction_error, train_sparse_autoencoder


def _mixtures(rows, seed=0):
    """Return unit vectors that each mix two of 12 directions."""
    random = np.random.default_rng(seed)
    directions = np.random.default_rng(99).standard_normal((12, 16))
    weights = np.zeros((rows, 12))
    for row in weights:
        row[random.choice(12, 2, replace=False)] = 0.5 + random.random(2)
    mixed = weights @ directions
    return torch.from_numpy(mixed / np.linalg.norm(mixed, axis=1, keepdims=True)).half()


@pytest.fixture(scope="module")
def model():
    return train_sparse_autoencoder(_mixtures(2_000), concepts=64, k=4, steps=300, batch=128)


def test_the_features_are_the_k_largest_activations_of_a_float64_oracle(model):
    image = _mixtures(50, seed=1)
    index, value = model.encode(image)
    wide = image.double().numpy()
    active = (wide - model.bias.double().numpy()) @ model.encoder.double().numpy().T
    active = np.maximum(active + model.encoder_bias.double().numpy(), 0)
    dense = np.zeros_like(active)
    for row, (concepts, values) in enumerate(zip(index.tolist(), value.tolist(), strict=True)):
        for concept, one in zip(concepts, values, strict=True):
            dense[row, concept] += one
    expected = np.where(active >= np.sort(active, axis=1)[:, [-4]], active, 0)
    np.testing.assert_allclose(dense, expected, atol=2e-3)
    decoded = dense @ model.decoder.double().numpy() + model.bias.double().numpy()
    np.testing.assert_allclose(model.reconstruct(index, value).numpy(), decoded, atol=1e-5)
    assert (index.dtype, value.dtype) == (torch.int32, torch.float16)


def test_the_selection_reads_the_features(model):
    index, value = model.encode(_mixtures(50, seed=1))
    assert concept_distribution(Features(index.numpy(), value.numpy()), 64).sum() == pytest.approx(1)


def test_training_explains_rows_that_it_has_not_seen(model):
    unseen = _mixtures(500, seed=2)
    untrained = train_sparse_autoencoder(_mixtures(2_000), concepts=64, k=4, steps=0)
    assert reconstruction_error(model, unseen) < 0.5 * reconstruction_error(untrained, unseen)
    assert 0 <= dead_share(model, unseen) < 1
    assert dead_share(model, unseen[:1]) >= 1 - 4 / 64


def test_the_same_seed_gives_the_same_parameters():
    image = _mixtures(200)
    one, same, other = (train_sparse_autoencoder(image, concepts=32, k=3, steps=5, seed=s) for s in (1, 1, 2))
    assert torch.equal(one.encoder, same.encoder)
    assert torch.equal(one.bias, same.bias)
    assert not torch.equal(one.encoder, other.encoder)


def test_a_row_without_concepts_is_filled_with_zeros(model):
    index, value = model.encode(model.bias[None] - 0 * model.bias)
    assert ((value > 0) | (index == 0)).all()


@pytest.mark.parametrize("change", [{"k": 0}, {"k": 33}, {"steps": -1}, {"batch": 0}, {"learning_rate": 0.0}])
def test_a_number_out_of_range_is_refused(change):
    with pytest.raises(ValueError, match="k is from 1 to the 32 concepts"):
        train_sparse_autoencoder(_mixtures(10), **{"concepts": 32, "k": 3, "steps": 1} | change)


def test_embeddings_that_are_not_finite_are_refused(model):
    image = _mixtures(4)
    image[2, 3] = float("nan")
    with pytest.raises(ValueError, match="image holds NaN or infinity"):
        model.encode(image)
    with pytest.raises(ValueError, match="image holds NaN or infinity"):
        train_sparse_autoencoder(image, concepts=4, k=2, steps=1)
