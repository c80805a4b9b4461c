"""Learned mixing: its losses and the gradient through a step against float64, and what it learns from a known fault."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from selection.scores.learned_mix import (
    MixTraining,
    Target,
    learn_mix,
    moments,
    standardise,
    stepped,
    target_loss,
    weighted_loss,
)

WIDTH, CLASSES = 8, 4


def _pool(rows=400, seed=0):
    """Return columns, images, texts and a target. Half of the captions are of another class; column 0 knows which."""
    random = np.random.default_rng(seed)
    image_of, text_of = (normalize(torch.from_numpy(random.standard_normal((CLASSES, WIDTH))), dim=1) for _ in range(2))
    label = torch.from_numpy(random.integers(0, CLASSES, rows))
    clean = torch.from_numpy(random.random(rows) < 0.5)
    caption = torch.where(clean, label, (label + 1) % CLASSES)

    def noisy(rows):
        return normalize(rows + 0.1 * torch.from_numpy(random.standard_normal(rows.shape)), dim=1)

    columns = torch.stack([clean.double(), torch.from_numpy(random.standard_normal(rows))], dim=1)
    columns = (columns - columns.mean(dim=0)) / columns.std(dim=0)
    own = torch.from_numpy(random.integers(0, CLASSES, 100))
    return columns, noisy(image_of[label]), noisy(text_of[caption]), Target(noisy(image_of[own]), own, text_of)


def _heads(seed=3):
    random = np.random.default_rng(seed)
    return tuple(
        torch.eye(WIDTH).double() + 0.1 * torch.from_numpy(random.standard_normal((WIDTH, WIDTH))) for _ in "it"
    )


def test_the_weighted_loss_is_that_of_its_equation():
    columns, image, text, _ = (part[:12] if isinstance(part, torch.Tensor) else part for part in _pool())
    weights, heads, tau = torch.tensor([0.7, -0.3]).double(), _heads(), 0.5
    share = np.exp(columns.numpy() @ weights.numpy())
    share /= share.sum()
    v, u = ((part.numpy() @ head.numpy()) for part, head in zip((image, text), heads, strict=True))
    s = (v / np.linalg.norm(v, axis=1, keepdims=True)) @ (u / np.linalg.norm(u, axis=1, keepdims=True)).T / tau
    expected = 0.0
    for j in range(12):
        own = share[j] * np.exp(s[j, j])
        across = sum(share[k] * np.exp(s[j, k]) for k in range(12))
        down = sum(share[k] * np.exp(s[k, j]) for k in range(12))
        expected -= share[j] * (np.log(own / across) + np.log(own / down)) / 2
    assert float(weighted_loss(weights, columns, image, text, heads, tau)) == pytest.approx(expected)


def test_the_gradient_through_a_step_is_that_of_finite_differences():
    columns, image, text, target = _pool()
    part, training = slice(0, 20), MixTraining(head_rate=0.5)

    def loss(weights):
        heads = stepped(weights, columns[part], image[part], text[part], _heads(), training)
        return target_loss(target, heads, training.temperature)

    weights = torch.tensor([0.4, -0.2]).double().requires_grad_()
    (found,) = torch.autograd.grad(loss(weights), weights)
    for place in range(2):
        step = torch.zeros(2).double()
        step[place] = 1e-5
        change = loss(weights.detach() + step) - loss(weights.detach() - step)
        assert float(found[place]) == pytest.approx(float(change.detach()) / 2e-5, rel=1e-5)


def test_the_column_that_knows_the_fault_gets_the_weight():
    columns, image, text, target = _pool()
    training = MixTraining(steps=60, batch=64)
    steps = []
    found = learn_mix(columns, image, text, target, training, lambda: steps.append(1))
    weights = found.weights
    assert len(steps) == 60
    assert weights[0] > weights[1].abs()
    mixed, clean = columns @ weights, columns[:, 0] > 0
    above = (mixed[clean][:, None] > mixed[~clean][None]).double().mean()
    assert above > 0.95, "the AUC of the mixed score for the fault"
    assert found.loss_at_end < found.loss_at_start
    assert torch.equal(weights, learn_mix(columns, image, text, target, training).weights)
    assert not torch.equal(weights, learn_mix(columns, image, text, target, replace(training, seed=1)).weights)


def test_the_losses_are_those_of_the_whole_target_before_and_after():
    columns, image, text, target = _pool()
    training = MixTraining(steps=1, batch=400, head_rate=0.5)
    found = learn_mix(columns, image, text, target, training)
    eye = torch.eye(WIDTH).double()
    assert found.loss_at_start == float(target_loss(target, (eye, eye), training.temperature))
    changed = learn_mix(columns, image, text, target, replace(training, steps=0))
    assert changed.loss_at_start == changed.loss_at_end == found.loss_at_start
    assert found.loss_at_end != found.loss_at_start


def test_columns_are_standardised_by_their_population_deviation_and_a_constant_one_adds_nothing():
    values = np.column_stack([np.random.default_rng(0).normal(5, 3, 50), np.full(50, 0.1)])
    mean, deviation = moments(values)
    assert mean == pytest.approx([values[:, 0].sum() / 50, 0.1])
    assert deviation.tolist() == [pytest.approx(np.sqrt(((values[:, 0] - mean[0]) ** 2).sum() / 50)), 0.0]
    found = standardise(values, mean, deviation)
    assert found[:, 0] == pytest.approx((values[:, 0] - mean[0]) / deviation[0])
    assert (found[:, 1] == 0).all()
    assert standardise(np.array([[5.0, 7.0]]), mean, deviation)[0, 1] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": torch.ones(3, 2)}, "columns are"),
        ({"columns": torch.full((400, 2), torch.nan)}, "columns holds NaN"),
        ({"target": Target(torch.ones(2, 3), torch.zeros(2), torch.ones(1, 3))}, "another width"),
        (
            {"target": Target(torch.ones(2, WIDTH), torch.tensor([0, 4]), torch.ones(4, WIDTH))},
            "labels are from 0 to 3",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    arguments = dict(zip(("columns", "image", "text", "target"), _pool(), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        learn_mix(**arguments, training=MixTraining(steps=1))
