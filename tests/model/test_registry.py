"""An architecture that vitdeploy does not know goes the whole way once it is registered."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import vitdeploy
from tests.helpers import toy
from vitdeploy.backends.base import Options
from vitdeploy.backends.torch import Torch, reference_session
from vitdeploy.backends.triton import Triton
from vitdeploy.bundle.folder import Bundle
from vitdeploy.bundle.manifest import input_spec, output_spec
from vitdeploy.checkpoint.opening import open_model, save_folder
from vitdeploy.config import CONFIGS, BatchRange, ViTConfig, model_fields, model_type
from vitdeploy.errors import BundleError, CheckpointError, ConfigError, UsageError
from vitdeploy.exporter.request import ExportRequest
from vitdeploy.exporter.run import run_export
from vitdeploy.model.precision import PrecisionPlan, island_names
from vitdeploy.model.reference import forward_float64
from vitdeploy.model.registry import ARCHITECTURES, architecture_of, build_reference

RANGE = BatchRange(1, 2, 4)
PIXELS = np.random.default_rng(3).standard_normal((3, 3, *toy.CONFIG.image_size)).astype(np.float32)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    root = tmp_path_factory.mktemp("toy")
    with pytest.MonkeyPatch.context() as patch:
        toy.register(patch)
        save_folder(toy.toy_checkpoint(), root / "checkpoint")
        request = ExportRequest(model=root / "checkpoint", precisions=("fp16",), batch=RANGE, output="logits")
        return run_export(request, root / "toy.bundle")


@pytest.fixture
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    toy.register(monkeypatch)


def test_every_kind_of_configuration_has_an_architecture() -> None:
    assert ARCHITECTURES.keys() == CONFIGS.keys()


@pytest.mark.slow
@pytest.mark.usefixtures("_registered")
def test_a_foreign_architecture_is_exported_proven_and_runs(bundle: Bundle) -> None:
    opened = Bundle.open(bundle.root)
    manifest = opened.manifest
    assert manifest.model == toy.CONFIG
    assert json.loads((bundle.root / "manifest.json").read_text())["model"]["kind"] == "toy"
    assert [artifact.name for artifact in manifest.artifacts] == ["onnx-fp16"]
    assert all(record.passed for record in manifest.parity)
    assert [rewrite.name for rewrite in manifest.rewrites] == ["patches_to_gemm"]
    artifact = manifest.artifacts[0]
    assert "mean" in artifact.islands
    assert artifact.outputs == (output_spec(toy.CONFIG, "logits"),)
    assert artifact.inputs == (input_spec(toy.CONFIG, "float"),)
    answers = vitdeploy.load(opened, backend="onnxruntime").predict(np.zeros((2, 20, 30, 3), np.uint8))
    assert {prediction.label for prediction in answers[0]} == set("abcde")


@pytest.mark.usefixtures("_registered")
def test_backends_that_build_the_model_ask_for_its_architecture(bundle: Bundle) -> None:
    reference = build_reference(toy.CONFIG, toy.toy_checkpoint().state)
    expected = forward_float64(reference, torch.from_numpy(PIXELS), "logits").numpy()
    opened = Bundle.open(bundle.root)
    with reference_session(opened) as exact, Torch().load(opened, None, Options()) as eager:
        np.testing.assert_allclose(exact.run({"pixel_values": PIXELS})["logits"], expected, atol=1e-5)
        np.testing.assert_allclose(eager.run({"pixel_values": PIXELS})["logits"], expected, atol=1e-4)
    assert Triton().supports(opened.manifest, None) == "it has no kernels for the structure of 'toy'"
    with pytest.raises(UsageError, match="no fused kernels for a model of the kind 'toy'"):
        architecture_of(toy.CONFIG).kernel_shape(toy.CONFIG, "logits", "float")


@pytest.mark.usefixtures("_registered")
def test_its_rewrites_are_exact_and_its_sites_are_islands() -> None:
    architecture, state = architecture_of(toy.CONFIG), toy.toy_checkpoint().state
    reference, x = build_reference(toy.CONFIG, state), torch.from_numpy(PIXELS)
    for output in toy.CONFIG.outputs:
        deployed = architecture.deploy(
            reference, PrecisionPlan.exact(), outputs=(output,), input_kind="float", preprocess=toy.SPEC
        )
        torch.testing.assert_close(deployed(x), forward_float64(reference, x, output), rtol=0, atol=1e-12)
    plan = PrecisionPlan.of("fp16")
    half = architecture.deploy(reference, plan, outputs=("logits",), input_kind="float", preprocess=toy.SPEC)
    assert island_names(half, plan) == ("blocks.0.norm", "blocks.1.norm", "blocks.2.norm", "mean")


@pytest.mark.usefixtures("_registered")
def test_configurations_say_their_kind_unless_it_is_the_first() -> None:
    assert "kind" not in model_fields(ViTConfig())
    for config in (ViTConfig(classes=7), toy.CONFIG):
        kind, fields = model_type(model_fields(config))
        assert kind(**fields) == config
    assert model_type({"kind": "vit", "depth": 3}) == (ViTConfig, {"depth": 3})
    assert toy.CONFIG.at_size((24, 24)) == toy.ToyConfig(width=8, image_size=(24, 24))


def test_an_unknown_kind_is_one_clear_line(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BundleError, match=r"manifest.json: unknown kind of model 'toy'") as error:
        Bundle.open(bundle.root)
    assert "\n" not in error.value.message
    with pytest.raises(CheckpointError, match=r"config\.json: model: unknown kind of model 'toy'"):
        open_model(str(bundle.root.parent / "checkpoint"))
    for kind in (None, 3, ["vit"], "vi"):
        with pytest.raises(ConfigError, match="unknown kind of model"):
            model_type({"kind": kind})
