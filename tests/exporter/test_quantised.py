"""Whole int8 and fp8 exports: what is in the bundle, what proves it, what falls back, what is refused."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import vitdeploy
from tests.exporter.test_run import Recorder, folder
from tests.helpers.models import CONFIGS, random_state
from tests.helpers.pictures import pictures
from vitdeploy.backends.base import all_backends
from vitdeploy.bundle.folder import CALIBRATION, HELD_OUT, Bundle
from vitdeploy.bundle.manifest import Artifact
from vitdeploy.config import BatchRange, ViTConfig
from vitdeploy.data import digits_folder
from vitdeploy.errors import ParityError, UsageError
from vitdeploy.exporter import assembly, job
from vitdeploy.exporter import quantised as making
from vitdeploy.exporter.plan import plan_export
from vitdeploy.exporter.request import ExportRequest
from vitdeploy.exporter.run import run_export
from vitdeploy.model.precision import PrecisionPlan
from vitdeploy.model.registry import architecture_of, build_reference
from vitdeploy.quantisation.layers import quantisable
from vitdeploy.quantisation.migration import migrate
from vitdeploy.quantisation.ranges import Ranges
from vitdeploy.quantisation.sites import QuantisedModel
from vitdeploy.verification.accuracy import LabelledImages
from vitdeploy.verification.gemms import WEIGHTS_BOUND, check_gemms

IMAGES = digits_folder() / "images"
SMALL = dataclasses.replace(CONFIGS["vit"], depth=2)
STATE = random_state(SMALL, spread=0.15)
RUNTIMES = {b.name for b in all_backends() if b.name in ("onnxruntime", "openvino") and b.availability().ok}


def integers(bundle: Bundle, name: str = "onnx-int8") -> dict[str, np.ndarray[Any, Any]]:
    graph = onnx.load(bundle.path(bundle.artifact(name).path)).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    return {key: array for key, array in arrays.items() if array.dtype == np.int8 and array.ndim == 2}


def float_weights(bundle: Bundle) -> dict[str, np.ndarray[Any, Any]]:
    """Of the quantised sites of a ViT, made again from the weights and the ranges that a bundle keeps."""
    assert isinstance(bundle.manifest.model, ViTConfig)
    weights = load_file(bundle.path("weights.safetensors"))
    reference = build_reference(bundle.manifest.model, weights)
    model = architecture_of(bundle.manifest.model).deploy(
        reference,
        PrecisionPlan.of("fp32"),
        outputs=bundle.manifest.outputs,
        input_kind="float",
        preprocess=bundle.manifest.preprocess,
    )
    tensors = {name: torch.from_numpy(array) for name, array in bundle.tensors(CALIBRATION).items()}
    migrated = quantisable(migrate(model, Ranges.from_tensors(tensors)))
    record = bundle.artifact("int8").quantisation
    assert record is not None
    return {name: migrated[name].weight.detach().numpy() for name in record.sites}


@pytest.mark.slow
class TestDigits:
    """A trained model and real pictures."""

    def test_files_and_artifacts(self, digits_int8: Bundle) -> None:
        digits_int8.verify()
        manifest = digits_int8.manifest
        assert {"model.onnx", "model.int8.onnx", HELD_OUT, CALIBRATION} <= manifest.files.keys()
        assert [artifact.name for artifact in manifest.artifacts] == ["onnx-fp32", "onnx-int8"]
        exact, small = manifest.artifacts
        assert exact.quantisation is None
        assert (small.precision, small.requested, small.path) == ("int8", "int8", "model.int8.onnx")
        assert small.proof is not None
        assert small.proof.ok
        assert small.size < 0.75 * exact.size

    def test_the_record_says_how_it_was_made(self, digits_int8: Bundle) -> None:
        record = digits_int8.artifact("int8").quantisation
        assert record is not None
        assert (record.rest, record.weight_bits, record.images, record.attention) == ("fp32", 7, 14, False)
        assert record.sites
        assert set(record.sites).isdisjoint(record.left_out)
        assert 0.7 <= record.macs <= 1
        assert {f"{name}.weight" for name in record.sites} == integers(digits_int8).keys()
        assert all(np.abs(array).max() <= 63 for array in integers(digits_int8).values())

    def test_proven_on_images_that_were_held_out(self, digits_int8: Bundle) -> None:
        calibration = digits_int8.manifest.calibration
        assert calibration is not None
        assert (len(calibration.images), len(calibration.held_out)) == (14, 6)
        kept = digits_int8.tensors(CALIBRATION)
        held_out = digits_int8.golden("onnx-int8")
        spec = digits_int8.manifest.preprocess
        assert spec is not None
        pixels = kept["held_out"].transpose(0, 3, 1, 2) / 255
        normalised = (pixels - np.array(spec.mean)[:, None, None]) / np.array(spec.std)[:, None, None]
        np.testing.assert_allclose(held_out["pixel_values"], normalised, atol=1e-6)
        assert digits_int8.manifest.model is not None
        weights = {name: t.double() for name, t in load_file(digits_int8.path("weights.safetensors")).items()}
        reference = build_reference(digits_int8.manifest.model, weights)
        with torch.inference_mode():
            exact = reference(torch.from_numpy(held_out["pixel_values"]).double()).numpy()
        np.testing.assert_allclose(held_out["reference"], exact, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("runtime", sorted(RUNTIMES))
    def test_swapped_scales_of_two_weights(self, digits_int8: Bundle, tmp_path: Path, runtime: str) -> None:
        """They are right in the file and in the runtime: only the float weights tell."""
        floats = float_weights(digits_int8)
        images = digits_int8.golden("onnx-int8")["pixel_values"][:2]
        model = onnx.load(digits_int8.path("model.int8.onnx"))
        constants = {tensor.name: tensor for tensor in model.graph.initializer}
        records = check_gemms(digits_int8.path("model.int8.onnx"), None, runtime, images, weights=floats)
        assert {record.site for record in records} == floats.keys()
        assert 1e-3 < max(record.lost for record in records) < WEIGHTS_BOUND / 2
        assert all(record.passed for record in records)
        means = {
            name: numpy_helper.to_array(constants[f"{name}.weight_scale"]).mean()
            for name in floats
            if name.endswith("fc1")
        }
        low, *_, high = sorted(means, key=lambda name: means[name])
        first, second = (constants[f"{name}.weight_scale"] for name in (low, high))
        first.raw_data, second.raw_data = second.raw_data, first.raw_data
        onnx.save(model, tmp_path / "swapped.onnx")
        records = check_gemms(tmp_path / "swapped.onnx", None, runtime, images, weights=floats)
        failed = {record.site: record.failures for record in records if not record.passed}
        assert {low, high} == failed.keys()
        assert all(why.startswith("its weights are off by") for (why,) in failed.values())

    def test_noise_is_refused(self, tmp_path: Path) -> None:
        random = np.random.default_rng(0)
        for i in range(24):
            Image.fromarray(random.integers(0, 256, (32, 32), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        request = ExportRequest("digits", precisions=("int8",), formats=("onnx",), calibration=tmp_path)
        with pytest.raises(UsageError, match="of 24 images, 24 are noise"):
            run_export(request, tmp_path / "out.bundle")
        assert not (tmp_path / "out.bundle").exists()

    def test_which_artifact_is_held_against_what(self, digits_int8: Bundle) -> None:
        small = digits_int8.artifact("onnx-int8")
        assert len(digits_int8.golden(small)["pixel_values"]) == 6
        for other in (None, "onnx-fp32", digits_int8.artifact("fp32"), "weights.safetensors"):
            assert len(digits_int8.golden(other)["pixel_values"]) == 8

    def test_parity_on_every_runtime(self, digits_int8: Bundle) -> None:
        records = [r for r in digits_int8.manifest.parity if r.artifact == "onnx-int8"]
        assert {(r.backend, r.batch) for r in records} == {(b, size) for b in RUNTIMES for size in (1, 2, 4)}
        for record in records:
            assert record.passed
            assert record.tolerance.mean == 0.08
            mean, worst = record.metrics.mean_relative, record.metrics.relative
            assert mean is not None
            assert worst is not None
            assert 1e-4 < mean <= worst < 0.25
            assert record.metrics.agreement == 1
        exact = [r for r in digits_int8.manifest.parity if r.artifact == "onnx-fp32"]
        assert all(r.metrics.mean_relative is None and r.tolerance.mean is None for r in exact)

    def test_it_is_verified_here(self, digits_int8: Bundle) -> None:
        report = vitdeploy.verify(digits_int8, batches=[1, 3])
        report.check()
        assert {r.artifact for r in report.parity} == {"onnx-fp32", "onnx-int8"}

    def test_the_calibration_of_a_bundle_gives_the_same_integers(
        self, digits_int8: Bundle, tmp_path: Path
    ) -> None:
        again = vitdeploy.export(
            "digits",
            tmp_path / "again.bundle",
            precision="int8",
            calibration=digits_int8.root,
            format="onnx",
            batch=2,
        )
        assert again.manifest.calibration == digits_int8.manifest.calibration
        expected = integers(digits_int8)
        assert integers(again).keys() == expected.keys()
        assert all(np.array_equal(array, expected[key]) for key, array in integers(again).items())

    def test_the_calibration_of_another_model_is_refused(self, digits_int8: Bundle, tmp_path: Path) -> None:
        shutil.copytree(digits_folder(), tmp_path / "other")
        weights = load_file(tmp_path / "other" / "model.safetensors")
        weights["norm.bias"] = weights["norm.bias"] + 1
        save_file(weights, tmp_path / "other" / "model.safetensors")
        request = ExportRequest(
            tmp_path / "other", precisions=("int8",), formats=("onnx",), calibration=digits_int8.root
        )
        with pytest.raises(UsageError, match="was calibrated for another model: its weights are not these"):
            run_export(request, tmp_path / "out.bundle")
        assert not (tmp_path / "out.bundle").exists()


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("photographs"), 12, (40, 50))


def asked(path: Path, photographs: Path, **fields: Any) -> ExportRequest:
    """An export of a small model."""
    given: dict[str, Any] = {
        "model": folder(path / "checkpoint", SMALL, STATE),
        "batch": BatchRange(1, 2, 2),
        "precisions": ("int8",),
        "formats": ("onnx",),
        "calibration": photographs,
        "output": "tokens",  # else the last block is absorbed, and stays float
    }
    return ExportRequest(**{**given, **fields})


@pytest.mark.slow
def test_what_tensorrt_builds_from_comes_beside(tmp_path: Path, photographs: Path) -> None:
    request = asked(tmp_path, photographs, precisions=("fp8", "bf16"), target="tensorrt", fp8_attention=False)
    bundle = run_export(request, tmp_path / "out.bundle")
    names = [artifact.name for artifact in bundle.manifest.artifacts]
    assert names == ["onnx-fp32", "onnx-bf16", "onnx-fp8", "onnx-fp8-fp16"]
    half = bundle.artifact("onnx-fp8-fp16")
    assert half.quantisation is not None
    assert (half.path, half.precision, half.quantisation.rest) == ("model.fp8-fp16.onnx", "fp8", "fp16")
    graph = onnx.load(bundle.path(half.path)).graph
    scales = [t for t in graph.initializer if t.name.endswith("_scale")]
    assert scales
    assert {t.data_type for t in scales} == {onnx.TensorProto.FLOAT16}


def spoilt(change: Callable[[QuantisedModel], QuantisedModel]) -> Callable[..., QuantisedModel]:
    """The recipe, with a fault."""
    recipe = making.quantise

    def quantise(*arguments: Any, **options: Any) -> QuantisedModel:
        return change(recipe(*arguments, **options))

    return quantise


def too_few(model: QuantisedModel) -> QuantisedModel:
    return dataclasses.replace(model, macs=0.6)


def wrong_scales(model: QuantisedModel) -> QuantisedModel:
    sites = {name: dataclasses.replace(s, input_scale=s.input_scale / 6) for name, s in model.sites.items()}
    return dataclasses.replace(model, sites=sites)


def other_weights(model: QuantisedModel) -> QuantisedModel:
    """As if what was rounded were something else, which no comparison of the outputs can tell."""
    return dataclasses.replace(model, floats={name: 2 * weight for name, weight in model.floats.items()})


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, said",
    [
        (too_few, "40 % of the multiplications stay float (at most 30 % may)"),
        (wrong_scales, "relative error"),
        (other_weights, "blocks.0.attn.qkv: its weights are off by 0.5 of the float ones, bound 0.2"),
    ],
)
def test_what_costs_too_much_is_left_out_aloud(
    tmp_path: Path,
    photographs: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[QuantisedModel], QuantisedModel],
    said: str,
) -> None:
    monkeypatch.setattr(making, "quantise", spoilt(change))
    recorder = Recorder()
    bundle = run_export(asked(tmp_path, photographs), tmp_path / "out.bundle", progress=recorder)
    bundle.verify()
    assert [artifact.name for artifact in bundle.manifest.artifacts] == ["onnx-fp32"]
    assert bundle.manifest.calibration is None
    assert not {HELD_OUT, CALIBRATION, "model.int8.onnx"} & bundle.manifest.files.keys()
    (note,) = (note for note in recorder.notes if "no model.int8.onnx" in note)
    assert said in note
    assert note.endswith("model.onnx instead")
    assert note in bundle.manifest.provenance.notes


@pytest.mark.slow
def test_what_names_other_classes_is_left_out(
    tmp_path: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(photographs, tmp_path / "labelled" / "3")

    def answers(_: Bundle, artifact: Artifact, images: LabelledImages) -> np.ndarray[Any, Any]:
        return images.labels[:, None] + artifact.is_quantised

    for place in (assembly, job):
        monkeypatch.setattr(place, "onnx_answers", answers)
    recorder = Recorder()
    request = asked(tmp_path, photographs, output="logits,tokens", data=tmp_path / "labelled")
    bundle = run_export(request, tmp_path / "out.bundle", progress=recorder)
    assert [artifact.name for artifact in bundle.manifest.artifacts] == ["onnx-fp32"]
    (note,) = (note for note in recorder.notes if "no model.int8.onnx" in note)
    assert "top-1 0.00 % of 12 images, 100.00 points below the reference" in note


@pytest.mark.slow
def test_without_a_fallback_nothing_is_written(
    tmp_path: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(making, "quantise", spoilt(too_few))
    with pytest.raises(ParityError, match="int8 would cost too much of the answers"):
        run_export(asked(tmp_path, photographs, fallback=False), tmp_path / "out.bundle")
    assert {entry.name for entry in tmp_path.iterdir()} == {"checkpoint"}


def test_a_dry_run_names_the_files(tmp_path: Path, photographs: Path) -> None:
    request = asked(tmp_path, photographs, precisions=("int8", "fp8", "fp16"), target="tensorrt")
    plan = plan_export(request, tmp_path / "out.bundle")
    artifacts = {name for name in plan.files if name.endswith(".onnx")}
    assert artifacts == {
        "model.onnx", "model.fp16.onnx", "model.int8.onnx", "model.int8-fp16.onnx",
        "model.fp8.onnx", "model.fp8-fp16.onnx",
    }  # fmt: skip
    assert {HELD_OUT, CALIBRATION} <= plan.files.keys()
    assert plan.files[CALIBRATION] == 12 * 32 * 48 * 3
    assert plan.files["model.int8-fp16.onnx"] == plan.files["model.fp8.onnx"]


class OfMyOwn(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=(2, 3))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_module_of_ones_own_is_refused_by_name(photographs: Path, tmp_path: Path, kind: str) -> None:
    request = ExportRequest(OfMyOwn(), precisions=(kind,), calibration=photographs, image_size=(8, 8))
    with pytest.raises(UsageError, match=f"OfMyOwn is exported as it is: {kind} is for models") as caught:
        run_export(request, tmp_path / "out.bundle")
    assert f"leave out --{kind}" in str(caught.value.hint)


def test_a_model_that_reads_no_images_is_refused(photographs: Path, tmp_path: Path) -> None:
    from vitdeploy.checkpoint.opening import Checkpoint, save_folder
    from vitdeploy.config import Preprocess

    config = dataclasses.replace(SMALL, channels=4)
    spec = Preprocess(size=config.image_size, mean=(0.5,) * 4, std=(0.5,) * 4)
    save_folder(Checkpoint(config, random_state(config), spec, None, "vitdeploy", "test"), tmp_path / "four")
    request = ExportRequest(tmp_path / "four", precisions=("int8",), calibration=photographs)
    with pytest.raises(UsageError, match="reads tensors of 4 channels"):
        run_export(request, tmp_path / "out.bundle")


@pytest.mark.parametrize("fields", [{"max_drop": 1.0}, {"max_drop": 101.0, "data": IMAGES}], ids=str)
def test_a_drop_that_cannot_be_measured(tmp_path: Path, photographs: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--max-drop"):
        run_export(asked(tmp_path, photographs, **fields), tmp_path / "out.bundle")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"precisions": ("int8",)}, "int8 cannot be without images"),
        ({"precisions": ("fp8", "int8")}, "int8 and fp8 cannot be without images"),
        ({"calibration": Path("d")}, "--calibration is for --int8 and --fp8"),
        ({"target": "tensorrt"}, "--for is for --int8 and --fp8"),
        ({"data": Path("d")}, "--data is for --int8 and --fp8"),
        ({"max_drop": 1.0}, "--max-drop is for --int8 and --fp8"),
        ({"precisions": ("fp8",), "calibration": Path("d"), "weight_bits": 8}, "--weight-bits is for --int8"),
        ({"precisions": ("int8",), "calibration": Path("d"), "weight_bits": 9}, "weights of 9 bits"),
        (
            {"precisions": ("int8",), "calibration": Path("d"), "fp8_attention": True},
            "--fp8-attention is for",
        ),
        ({"precisions": ("int8",), "calibration": Path("d"), "target": "openvino"}, "--for openvino"),
        ({"precisions": ("fp8",), "calibration": Path("d"), "opset": 18}, "fp8 is not in opset 18"),
        (
            {"precisions": ("int8",), "calibration": Path("d"), "opset": 17, "target": "tensorrt"},
            "scales in fp16, which tensorrt takes, are not in opset 17",
        ),
        (
            {
                "precisions": ("int8",),
                "calibration": Path("d"),
                "image_size": (8, 8),
                "further_sizes": ((16, 16),),
            },
            "int8 artifacts are for one image size",
        ),
        (
            {
                "precisions": ("int8", "fp16"),
                "calibration": Path("d"),
                "formats": ("triton-aot",),
                "architectures": ("sm_90",),
            },
            "int8 artifacts are ONNX files, which no format here makes",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_no_export_could_serve(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        ExportRequest("digits", **fields)
    assert caught.value.hint


@pytest.mark.parametrize(
    "precisions, floats, quantised",
    [
        (("int8",), ("fp32",), ("int8",)),
        (("fp8", "fp16", "int8"), ("fp32", "fp16"), ("int8", "fp8")),
        (("fp16", "int8", "fp32"), ("fp16", "fp32"), ("int8",)),
    ],
)
def test_with_what_is_quantised_goes_fp32(
    precisions: tuple[str, ...], floats: tuple[str, ...], quantised: tuple[str, ...]
) -> None:
    request = ExportRequest("digits", precisions=precisions, calibration=Path("d"))
    assert (request.floats, request.quantised) == (floats, quantised)
