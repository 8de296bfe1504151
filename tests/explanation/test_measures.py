"""Measures of tokens and weights, by their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from vitdeploy.explanation import measures


def test_uniform_attention_looks_as_far_as_patches_lie() -> None:
    """Two patches, eight pixels apart: half of the weight is on the other; a prefix counts for nothing."""
    weights = np.full((1, 1, 3, 3), 1 / 3)
    got = measures.mean_distances(weights, np.array([[-1, 0, 1]]), (1, 2), 8)
    assert got == pytest.approx([4.0])


def test_padding_neither_looks_nor_is_looked_at() -> None:
    weights = np.zeros((2, 1, 2, 2))
    weights[0, 0] = [[0.25, 0.75], [0.5, 0.5]]
    places = np.array([[0, 1], [-1, -1]])
    assert measures.mean_distances(weights, places, (1, 2), 2.0) == pytest.approx([(1.5 + 1.0) / 2])
    assert measures.looked_at(weights, places, (1, 2)).tolist() == [[[0.75, 1.25]]]


def test_rollout_of_no_attention_stays_where_it_is() -> None:
    rolled = measures.rollout([np.eye(4), np.eye(4)], np.array([0, 1, 0, 0]))
    assert rolled.tolist() == [0, 1, 0, 0]


def test_principal_filters_are_those_of_the_covariance() -> None:
    filters = np.random.default_rng(0).normal(size=(40, 3, 4, 4)) * np.linspace(1, 3, 16).reshape(4, 4)
    components, shares = measures.principal_filters(filters)
    assert components.shape == (28, 3, 4, 4)
    values, vectors = np.linalg.eigh(np.cov(filters.reshape(40, -1), rowvar=False))
    np.testing.assert_allclose(shares, values[::-1][:28] / values.sum(), rtol=1e-9)
    for component, vector in zip(components, vectors.T[::-1], strict=False):
        assert abs(component.flatten() @ vector) == pytest.approx(1, abs=1e-6)
        assert component.flat[np.abs(component).argmax()] > 0


def test_token_norms_find_a_massive_activation() -> None:
    tokens = np.ones((5, 4))
    tokens[2, 3] = -50
    figures, lengths = measures.token_norms(tokens, np.array([-1, 0, 1, 2, 3]))
    assert figures.median == 2
    assert figures.largest == pytest.approx(np.sqrt(2503))
    assert (figures.prefix, figures.activation, figures.token, figures.column) == ((2.0,), 50.0, 2, 3)
    assert lengths.shape == (5,)


def test_positions_are_alike_by_their_angle() -> None:
    similar = measures.position_similarity(np.array([[1.0, 0], [0, 2], [3, 3], [0, 0]]))
    assert similar[0, :3].tolist() == pytest.approx([1, 0, 2**-0.5])
    assert similar[3].tolist() == [0, 0, 0, 0]


def test_relative_errors() -> None:
    exact = np.array([3.0, 4.0])
    assert measures.relative_error(np.array([3.0, 4.5]), exact) == pytest.approx(0.1)
    assert measures.relative_error(np.array([3.0, np.inf]), exact) is None
    assert measures.relative_error(np.zeros(2), np.zeros(2)) == 0
