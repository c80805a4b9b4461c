"""The k-sparse autoencoder against a float64 oracle, and what training achieves."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from selection import nearest_target
from selection.recipes.distribution import Features, concept_distribution, kl_divergence, match_distribution
from selection.scores.concept_labels import concept_labels, strongest_rows
from selection.scores.sparse_autoencoder import (
    SparseAutoencoder,
    Training,
    _dense,
    _monotonicity,
    fit,
    train_sparse_autoencoder,
)


def _mixtures(rows, seed=0, drawn=None):
    """Return unit vectors that each mix two of 12 directions, drawn with equal or given probabilities."""
    random = np.random.default_rng(seed)
    directions = np.random.default_rng(99).standard_normal((12, 16))
    weights = np.zeros((rows, 12))
    for row in weights:
        row[random.choice(12, 2, replace=False, p=drawn)] = 0.5 + random.random(2)
    mixed = weights @ directions
    return torch.from_numpy(mixed / np.linalg.norm(mixed, axis=1, keepdims=True)).half()


@pytest.fixture(scope="module")
def model():
    return train_sparse_autoencoder(_mixtures(2_000), Training(concepts=64, k=4, steps=300, batch=128))


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
    untrained = train_sparse_autoencoder(_mixtures(2_000), Training(concepts=64, k=4, steps=0))
    assert fit(model, unseen).reconstruction_error < 0.5 * fit(untrained, unseen).reconstruction_error
    assert fit(model, unseen[:1]).dead_share >= 1 - 4 / 64
    index, value = model.encode(unseen)
    assert fit(model, unseen).dead_share == 1 - len(np.unique(index[value > 0])) / 64
    wide = unseen.double()
    lost = (wide - model.reconstruct(index, value).double()).square().sum()
    variance = (wide - wide.mean(dim=0)).square().sum()
    assert fit(model, unseen).reconstruction_error == pytest.approx(float(lost / variance), rel=1e-6)


@pytest.mark.parametrize("monotonicity", [0.0, 0.1])
def test_the_same_seed_gives_the_same_parameters_also_from_a_checkpoint(monotonicity):
    image, saved = _mixtures(200), {}
    training = Training(concepts=32, k=3, steps=6, batch=32, monotonicity=monotonicity, seed=1)

    def keep(done, state):
        saved[done] = {name: array.copy() for name, array in state().items()}

    one = train_sparse_autoencoder(image, training, on_step=keep)
    same = train_sparse_autoencoder(image, training)
    resumed = train_sparse_autoencoder(image, training, checkpoint=saved[3])
    other = train_sparse_autoencoder(image, replace(training, seed=2))
    for name in ("encoder", "encoder_bias", "decoder", "bias"):
        assert torch.equal(getattr(one, name), getattr(same, name))
        assert torch.equal(getattr(one, name), getattr(resumed, name))
        assert not torch.equal(getattr(one, name), getattr(other, name))
    assert list(saved) == [1, 2, 3, 4, 5, 6]


def test_the_monotonicity_loss_is_that_of_a_float64_oracle(model):
    image, others = _mixtures(32, seed=3).float(), _mixtures(60, seed=4).float()
    found = _monotonicity(model, image, _dense(model, image), others)
    z, z_others = (_dense(model, part).double().numpy() for part in (image, others))
    v, v_others = (part.double().numpy() for part in (image, others))

    def mean_dissimilarity(rows):
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return np.mean([1 - unit[i] @ unit[j] for i in range(16) for j in range(16) if i != j])

    losses = []
    for start in (0, 16):
        mixed = slice(start, start + 16)
        near = np.argsort(-(v_others @ v[start]), kind="stable")[:16]
        gap = mean_dissimilarity(v[mixed]) - mean_dissimilarity(v_others[near])
        rise = np.log1p(z[mixed].sum(axis=0)).sum() - np.log1p(z_others[near].sum(axis=0)).sum()
        losses.append(abs(gap) * np.log(1 + np.exp(1 - rise / gap)))
    assert float(found.detach()) == pytest.approx(np.mean(losses), rel=1e-4)


def test_a_row_without_concepts_is_filled_with_zeros():
    eye = torch.eye(4)
    model = SparseAutoencoder(eye, torch.full((4,), -0.5), eye, torch.zeros(4), k=2)
    image = torch.tensor([[0.4, 0.4, 0.4, 0.4], [0, 0, 0, 1], [0.9, 0, 0.8, 0], [1, 0, 0, 0]])
    index, value = model.encode(image)
    assert index.tolist() == [[0, 0], [0, 3], [0, 2], [0, 0]]
    half = pytest.approx
    assert value.tolist() == [[0, 0], [0, 0.5], half([0.4, 0.3], abs=1e-3), [0, 0.5]]


def test_a_matched_set_is_distributed_more_like_the_target_than_the_rows_nearest_to_it(model):
    rare = np.arange(1, 13) / 78
    pool, target = _mixtures(1_500, seed=5, drawn=rare), _mixtures(200, seed=6, drawn=rare[::-1])
    features = Features(*(part.numpy() for part in model.encode(pool)))
    wanted = concept_distribution(Features(*(part.numpy() for part in model.encode(target))), 64)
    uids = np.arange(1_500, dtype=np.uint64)
    quality = np.zeros(1_500, int)
    matched = match_distribution(features, wanted, quality, uids, uids, count=300, trade_off=1.0)
    largest, _ = nearest_target(pool, target)
    nearest = np.argsort(-largest.numpy(), kind="stable")[:300]
    assert kl_divergence(wanted, matched.mass) < 0.9 * kl_divergence(wanted, features.mass(64, nearest))


@pytest.mark.parametrize(
    "change", [{"k": 0}, {"k": 33}, {"steps": -1}, {"batch": 0}, {"learning_rate": 0.0}, {"monotonicity": -1.0}]
)
def test_a_number_out_of_range_is_refused(change):
    with pytest.raises(ValueError, match="k is from 1 to the 32 concepts"):
        Training(**{"concepts": 32, "k": 3, "steps": 1} | change)


def test_the_strongest_rows_of_a_concept_come_first():
    index = np.array([[0, 2], [2, 3], [0, 2], [0, 0]], np.int32)
    value = np.array([[1, 2], [4, 1], [3, 4], [0, 0]], np.float16)
    found = {concept: rows.tolist() for concept, rows in strongest_rows(index, value, 2).items()}
    assert found == {0: [2, 0], 2: [1, 2], 3: [1]}


def test_a_concept_is_named_by_the_words_that_its_captions_share_and_others_lack():
    captions = dict(enumerate(["A red dog runs", "The red dog", "red boat", "the old boat, a photo", "a photo of IT"]))
    rows = {0: np.array([0, 1]), 1: np.array([2, 3]), 2: np.array([4]), 3: np.array([7])}
    assert concept_labels(rows, captions) == {0: "dog red", 1: "boat", 2: "", 3: ""}


def test_embeddings_that_are_not_finite_are_refused(model):
    image = _mixtures(4)
    image[2, 3] = float("nan")
    with pytest.raises(ValueError, match="image holds NaN or infinity"):
        model.encode(image)
    with pytest.raises(ValueError, match="image holds NaN or infinity"):
        train_sparse_autoencoder(image, Training(concepts=4, k=2, steps=1))
