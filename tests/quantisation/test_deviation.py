"""How far answers are, held against SciPy's divergence and NumPy's norms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import rel_entr, softmax

from vitdeploy.quantisation.deviation import Deviation, deviation


@given(arrays(np.float64, (2, 3, 5), elements=st.floats(-20, 20)))
def test_errors_and_divergences_are_means_over_images(both: np.ndarray) -> None:
    reference, found = both + np.eye(3, 5)
    reference[:, 0] += 30.0  # no row of zeros
    measured = deviation(("logits",), (torch.from_numpy(found),), (torch.from_numpy(reference),))
    errors = np.linalg.norm(found - reference, axis=1) / np.linalg.norm(reference, axis=1)
    divergences = rel_entr(softmax(reference, axis=1), softmax(found, axis=1)).sum(axis=1)
    assert measured.error == pytest.approx(errors.mean())
    assert measured.divergence == pytest.approx(divergences.mean(), abs=1e-12)


def test_only_logits_have_a_divergence() -> None:
    pair = (torch.ones(2, 4, dtype=torch.float64), torch.eye(2, 4, dtype=torch.float64))
    assert deviation(("features",), pair[:1], pair[1:]).divergence == 0.0
    both = deviation(("features", "logits"), (pair[1], pair[0]), (pair[1], pair[1]))
    assert both.divergence > 0.0
    assert both.error == pytest.approx(3**0.5)  # of the worse output


@pytest.mark.parametrize(
    "found, excess",
    [(Deviation(0.02, 1e-4), 0.5), (Deviation(0.02, 1.6e-3), 2.0), (Deviation(0.12, 0.0), 3.0)],
)
def test_what_is_further_from_its_target_counts(found: Deviation, excess: float) -> None:
    assert found.excess(Deviation(0.04, 4e-4)) == pytest.approx(excess)
