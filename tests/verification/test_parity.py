"""Parity: metrics against scipy's, and verdicts that follow them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save_file
from scipy.spatial.distance import cosine
from scipy.special import rel_entr, softmax

from vitdeploy.backends.base import Array, Session, SessionFacts
from vitdeploy.bundle.dtypes import ArtifactPrecision
from vitdeploy.bundle.folder import GOLDEN, Bundle, BundleWriter
from vitdeploy.bundle.manifest import Manifest, Provenance, TensorSpec
from vitdeploy.bundle.proofs import ParityMetrics
from vitdeploy.config import BatchRange, Preprocess
from vitdeploy.errors import ParityError, UsageError
from vitdeploy.images.preprocess import apply, apply_uint8
from vitdeploy.verification.parity import (
    TOLERANCES,
    check_preprocess,
    check_session,
    measure_parity,
    passes,
    tolerance_failures,
)

FP32, FP16 = TOLERANCES["fp32"], TOLERANCES["fp16"]
RNG = np.random.default_rng(0)
REFERENCE = RNG.normal(size=(6, 20)) * 3


class Computed(Session):
    """A session that computes whatever function it is given."""

    def __init__(
        self,
        function: Callable[[Array], Array],
        batch: BatchRange | None = None,
        precision: ArtifactPrecision = "fp32",
        output: str = "logits",
    ) -> None:
        pixel_values = TensorSpec(name="pixel_values", dtype="float32", shape=("N", 4))
        super().__init__(
            SessionFacts(
                backend="computed",
                artifact=f"onnx-{precision}",
                precision=precision,
                executes=precision,
                device="cpu",
                provider="cpu",
                batch=batch,
                inputs=(pixel_values,),
                outputs=(TensorSpec(name=output, dtype="float32", shape=("N", 20)),),
                versions={},
            )
        )
        self.function = function
        self.sizes: list[int] = []

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self.sizes.append(len(inputs["pixel_values"]))
        return {self.facts.outputs[0].name: self.function(inputs["pixel_values"])}

    def _close(self) -> None:
        pass


WEIGHT = RNG.normal(size=(4, 20))
INPUTS = RNG.normal(size=(5, 4)).astype(np.float32)
GOLDEN_PAIR = {"pixel_values": INPUTS, "reference": INPUTS.astype(np.float64) @ WEIGHT}


def right(inputs: Array) -> Array:
    return (inputs.astype(np.float64) @ WEIGHT).astype(np.float32)


def test_a_single_golden_image_has_neighbours_that_are_not_its_equal() -> None:
    """Where rows of a batch are mixed up, equal rows would hide it."""
    one = {name: array[:1] for name, array in GOLDEN_PAIR.items()}
    good = Computed(right, BatchRange(1, 2, 3))
    records = check_session(good, one, batches=(1, 2, 3))
    assert [(r.passed, r.metrics.rows) for r in records] == [(True, 1), (True, 1), (True, 2)]
    assert good.sizes == [1, 2, 3]
    for mixed in (lambda x: right(x).mean(0, keepdims=True).repeat(len(x), 0), lambda x: right(x)[::-1]):
        alone, together = check_session(Computed(mixed, BatchRange(1, 2, 2)), one, batches=(1, 2))
        assert alone.passed
        assert not together.passed
    least = Computed(right, BatchRange(2, 2, 2))
    assert [(r.batch, r.passed, r.metrics.rows) for r in check_session(least, one)] == [(2, True, 1)]


class TestMetrics:
    def test_agree_with_scipy(self) -> None:
        actual = (REFERENCE + RNG.normal(size=REFERENCE.shape) * 0.01).astype(np.float32)
        metrics = measure_parity(REFERENCE, actual, FP16, "logits")
        actual = actual.astype(np.float64)
        pairs = list(zip(actual, REFERENCE, strict=True))
        error = actual - REFERENCE
        relative = [np.sqrt(((a - r) ** 2).sum() / (r**2).sum()) for a, r in pairs]
        kl = rel_entr(softmax(REFERENCE, axis=1), softmax(actual, axis=1)).sum(axis=1)
        assert metrics.rows == 6
        assert metrics.elements == 120
        assert metrics.max_abs == pytest.approx(np.abs(error).max(), rel=1e-12)
        assert metrics.mean_abs == pytest.approx(np.abs(error).mean(), rel=1e-12)
        assert metrics.relative == pytest.approx(max(relative), rel=1e-12)
        assert metrics.worst == int(np.argmax(relative))
        assert metrics.kl == pytest.approx(kl.max(), rel=1e-6)
        assert metrics.cosine == pytest.approx(min(1 - cosine(a, r) for a, r in pairs), abs=1e-12)

    def test_nothing_differs(self) -> None:
        metrics = measure_parity(REFERENCE, REFERENCE, FP32, "logits")
        assert (metrics.max_abs, metrics.relative, metrics.kl) == (0, 0, 0)
        assert metrics.cosine == pytest.approx(1, abs=1e-15)
        assert metrics.top1_agree == metrics.top1_compared == 6
        assert metrics.top5_overlap == 1
        assert tolerance_failures(metrics, FP32) == ()

    def test_features_and_tokens_have_no_ranking(self) -> None:
        metrics = measure_parity(REFERENCE.reshape(6, 5, 4), REFERENCE.reshape(6, 5, 4), FP32, "tokens")
        assert metrics.kl is None
        assert metrics.top1_compared == metrics.top5_compared == 0
        assert tolerance_failures(metrics, FP32) == ()

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_values_that_are_no_numbers(self, bad: float) -> None:
        actual = REFERENCE.copy()
        actual[4, 7] = actual[4, 8] = bad
        metrics = measure_parity(REFERENCE, actual, FP32, "logits")
        assert metrics.nonfinite == 2
        assert metrics.worst == 4
        assert metrics.relative == 0  # of the other rows
        assert tolerance_failures(metrics, FP32) == ("2 NaN or infinite values (golden image 4)",)
        metrics = measure_parity(REFERENCE, np.full_like(REFERENCE, bad), FP32, "logits")
        assert (metrics.nonfinite, metrics.relative) == (120, None)
        assert tolerance_failures(metrics, FP32)

    def test_large_logits_do_not_overflow(self) -> None:
        metrics = measure_parity(REFERENCE * 1e4, REFERENCE * 1e4, FP32, "logits")
        assert metrics.kl == 0

    def test_one_class_and_five(self) -> None:
        for classes in (1, 2, 5):
            metrics = measure_parity(REFERENCE[:, :classes], REFERENCE[:, :classes], FP32, "logits")
            assert metrics.top5_overlap is None
            assert metrics.top1_compared == (0 if classes == 1 else 6)
            assert tolerance_failures(metrics, FP32) == ()

    @pytest.mark.slow
    @given(st.integers(1, 4), st.integers(0, 2**32 - 1), st.integers(0, 5))
    def test_a_few_outputs_near_zero_are_no_failure(self, classes: int, seed: int, row: int) -> None:
        """What is near zero for one image is as exact as the others."""
        rng = np.random.default_rng(seed)
        expected = rng.normal(size=(6, classes)) * 3
        expected[row] = 0
        size = np.sqrt((expected**2).sum(axis=1).mean())
        noise = rng.uniform(-1, 1, size=expected.shape) * size / np.sqrt(classes)
        right = measure_parity(expected, expected + 0.9 * FP16.relative * noise, FP16, "features")
        assert tolerance_failures(right, FP16) == ()
        wrong = expected.copy()
        wrong[row] += size * 2 * FP16.relative
        assert "relative error" in " ".join(
            tolerance_failures(measure_parity(expected, wrong, FP16, "features"), FP16)
        )

    def test_shapes_must_be_the_same(self) -> None:
        with pytest.raises(ValueError, match="shape"):
            measure_parity(REFERENCE, REFERENCE[:, :1], FP32, "logits")

    @pytest.mark.slow
    @given(st.floats(0.1, 0.999), st.integers(0, 2**32 - 1))
    def test_an_error_within_tolerance_never_changes_a_decided_class(self, share: float, seed: int) -> None:
        """The margin is chosen so that rankings are compared exactly where rounding cannot flip them."""
        rng = np.random.default_rng(seed)
        expected = rng.normal(size=(4, 8))
        error = rng.normal(size=(4, 8))
        norms = [np.linalg.norm(array, axis=1, keepdims=True) for array in (expected, error)]
        actual = expected + error / norms[1] * norms[0] * FP16.relative * share
        metrics = measure_parity(expected, actual, FP16, "logits")
        assert metrics.top1_agree == metrics.top1_compared
        assert metrics.top5_overlap in (None, 1.0)

    def test_near_ties_are_not_compared(self) -> None:
        tied = np.zeros((1, 8))
        tied[0, 2], tied[0, 5] = 3.0, 3.0 + 1e-6
        metrics = measure_parity(tied, tied, FP16, "logits")
        assert metrics.top1_compared == 0
        assert tolerance_failures(metrics, FP16) == ()


class TestVerdicts:
    @pytest.mark.parametrize(
        "field, limit, message",
        [
            ("relative", FP32.relative, r"relative error \(golden image 3\) .* exceeds 5e-05"),
            ("kl", FP32.kl, "KL divergence .* exceeds 1e-06"),
            ("batch_invariance", FP32.batch_invariance, "difference alone and in a batch .* exceeds 5e-05"),
        ],
    )
    def test_each_limit_is_a_limit(self, field: str, limit: float, message: str) -> None:
        metrics = ParityMetrics(rows=1, elements=1, worst=3)
        assert tolerance_failures(metrics.model_copy(update={field: limit}), FP32) == ()
        found = tolerance_failures(metrics.model_copy(update={field: limit * 1.01}), FP32)
        assert len(found) == 1
        assert re.match(message, found[0])

    def test_the_users_own_absolute_limit(self) -> None:
        strict = FP32.model_copy(update={"max_abs": 1e-9})
        metrics = ParityMetrics(rows=1, elements=1, max_abs=2e-9)
        assert tolerance_failures(metrics, FP32) == ()
        assert tolerance_failures(metrics, strict) == ("max abs error 2e-09 exceeds 1e-09",)

    def test_other_classes(self) -> None:
        metrics = ParityMetrics(
            rows=9, elements=9, top1_compared=8, top1_agree=6, top5_compared=2, top5_overlap=0.9
        )
        assert tolerance_failures(metrics, FP32) == (
            "another top class on 2 of 8 decided rows",
            "other top five classes: 90% found again",
        )

    def test_nothing_compared_is_a_failure(self) -> None:
        assert tolerance_failures(ParityMetrics(rows=0, elements=0), FP32) == ("nothing was compared",)
        assert tolerance_failures(measure_parity(np.zeros((0, 3)), np.zeros((0, 3)), FP32, "logits"), FP32)
        assert not passes(np.zeros((3, 0)), np.zeros((3, 0)), TOLERANCES["fp32"], "logits")

    def test_the_mean_is_a_limit_of_its_own(self) -> None:
        limit = TOLERANCES["int8"].mean
        assert limit is not None
        good = ParityMetrics(rows=1, elements=1, relative=limit, mean_relative=limit)
        assert tolerance_failures(good, TOLERANCES["int8"]) == ()
        bad = good.model_copy(update={"mean_relative": 1.01 * limit})
        assert tolerance_failures(bad, TOLERANCES["int8"]) == ("mean relative error 0.081 exceeds 0.08",)
        far = measure_parity(REFERENCE, REFERENCE * 1.3, TOLERANCES["int8"], "tokens")
        assert tolerance_failures(far, TOLERANCES["int8"])[0].startswith("relative error (held-out image ")

    def test_the_mean_and_every_first_class_where_they_are_bounded(self) -> None:
        reference, change = np.zeros((3, 5)), np.zeros((3, 5))
        reference[:, :2] = [3.0, 4.0], [0.6, 0.8], [6.0, 8.0]
        change[:2, 0] = 0.5, 0.3
        outputs = reference + change
        found = measure_parity(reference, outputs, TOLERANCES["int8"], "logits")
        assert found.mean_relative == pytest.approx((0.1 + 0.3 + 0.0) / 3)
        assert found.agreement == pytest.approx(2 / 3)  # 0.9 beats 0.8, whatever the margin
        exact = measure_parity(reference, outputs, FP16, "logits")
        assert (exact.mean_relative, exact.agreement) == (None, None)
        assert not {"mean_relative", "agreement"} & exact.model_dump().keys()
        assert "mean" not in FP16.model_dump()

    def test_tolerances_widen_with_precision(self) -> None:
        order = [TOLERANCES[precision] for precision in ("fp32", "fp16", "bf16", "int8", "fp8")]
        for narrow, wide in itertools.pairwise(order):
            assert narrow.relative < wide.relative
            assert narrow.kl <= wide.kl
        assert TOLERANCES["mixed"] == TOLERANCES["fp16"]


class TestSessions:
    def test_every_golden_image_at_every_batch_size(self) -> None:
        session = Computed(right, BatchRange(1, 4, 8))
        records = check_session(session, GOLDEN_PAIR)
        assert [record.batch for record in records] == [1, 4, 8]
        assert all(record.passed for record in records)
        assert [record.metrics.rows for record in records] == [5, 8, 8]
        assert session.sizes == [1] * 5 + [4, 4] + [8]
        assert [record.metrics.batch_invariance for record in records] == [None, 0, 0]
        assert records[0].artifact == "onnx-fp32"
        assert (records[0].backend, records[0].provider, records[0].reference) == (
            "computed",
            "cpu",
            "float64",
        )

    def test_every_output_has_a_reference_of_its_own(self) -> None:
        class Two(Computed):
            def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
                outputs = self.function(inputs["pixel_values"])
                return {"logits": outputs, "features": 2 * outputs}

        session = Two(right, BatchRange(1, 4, 8))
        (spec,) = session.facts.outputs
        both = (spec, spec.model_copy(update={"name": "features"}))
        session.facts = replace(session.facts, outputs=both)
        with pytest.raises(ParityError, match="golden data for one of logits, features only"):
            check_session(session, GOLDEN_PAIR)
        golden = {**GOLDEN_PAIR, "reference.features": 2 * GOLDEN_PAIR["reference"]}
        records = check_session(session, golden)
        assert [(r.batch, r.output) for r in records] == [
            (batch, name) for batch in (1, 4, 8) for name in ("logits", "features")
        ]
        assert all(record.passed for record in records)
        assert [record.metrics.kl is None for record in records] == [False, True] * 3
        wrong = check_session(session, {**golden, "reference.features": GOLDEN_PAIR["reference"]})
        assert {record.output for record in wrong if record.failures} == {"features"}
        alone = replace(session.facts, outputs=both[1:])  # a server may give one of two
        session.facts = alone
        assert [record.passed for record in check_session(session, golden)] == [True] * 3
        nothing = {**golden, "reference.features": np.zeros_like(golden["reference"])}
        session.facts = replace(alone, outputs=both)
        with pytest.raises(ParityError, match="features: nothing to compare"):
            check_session(session, nothing)

    def test_a_fixed_batch_is_tried_with_two_companies(self) -> None:
        session = Computed(right, BatchRange(3, 3, 3))
        (record,) = check_session(session, GOLDEN_PAIR)
        assert session.sizes == [3] * 4
        assert record.metrics.batch_invariance == 0

    def test_batches_of_ones_choice(self) -> None:
        records = check_session(Computed(right, BatchRange(1, 4, 8)), GOLDEN_PAIR, batches=[2, 5])
        assert [record.batch for record in records] == [2, 5]
        assert [record.batch for record in check_session(Computed(right), GOLDEN_PAIR)] == [1, 8]
        with pytest.raises(UsageError, match="serves 1 to 8"):
            check_session(Computed(right, BatchRange(1, 4, 8)), GOLDEN_PAIR, batches=[9])

    def test_the_golden_image_that_failed_is_named(self) -> None:
        def wrong(inputs: Array) -> Array:
            outputs = right(inputs)
            outputs[(inputs == INPUTS[3]).all(axis=1)] *= 1.001
            return outputs

        for record in check_session(Computed(wrong, BatchRange(1, 4, 8)), GOLDEN_PAIR):
            assert not record.passed
            assert record.metrics.worst == 3
            assert "golden image 3" in record.failures[0]

    @pytest.mark.parametrize("batch", [BatchRange(1, 4, 4), BatchRange(4, 4, 4)])
    def test_an_answer_that_depends_on_the_company_is_found(self, batch: BatchRange) -> None:
        def leaky(inputs: Array) -> Array:
            return right(inputs + np.float32(1e-3) * inputs.mean(axis=0))

        record = check_session(Computed(leaky, batch, "fp16"), GOLDEN_PAIR)[-1]
        assert record.metrics.batch_invariance is not None
        assert record.metrics.batch_invariance > 1e-4
        strict = check_session(Computed(leaky, batch), GOLDEN_PAIR)[-1]
        assert any("alone and in a batch" in failure for failure in strict.failures)

    def test_rows_in_another_order_are_found(self) -> None:
        session = Computed(lambda inputs: right(inputs[::-1]), BatchRange(1, 4, 4))
        alone, together = check_session(session, GOLDEN_PAIR)
        assert alone.passed
        assert not together.passed

    def test_outputs_of_another_shape_are_a_failure(self) -> None:
        for function in (lambda inputs: right(inputs)[:, :7], lambda inputs: right(inputs)[:1]):
            record = check_session(Computed(function, BatchRange(1, 4, 4)), GOLDEN_PAIR)[-1]
            assert not record.passed
            assert record.metrics.elements == 0
            assert "the reference (20,)" in record.failures[0]

    def test_the_absolute_limit_reaches_the_record(self) -> None:
        (record,) = check_session(Computed(right), GOLDEN_PAIR, batches=[1], max_abs=1e-12)
        assert record.tolerance.max_abs == 1e-12
        assert not record.passed

    def test_features_are_not_ranked(self) -> None:
        (record,) = check_session(Computed(right, output="features"), GOLDEN_PAIR, batches=[1])
        assert record.metrics.kl is None
        assert record.passed

    @pytest.mark.parametrize(
        "golden, message",
        [
            ({}, "no golden data"),
            ({"pixel_values": INPUTS}, "no golden data"),
            ({"pixel_values": INPUTS[:0], "reference": np.zeros((0, 20))}, "nothing to compare"),
            ({"pixel_values": INPUTS, "reference": np.zeros((4, 20))}, "nothing to compare"),
            ({"pixel_values": INPUTS, "reference": np.zeros((5, 0))}, "nothing to compare"),
            ({"pixel_values": INPUTS, "reference": np.zeros((5, 20))}, "zero for golden image 0"),
            ({"pixel_values": INPUTS, "reference": np.full((5, 20), np.nan)}, r"itself has NaN .*image 0"),
        ],
    )
    def test_golden_data_that_proves_nothing_is_a_failure(
        self, golden: dict[str, Array], message: str
    ) -> None:
        with pytest.raises(ParityError, match=message) as caught:
            check_session(Computed(right), golden)
        assert caught.value.exit_code == 5


SPEC = Preprocess(size=(8, 12), mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), resample="bilinear")


def _bundle(folder: Path, spec: Preprocess | None, arrays: dict[str, Array], kind: str = "float") -> Bundle:
    with BundleWriter(folder, force=True) as writer:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, writer.file(GOLDEN))
        writer.seal(
            Manifest(
                name="tiny",
                created="2026-11-21T03:00:00Z",
                generator="vitdeploy 0.1.0",
                provenance=Provenance(source="tiny", family="vit"),
                preprocess=spec,
                input=kind,
            )
        )
        return writer.commit()


def _recorded(kind: str = "float") -> dict[str, Array]:
    raw = np.random.default_rng(3).integers(0, 256, size=(30, 17, 3), dtype=np.uint8)
    convert: Any = apply_uint8 if kind == "uint8" else apply
    return {"image.0": raw, "image.0.pixel_values": convert(Image.fromarray(raw), SPEC)}


class TestPreprocess:
    @pytest.mark.parametrize("kind", ["float", "uint8"])
    def test_the_same_machine_makes_the_same_pixels(self, tmp_path: Path, kind: str) -> None:
        check = check_preprocess(_bundle(tmp_path / "b", SPEC, _recorded(kind), kind))
        assert check.passed
        assert (check.images, check.max_abs) == (1, 0)

    @pytest.mark.parametrize(
        "change",
        [
            {"resample": "bicubic"},
            {"mean": SPEC.std, "std": SPEC.mean},
            {"mean": SPEC.mean[::-1]},
            {"rescale": 1 / 256},
            {"size": (12, 8)},
            {"resize": "none"},
        ],
    )
    def test_another_preprocessing_is_found(self, tmp_path: Path, change: dict[str, Any]) -> None:
        check = check_preprocess(_bundle(tmp_path / "b", replace(SPEC, **change), _recorded()))
        assert not check.passed
        assert check.failures[0].startswith("image.0: ")

    def test_swapped_channels_are_found(self, tmp_path: Path) -> None:
        recorded = _recorded()
        recorded["image.0.pixel_values"] = recorded["image.0.pixel_values"][::-1]
        assert not check_preprocess(_bundle(tmp_path / "b", SPEC, recorded)).passed

    def test_nothing_to_compare_is_a_failure(self, tmp_path: Path) -> None:
        assert check_preprocess(_bundle(tmp_path / "b", None, _recorded())).failures == (
            "the bundle has no preprocessing",
        )
        nothing = {"pixel_values": INPUTS}
        assert check_preprocess(_bundle(tmp_path / "b", SPEC, nothing)).failures == (
            "the bundle has no raw golden images",
        )
