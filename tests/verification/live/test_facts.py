"""Whatever a server says is read, or refused as no answer of the protocol; nothing else happens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitdeploy.verification.live.client import AnswerError, LiveTensor
from vitdeploy.verification.live.facts import read_index, read_model, read_server
from vitdeploy.verification.live.image_endpoints import read_predictions

WORDS = (
    "name version versions extensions inputs outputs datatype shape models state config max_batch_size "
    "parameters string_value predictions label index score"
)
KEYS = st.sampled_from(WORDS.split())
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=6),
    max_leaves=12,
)


@pytest.mark.parametrize(
    "read", [read_server, read_index, read_predictions, lambda said: read_model(said, said)]
)
def test_any_json(read: Callable[[Any], Any]) -> None:
    @given(JSON)
    def check(said: Any) -> None:
        with contextlib.suppress(AnswerError):
            read(said)

    check()


def test_what_grpc_says_as_json() -> None:
    model = read_model(
        {
            "name": "m",
            "versions": ["1"],
            "inputs": [{"name": "x", "datatype": "FP32", "shape": ["-1", "3"]}],
            "outputs": [{"name": "y", "datatype": "FP32"}],
        },
        {"config": {"max_batch_size": 4, "parameters": {"vitdeploy_bundle": {"string_value": "abc"}}}},
    )
    assert model.inputs == (LiveTensor("x", "FP32", (-1, 3)),)
    assert model.outputs == (LiveTensor("y", "FP32", ()),)
    assert (model.max_batch, model.digest, model.artifact) == (4, "abc", None)
    assert read_index({}) == ()
    assert [entry.ready for entry in read_index({"models": [{"name": "m", "state": "READY"}]})] == [True]
