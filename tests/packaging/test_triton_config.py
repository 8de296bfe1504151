"""config.pbtxt: what is written is what the server's protobuf reads, whatever the model."""

from __future__ import annotations

import sys
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitdeploy.bundle.dtypes import DType
from vitdeploy.bundle.manifest import TensorSpec
from vitdeploy.config import BatchRange
from vitdeploy.errors import ExportError, MissingDependency, UsageError
from vitdeploy.packaging.triton_config import (
    Batching,
    config_text,
    parse_config,
    tensor,
    tensor_of,
    warm_up,
)

SIZES = st.integers(1, 2**31 - 1)
DTYPES = st.sampled_from(sorted({*get_args(DType)} - {"bfloat16"}))
TEXT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30)


@st.composite
def batches(draw: st.DrawFn) -> BatchRange:
    opt = draw(st.integers(1, 256))
    return BatchRange(1, opt, opt + draw(st.integers(0, 256)))


@st.composite
def specs(draw: st.DrawFn) -> TensorSpec:
    sizes = draw(st.lists(SIZES | st.just("S"), max_size=4))
    return TensorSpec(name=draw(TEXT), dtype=draw(DTYPES), shape=("N", *sizes))


@pytest.mark.slow
@given(TEXT, batches(), st.lists(specs(), min_size=1, max_size=3), st.floats(0, 60_000), TEXT)
def test_what_is_written_reads_back(
    name: str, batch: BatchRange, tensors: list[TensorSpec], delay: float, value: str
) -> None:
    batching = Batching.of(batch, None, "a")
    text = config_text(
        {
            "name": name,
            "platform": "onnxruntime_onnx",
            "max_batch_size": batching.max,
            "input": [tensor_of(spec, batching) for spec in tensors],
            "parameters": {value: {"string_value": value}},
            **batching.scheduling(delay),
        }
    )
    config = parse_config(text)
    assert config.name == name
    assert config.parameters[value].string_value == value
    assert config.max_batch_size == batching.max
    assert len(config.input) == len(tensors)
    for found, spec in zip(config.input, tensors, strict=True):
        assert found.name == spec.name
        rest = [-1 if size == "S" else size for size in spec.shape[1:]]
        expected = [batching.fixed, *rest] if batching.fixed else rest
        assert list(found.dims) == (expected or [1])
        assert found.HasField("reshape") == (not expected)
    assert config.HasField("dynamic_batching") == (batching.fixed is None)
    if batching.fixed:
        return
    assert abs(config.dynamic_batching.max_queue_delay_microseconds - delay * 1000) <= 0.5
    assert all(1 < size <= batching.max for size in config.dynamic_batching.preferred_batch_size)


@pytest.mark.slow
@given(batches(), st.integers(1, 600))
def test_the_batch_is_within_what_was_verified(batch: BatchRange, most: int) -> None:
    try:
        batching = Batching.of(batch, most, "a")
    except UsageError:
        assert (most > batch.max) or (batch.fixed and most != batch.min)
        return
    if batch.fixed:
        assert (batching.max, batching.fixed) == (0, batch.min)
        assert batching.dims(("N", 3)) == [batch.min, 3]
    else:
        assert batching.max == most <= batch.max
        assert batching.fixed is None


@pytest.mark.parametrize(
    "batch, most, message",
    [
        (BatchRange(2, 4, 8), None, "batches from 2 on"),
        (BatchRange(1, 4, 8), 9, "verified up to 8"),
        (BatchRange(4, 4, 4), 8, "fixed batch size 4"),
    ],
)
def test_batches_that_are_refused(batch: BatchRange, most: int | None, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        Batching.of(batch, most, "a")
    assert "--batch" in str(caught.value.hint)


def test_a_fixed_batch_is_not_batched() -> None:
    batching = Batching.of(BatchRange(4, 4, 4), None, "a")
    assert batching.scheduling(5) == {}
    spec = TensorSpec(name="x", dtype="float32", shape=(4, 3, 8, 8))
    config = parse_config(config_text({"model_warmup": warm_up([spec], batching, [1])}))
    (request,) = config.model_warmup
    assert request.batch_size == 1
    assert list(request.inputs["x"].dims) == [4, 3, 8, 8]
    assert request.inputs["x"].zero_data


@pytest.mark.parametrize(
    "document",
    [
        {"nmae": "digits"},
        {"max_batch_size": "many"},
        {"input": [{"name": "x", "data_type": "TYPE_FLOAT"}]},
        {"instance_group": [{"kind": "KIND_TPU"}]},
        {"max_batch_size": 2**40},
    ],
)
def test_what_the_server_does_not_know_is_an_error(document: dict[str, Any]) -> None:
    with pytest.raises(ExportError):
        config_text(document)


def test_types_that_no_request_carries() -> None:
    spec = TensorSpec(name="x", dtype="bfloat16", shape=("N", 3))
    with pytest.raises(UsageError, match="bfloat16"):
        tensor_of(spec, Batching.of(BatchRange(), None, "a"))


def test_a_number_per_image() -> None:
    config = parse_config(config_text({"max_batch_size": 8, "output": [tensor("score", "TYPE_FP32", [])]}))
    assert list(config.output[0].dims) == [1]
    assert list(config.output[0].reshape.shape) == []
    assert config.output[0].HasField("reshape")


def test_without_tritonclient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tritonclient.grpc.model_config_pb2", None)
    with pytest.raises(MissingDependency) as caught:
        config_text({"name": "x"})
    assert caught.value.hint == 'pip install "vitdeploy[package]"'
