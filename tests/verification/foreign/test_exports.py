"""What other people's exporters write is verified; transformers' own weights are the checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import transformers
from onnx import TensorProto, helper, numpy_helper, version_converter

import vitdeploy
from tests.helpers.strangers import TORCHSCRIPT_OPSETS, Plain, Strangers, edited, export_torchscript, in_fp16
from vitdeploy.config import Preprocess
from vitdeploy.errors import UsageError
from vitdeploy.verification.foreign.onnx_file import OnnxFile
from vitdeploy.verification.foreign.report import ForeignReport

pytestmark = pytest.mark.slow


def states(report: ForeignReport, file: str | None = None) -> dict[str, str]:
    """What was found, by check."""
    return {f.check: f.state for f in report.findings if file in (None, f.file)}


def detail(report: ForeignReport, check: str) -> str:
    return " | ".join(f.detail for f in report.findings if f.check == check)


def test_a_plain_export(strangers: Strangers) -> None:
    report = vitdeploy.verify(strangers.dynamo, model=strangers.checkpoint)
    report.check()
    assert states(report)["parity"] == "held"
    assert states(report)["weights"] == "held"
    assert [record.batch for record in report.parity] == [1, 8]
    # Nothing lies beside this file.
    assert states(report)["labels"] == states(report)["preprocessing"] == "not checked"
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False))["ok"] is True


def test_the_reference_is_what_transformers_computes(strangers: Strangers) -> None:
    """In float64, on the same tensors; so parity with it is parity with the checkpoint."""
    from vitdeploy.verification.foreign.truth import Truth

    truth = Truth.open(strangers.checkpoint, None, OnnxFile(strangers.dynamo, "x").interface)
    golden = truth.golden("logits")
    theirs = transformers.ViTForImageClassification.from_pretrained(strangers.checkpoint).double().eval()
    with torch.inference_mode():
        expected = theirs(torch.from_numpy(golden["pixel_values"]).double()).logits.numpy()
    assert np.abs(golden["reference"] - expected).max() < 1e-10


@pytest.mark.parametrize("opset", TORCHSCRIPT_OPSETS)
def test_opsets_of_the_exporter_of_before(strangers: Strangers, opset: int) -> None:
    report = vitdeploy.verify(strangers.torchscript(opset), model=strangers.checkpoint)
    report.check()
    assert detail(report, "weights").startswith("40 of 40")
    if opset == 13:
        assert [record.batch for record in report.parity] == [2]
        assert states(report)["batch invariance"] == "held"  # with other neighbours
        assert "first, last: only answer was compared" in detail(report, "outputs")


def test_a_newer_opset(strangers: Strangers, tmp_path: Path) -> None:
    newer = version_converter.convert_version(onnx.load(strangers.torchscript(17)), 23)
    onnx.save(newer, tmp_path / "new.onnx")
    vitdeploy.verify(tmp_path / "new.onnx", model=strangers.checkpoint).check()


def test_optimum_s_folder(strangers: Strangers, tmp_path: Path) -> None:
    folder = strangers.optimum(tmp_path / "optimum")
    report = vitdeploy.verify(folder, model=strangers.checkpoint)
    report.check()
    assert set(states(report).values()) == {"held"}
    assert "image_mean" in detail(report, "preprocessing")
    one = vitdeploy.verify(folder / "model.onnx", model=strangers.checkpoint)
    assert states(one) == states(report)


def test_a_repository_of_transformers_js(strangers: Strangers, tmp_path: Path) -> None:
    folder = strangers.transformers_js(tmp_path / "js")
    report = vitdeploy.verify(folder, model=strangers.checkpoint)
    report.check()
    names = ("onnx/model.onnx", "onnx/model_fp16.onnx", "onnx/model_quantized.onnx")
    assert report.files == names
    for name in names:
        found = states(report, name)
        assert found["parity"] == found["labels"] == found["preprocessing"] == "held"
    assert states(report, names[1])["precision"] == "held"
    assert states(report, names[1])["overflow"] == "not checked"
    # No precision's tolerance is claimed for int8.
    assert report.unproven == (names[2],)
    assert states(report, names[2])["precision"] == states(report, names[2])["weights"] == "not checked"
    bounds = {record.artifact: record.tolerance.relative for record in report.parity}
    assert bounds == dict(zip(names, (5e-5, 1e-2, 0.3), strict=True))


def test_a_quantised_file_of_another_model_fails(strangers: Strangers, tmp_path: Path) -> None:
    other = transformers.ViTConfig.from_pretrained(strangers.checkpoint)
    torch.manual_seed(1)
    transformers.ViTForImageClassification(other).save_pretrained(tmp_path / "other")
    folder = strangers.transformers_js(tmp_path / "js")
    report = vitdeploy.verify(folder / "onnx/model_quantized.onnx", model=tmp_path / "other")
    assert states(report)["parity"] == "failed"


def test_half_precision_at_the_border(strangers: Strangers, tmp_path: Path) -> None:
    """The input itself in fp16, and the output: the reference sees the rounded pixels."""

    def border(model: onnx.ModelProto) -> None:
        narrow = in_fp16(model)
        model.CopyFrom(narrow)
        graph = model.graph
        for value in (graph.input[0], graph.output[0]):
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
        for node in graph.node:
            if node.op_type == "Cast" and node.output[0] == graph.output[0].name:
                node.attribute[0].i = TensorProto.FLOAT16

    path = edited(strangers.torchscript(17), tmp_path / "model.onnx", border)
    report = vitdeploy.verify(path, model=strangers.checkpoint)
    report.check()
    assert "fp16 by most of its weights" in detail(report, "precision")


def test_images_as_they_are(strangers: Strangers, tmp_path: Path) -> None:
    """uint8 (N, H, W, 3) with the normalisation in the file, as an exporter of one's own may put it there."""

    def with_normalisation(model: onnx.ModelProto) -> None:
        graph = model.graph
        old = graph.input[0].name
        constants = (("scale", 2 / 255), ("one", 1.0))
        for name, value in constants:
            graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), name))
        before = [
            helper.make_node("Cast", ["image"], ["real"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["real", "scale"], ["scaled"]),
            helper.make_node("Sub", ["scaled", "one"], ["normal"]),
            helper.make_node("Transpose", ["normal"], [old], perm=[0, 3, 1, 2]),
        ]
        nodes = [*before, *graph.node]
        del graph.node[:], graph.input[:]
        graph.node.extend(nodes)
        graph.input.append(helper.make_tensor_value_info("image", TensorProto.UINT8, ["n", 32, 32, 3]))

    path = edited(strangers.torchscript(17), tmp_path / "model.onnx", with_normalisation)
    vitdeploy.verify(path, model=strangers.checkpoint).check()


def test_height_and_width_that_may_vary(strangers: Strangers, tmp_path: Path) -> None:
    """The checkpoint's own size is taken."""

    def free(model: onnx.ModelProto) -> None:
        for index, name in enumerate(("n", "channels", "height", "width")):
            model.graph.input[0].type.tensor_type.shape.dim[index].dim_param = name

    path = edited(strangers.torchscript(17), tmp_path / "model.onnx", free)
    vitdeploy.verify(path, model=strangers.checkpoint).check()


def test_another_size_built_in(strangers: Strangers, tmp_path: Path) -> None:
    """Positions interpolated by transformers when it was exported: the reference interpolates as it does."""
    load = transformers.ViTForImageClassification.from_pretrained

    class Larger(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = load(strangers.checkpoint, attn_implementation="eager").eval()

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.model(pixel_values, interpolate_pos_encoding=True).logits
            return logits

    export_torchscript(Larger(), tmp_path / "model.onnx", 17, ["logits"], batch=None, shape=(3, 48, 48))
    report = vitdeploy.verify(tmp_path / "model.onnx", model=strangers.checkpoint)
    report.check()
    # preprocessor_config.json is for the checkpoint's own size, and with it the file cannot run.
    shutil.copy(strangers.checkpoint / "preprocessor_config.json", tmp_path)
    report = vitdeploy.verify(tmp_path / "model.onnx", model=strangers.checkpoint)
    assert "size is [32, 32], in the checkpoint [48, 48]" in detail(report, "preprocessing")
    assert not report.passed


def test_four_channels(strangers: Strangers, tmp_path: Path) -> None:
    config = transformers.ViTConfig.from_pretrained(strangers.checkpoint, num_channels=4)
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification._from_config(config, attn_implementation="eager").eval()
    model.save_pretrained(tmp_path / "four")
    export_torchscript(Plain(model), tmp_path / "model.onnx", 17, ["logits"], "N", shape=(4, 32, 32))
    vitdeploy.verify(tmp_path / "model.onnx", model=tmp_path / "four").check()
    with pytest.raises(UsageError, match=r"the file reads 4 channels, and .* 3"):
        vitdeploy.verify(tmp_path / "model.onnx", model=strangers.checkpoint)


def test_what_onnx_runtime_has_optimised(strangers: Strangers, tmp_path: Path) -> None:
    """Its fused operators are of another domain, and no shape inference knows them."""
    import onnxruntime

    onnx.save(in_fp16(onnx.load(strangers.torchscript(17))), tmp_path / "plain_fp16.onnx")
    for name in ("plain_fp16", "fp32"):
        settings = onnxruntime.SessionOptions()
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        settings.optimized_model_filepath = str(tmp_path / f"{name}_optimised.onnx")
        source = tmp_path / "plain_fp16.onnx" if name == "plain_fp16" else strangers.torchscript(17)
        onnxruntime.InferenceSession(source, settings, providers=["CPUExecutionProvider"])
    report = vitdeploy.verify(tmp_path / "fp32_optimised.onnx", model=strangers.checkpoint)
    report.check()
    assert states(report)["precision"] == "held"
    # On a CPU without fp16 kernels the optimiser itself writes fp32 GEMMs: an "fp16" file no more.
    report = vitdeploy.verify(tmp_path / "plain_fp16_optimised.onnx", model=strangers.checkpoint)
    assert states(report)["parity"] == "held"


def test_probabilities_at_the_end(strangers: Strangers, tmp_path: Path) -> None:
    def with_softmax(model: onnx.ModelProto) -> None:
        graph = model.graph
        old = graph.output[0].name
        graph.node.append(helper.make_node("Softmax", [old], ["probabilities"], axis=-1))
        graph.output[0].name = "probabilities"

    path = edited(strangers.torchscript(17), tmp_path / "model.onnx", with_softmax)
    report = vitdeploy.verify(path, model=strangers.checkpoint)
    report.check()
    assert "probabilities after its own softmax" in detail(report, "parity")


def test_weights_in_a_file_of_their_own(strangers: Strangers, tmp_path: Path) -> None:
    model = onnx.load(strangers.torchscript(17))
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, size_threshold=0)
    assert len(list(tmp_path.iterdir())) > 1
    report = vitdeploy.verify(tmp_path / "model.onnx", model=strangers.checkpoint)
    report.check()
    assert detail(report, "weights").startswith("40 of 40")


def test_a_batch_that_is_only_said_to_vary(strangers: Strangers, tmp_path: Path) -> None:
    def free(model: onnx.ModelProto) -> None:
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_param = "N"
        del model.graph.value_info[:]

    def reshape_to_two(model: onnx.ModelProto) -> None:
        free(model)
        graph = model.graph
        graph.initializer.append(numpy_helper.from_array(np.array([1, 4], np.int64), "one"))
        old = graph.output[0].name
        graph.node.append(helper.make_node("Reshape", [old, "one"], ["reshaped"]))
        graph.output[0].name = "reshaped"

    path = edited(strangers.torchscript(17), tmp_path / "model.onnx", reshape_to_two)
    report = vitdeploy.verify(path, model=strangers.checkpoint)
    assert not report.passed
    assert states(report) | {"parity": "held", "batch": "failed"} == states(report)
    assert "8 images fail" in detail(report, "batch")


def test_a_module_of_the_user_s(strangers: Strangers) -> None:
    model = transformers.ViTForImageClassification.from_pretrained(strangers.checkpoint).eval()
    report = vitdeploy.verify(strangers.torchscript(17), model=Plain(model))
    report.check()
    assert states(report)["preprocessing"] == states(report)["labels"] == "not checked"
    assert states(report)["weights"] == "held"


def test_the_tokens_of_a_model_without_a_head(tmp_path: Path, strangers: Strangers) -> None:
    """Its pooler is another layer, which the reference leaves out: last_hidden_state is what is compared."""
    config = transformers.ViTConfig.from_pretrained(strangers.checkpoint)
    torch.manual_seed(0)
    backbone = transformers.ViTModel(config).eval()
    backbone.save_pretrained(tmp_path / "backbone")

    class Both(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = backbone

        def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            given = self.backbone(pixel_values)
            return given.pooler_output, given.last_hidden_state

    export_torchscript(
        Both(), tmp_path / "model.onnx", 17, ["pooler_output", "last_hidden_state"], batch=None
    )
    report = vitdeploy.verify(tmp_path / "model.onnx", model=tmp_path / "backbone")
    report.check()
    assert detail(report, "outputs") == "pooler_output: only last_hidden_state was compared"


class Embedding(torch.nn.Module):
    """What a vision tower projects to: of length 1, as CLIPModel gives it, or as the tower alone does."""

    def __init__(self, tower: torch.nn.Module, *, normalise: bool, shift: float) -> None:
        super().__init__()
        self.tower, self.normalise, self.shift = tower, normalise, shift

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        given = self.tower(pixel_values)
        embeds = given.image_embeds + self.shift
        if self.normalise:
            embeds = embeds / embeds.norm(dim=-1, keepdim=True)
        return given.last_hidden_state, embeds


@pytest.mark.parametrize("normalise", [True, False])
def test_embeddings_of_length_1_or_as_projected(tmp_path: Path, normalise: bool) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPVisionConfig(**sizes, image_size=32, patch_size=8, projection_dim=24)
    tower = transformers.CLIPVisionModelWithProjection._from_config(
        config, attn_implementation="eager"
    ).eval()
    tower.save_pretrained(tmp_path / "clip")
    for name, shift in (("right", 0.0), ("wrong", 0.05)):
        path, names = tmp_path / f"{name}.onnx", ["last_hidden_state", "image_embeds"]
        export_torchscript(Embedding(tower, normalise=normalise, shift=shift), path, 17, names, "b")
        report = vitdeploy.verify(path, model=tmp_path / "clip")
        said = "image_embeds, of length 1 at batch" if normalise else "image_embeds, not of length 1 at batch"
        assert said in detail(report, "parity")
        assert states(report)["parity"] == ("held" if name == "right" else "failed")
        assert detail(report, "outputs") == "last_hidden_state: only image_embeds was compared"


def test_our_own_file_alone(tmp_path: Path, strangers: Strangers) -> None:
    """It says what it is; weights that the rewrites left alone are found in it."""
    bundle = vitdeploy.export(strangers.checkpoint, tmp_path / "b", precision="fp16", format="onnx")
    (tmp_path / "alone").mkdir()
    lone = tmp_path / "alone/model.onnx"
    lone.write_bytes((bundle.root / "model.fp16.onnx").read_bytes())
    report = vitdeploy.verify(lone, model=strangers.checkpoint)
    report.check()
    found = states(report)
    assert found["labels"] == found["preprocessing"] == found["precision"] == "held"
    assert "scores: the file's metadata says softmax, the checkpoint nothing" in [
        f"{f.check}: {f.detail}" for f in report.findings
    ]
    assert "its metadata" in detail(report, "precision")
    said = OnnxFile(lone, "lone").said
    assert said.whole_preprocess == bundle.manifest.preprocess
    assert said.labels == bundle.manifest.labels == ("cat", "dog", "eel", "fox")
    assert isinstance(said.whole_preprocess, Preprocess)
