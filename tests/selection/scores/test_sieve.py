"""SIEVE's masking and its maximum."""

import numpy as np
import pytest

from selection.scores.sieve import MEDIUM_PHRASES, mask, sieve


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("an image of a dog", "a dog"),
        ("A Photo Of a dog", "a dog"),
        ("Stock photo: a dog", ": a dog"),
        ("dog photo stock", "dog"),
        ("a photo", ""),
        ("two dogs, image", "two dogs,"),
        ("PHOTO 12", "12"),
        ("a dog", "a dog"),
    ],
)
def test_medium_phrases_are_deleted_whatever_their_case(text, left):
    assert mask(text) == left


@pytest.mark.parametrize("text", ["a photograph of imagery", "photos and images", "telephoto lens", "reimage"])
def test_longer_words_that_hold_a_phrase_stay(text):
    assert mask(text) == text


def test_a_phrase_may_be_parted_by_any_white_space_and_leaves_single_spaces():
    assert mask("an  image\tof   a\n dog") == "a dog"
    assert mask("big an image of dog") == "big dog"


def test_phrases_go_in_the_papers_order():
    assert mask("a stock photo of a cat") == "a of a cat"  # "a photo of" was looked for before "stock photo" went
    assert mask("stock a photo photo") == "stock"
    assert MEDIUM_PHRASES.index("an image of") < MEDIUM_PHRASES.index("an image") < MEDIUM_PHRASES.index("image")


@pytest.mark.parametrize("text", ["", "  ", "photo", "An image of.", "image, photo - stock photo!"])
def test_a_text_without_a_word_left_is_empty(text):
    assert mask(text) == ""


def unit(rng, *shape):
    vectors = rng.standard_normal(shape)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 4), (7, 3, 16), (50, 8, 384)])
def test_the_score_is_the_largest_cosine_and_names_its_caption(n, k, d):
    rng = np.random.default_rng(n)
    text, captions = unit(rng, n, d), unit(rng, n, k, d)
    score, best = sieve(text.astype(np.float32), captions.astype(np.float32), np.zeros(n, bool), np.zeros((n, k), bool))
    assert score.dtype == np.float32
    for i in range(n):
        oracle = [float(np.dot(text[i], captions[i, j])) for j in range(k)]
        assert best[i] == oracle.index(max(oracle))
        assert score[i] == pytest.approx(max(oracle), abs=2e-7)


def test_a_pair_with_an_empty_side_counts_nothing():
    text = np.array([[1.0, 0.0], [np.nan, np.nan], [1.0, 0.0], [1.0, 0.0]])
    captions = np.array(
        [[[0.6, 0.8], [1.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]], [[-1.0, 0.0], [-0.6, 0.8]], [[0.6, 0.8]] * 2]
    )
    captions[0, 1] = np.nan
    captions[2, 1] = np.nan
    none = np.array([[False, True], [False, False], [False, True], [False, False]])
    score, best = sieve(text, captions, np.array([False, True, False, False]), none)
    np.testing.assert_allclose(score, [0.6, 0.0, 0.0, 0.6], rtol=1e-6)
    assert best.tolist() == [0, 0, 1, 0]  # of equal ones the first


def test_wrong_shapes_and_numbers_are_refused():
    text, captions = np.ones((2, 3)), np.ones((2, 4, 3))
    no, none = np.zeros(2, bool), np.zeros((2, 4), bool)
    with pytest.raises(ValueError, match="expected"):
        sieve(text[:1], captions, no, none)
    with pytest.raises(ValueError, match="expected"):
        sieve(text, captions[:, :0], no, none[:, :0])
    text[1] = np.inf
    with pytest.raises(ValueError, match="row 1 is not finite"):
        sieve(text, captions, no, none)
