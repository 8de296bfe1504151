"""Whatever is wrong with somebody's file is found, and said."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import transformers
from onnx import numpy_helper

import vitdeploy
from tests.helpers.onnx_graphs import widen
from tests.helpers.strangers import LABELS, Strangers, change_weight, edit_json, edited, in_fp16
from vitdeploy.errors import ParityError
from vitdeploy.verification.foreign.report import ForeignReport

pytestmark = pytest.mark.slow


def failed(report: ForeignReport) -> dict[str, str]:
    """What failed, by check."""
    return {f.check: f.detail for f in report.findings if f.state == "failed"}


def error(report: ForeignReport) -> str:
    with pytest.raises(ParityError) as caught:
        report.check()
    assert caught.value.exit_code == 5
    assert "\n" not in caught.value.message
    return caught.value.message


def test_swapped_labels(strangers: Strangers, tmp_path: Path) -> None:
    folder = strangers.optimum(tmp_path / "optimum")
    edit_json(folder / "config.json", id2label=LABELS | {"1": "eel", "2": "dog"})
    report = vitdeploy.verify(folder, model=strangers.checkpoint)
    assert failed(report).keys() == {"labels"}
    assert (
        "labels: id2label in config.json: class 1 is 'eel', in the checkpoint 'dog' (2 of 4 classes differ)"
        in error(report)
    )


def test_labels_for_another_head(strangers: Strangers, tmp_path: Path) -> None:
    folder = strangers.optimum(tmp_path / "optimum")
    edit_json(folder / "config.json", id2label={"0": "cat", "1": "dog"})
    assert "id2label has 2 labels" in failed(vitdeploy.verify(folder, model=strangers.checkpoint))["labels"]


def test_another_mean(strangers: Strangers, tmp_path: Path) -> None:
    folder = strangers.optimum(tmp_path / "optimum")
    edit_json(folder / "preprocessor_config.json", image_mean=[0.485, 0.456, 0.406])
    report = vitdeploy.verify(folder, model=strangers.checkpoint)
    assert failed(report).keys() == {"preprocessing"}
    text = "preprocessor_config.json: image_mean is [0.485, 0.456, 0.406], in the checkpoint [0.5, 0.5, 0.5]"
    assert text in error(report)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"size": {"height": 48, "width": 48}}, "size is [48, 48], in the checkpoint [32, 32]"),
        ({"resample": 3}, 'resample is "bicubic", in the checkpoint "bilinear"'),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor is 0.00784"),
        ({"do_rescale": False}, "rescale_factor is 1.0"),
        (
            {"do_center_crop": True, "crop_size": 32, "size": {"shortest_edge": 36}},
            'resize is "shortest_edge"',
        ),
    ],
)
def test_other_preprocessing(strangers: Strangers, tmp_path: Path, change: dict, said: str) -> None:
    folder = strangers.optimum(tmp_path / "optimum")
    edit_json(folder / "preprocessor_config.json", **change)
    assert said in failed(vitdeploy.verify(folder, model=strangers.checkpoint))["preprocessing"]


def test_what_is_only_assumed_of_the_checkpoint_fails_nobody(strangers: Strangers, tmp_path: Path) -> None:
    """Its folder has no preprocessor_config.json: nothing says that another mean is wrong."""
    shutil.copytree(strangers.checkpoint, tmp_path / "bare")
    (tmp_path / "bare/preprocessor_config.json").unlink()
    folder = strangers.optimum(tmp_path / "optimum")
    edit_json(folder / "preprocessor_config.json", image_mean=[0.485, 0.456, 0.406])
    report = vitdeploy.verify(folder, model=tmp_path / "bare")
    report.check()
    assert [f.detail for f in report.findings if f.check == "preprocessing"] == [
        "preprocessor_config.json: the checkpoint says nothing of it"
    ]


def test_other_scores(strangers: Strangers, tmp_path: Path) -> None:
    shutil.copytree(strangers.checkpoint, tmp_path / "several")
    edit_json(tmp_path / "several/config.json", problem_type="multi_label_classification")

    def say(model: onnx.ModelProto) -> None:
        onnx.helper.set_model_props(model, {"vitdeploy.scores": "softmax"})

    path = edited(strangers.torchscript(17), tmp_path / "model.onnx", say)
    said = failed(vitdeploy.verify(path, model=tmp_path / "several"))
    assert said == {"scores": "the file's metadata says softmax, the checkpoint sigmoid"}


def test_preprocessing_that_cannot_be_read_is_said(strangers: Strangers, tmp_path: Path) -> None:
    folder = strangers.optimum(tmp_path / "optimum")
    edit_json(folder / "preprocessor_config.json", image_processor_type="SomethingElse")
    report = vitdeploy.verify(folder, model=strangers.checkpoint)
    report.check()
    (finding,) = [f for f in report.findings if f.check == "preprocessing"]
    assert finding.state == "not checked"
    assert "SomethingElse" in finding.detail


def test_one_changed_weight(strangers: Strangers, tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        change_weight(model, "classifier.weight", by=0.05)

    path = edited(strangers.dynamo, tmp_path / "model.onnx", change)
    report = vitdeploy.verify(path, model=strangers.checkpoint)
    assert failed(report).keys() == {"parity", "weights"}
    assert "differs: head.weight (classifier.weight), 1 of 128 elements" in error(report)


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_one_changed_weight_that_was_transposed(strangers: Strangers, tmp_path: Path, exporter: str) -> None:
    """Both of PyTorch's exporters store a linear layer's weight transposed, under a number."""
    source = strangers.dynamo if exporter == "dynamo" else strangers.torchscript(17)
    second = [t.name for t in onnx.load(source).graph.initializer if [*t.dims] == [48, 32]]

    def change(model: onnx.ModelProto) -> None:
        change_weight(model, second[-1], by=0.5)

    path = edited(source, tmp_path / "model.onnx", change)
    said = failed(vitdeploy.verify(path, model=strangers.checkpoint))["weights"]
    assert f"differs: blocks.1.mlp.fc2.weight ({second[-1]}), 1 of 1536 elements" in said


def test_a_changed_weight_among_others_that_are_alike(strangers: Strangers, tmp_path: Path) -> None:
    """Biases that are all zeros are one initialiser: which of them it was cannot be told."""
    name = "vit.layers.0.mlp.fc1.bias"

    def change(model: onnx.ModelProto) -> None:
        change_weight(model, name, by=0.5)

    path = edited(strangers.dynamo, tmp_path / "model.onnx", change)
    said = failed(vitdeploy.verify(path, model=strangers.checkpoint))["weights"]
    assert f"mlp.fc1.bias ({name}), 1 of 48 elements" in said


def test_nan(strangers: Strangers, tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        change_weight(model, "classifier.weight", by=np.nan)

    path = edited(strangers.dynamo, tmp_path / "model.onnx", change)
    said = failed(vitdeploy.verify(path, model=strangers.checkpoint))
    assert "NaN" in said["parity"]
    assert "head.weight" in said["weights"]


def test_another_model_altogether(strangers: Strangers, tmp_path: Path) -> None:
    config = transformers.ViTConfig.from_pretrained(strangers.checkpoint)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "other")
    report = vitdeploy.verify(strangers.dynamo, model=tmp_path / "other")
    assert "parity" in failed(report)
    error(report)


def test_more_classes(strangers: Strangers, tmp_path: Path) -> None:
    config = transformers.ViTConfig.from_pretrained(strangers.checkpoint, num_labels=6)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "other")
    said = failed(vitdeploy.verify(strangers.dynamo, model=tmp_path / "other"))["parity"]
    assert "outputs are (4,) per image, the reference (6,)" in said


def test_a_wide_gemm_in_an_fp16_file(strangers: Strangers, tmp_path: Path) -> None:
    path = tmp_path / "model_fp16.onnx"
    onnx.save(in_fp16(onnx.load(strangers.torchscript(17))), path)
    node = next(n for n in onnx.load(path).graph.node if n.op_type == "MatMul" and "fc1" in n.name)
    widen(path, node.name)
    report = vitdeploy.verify(path, model=strangers.checkpoint)
    assert failed(report).keys() == {"precision"}
    message = error(report)
    assert "fp16 by its name, but 1 of 18 GEMMs computes in another dtype" in message
    assert f"{node.name} (float32)" in message


def test_an_fp32_file_under_an_fp16_name(strangers: Strangers, tmp_path: Path) -> None:
    path = edited(strangers.torchscript(17), tmp_path / "model_fp16.onnx", lambda model: None)
    said = failed(vitdeploy.verify(path, model=strangers.checkpoint))["precision"]
    assert "18 of 18 GEMMs compute in another dtype" in said
    assert "and 15 more" in said


def test_a_plain_file_under_a_quantised_name(strangers: Strangers, tmp_path: Path) -> None:
    path = edited(strangers.torchscript(17), tmp_path / "model_int8.onnx", lambda model: None)
    said = failed(vitdeploy.verify(path, model=strangers.checkpoint))["precision"]
    assert said == "its name says that it is quantised, and no operator is"


def test_weights_that_are_only_stored_in_fp16(strangers: Strangers, tmp_path: Path) -> None:
    """Every GEMM is in fp32, which is no fault; the weights decide what may be lost."""

    def store(model: onnx.ModelProto) -> None:
        graph = model.graph
        casts = []
        for tensor in graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT:
                array = numpy_helper.to_array(tensor).astype(np.float16)
                name = tensor.name
                tensor.CopyFrom(numpy_helper.from_array(array, f"{name}/half"))
                casts.append(
                    onnx.helper.make_node("Cast", [f"{name}/half"], [name], to=onnx.TensorProto.FLOAT)
                )
        nodes = [*casts, *graph.node]
        del graph.node[:]
        graph.node.extend(nodes)

    path = edited(strangers.torchscript(17), tmp_path / "model.onnx", store)
    report = vitdeploy.verify(path, model=strangers.checkpoint)
    report.check()
    assert [f.detail for f in report.findings if f.check == "precision"] == [
        "weights in fp16, every GEMM (18) in float32"
    ]


def test_metadata_that_contradicts_the_checkpoint(strangers: Strangers, tmp_path: Path) -> None:
    def say(model: onnx.ModelProto) -> None:
        said = {"names": "{0: 'cat', 1: 'dog', 2: 'fox', 3: 'eel'}", "imgsz": "[64, 64]", "task": "classify"}
        onnx.helper.set_model_props(model, said)

    path = edited(strangers.torchscript(17), tmp_path / "model.onnx", say)
    said = failed(vitdeploy.verify(path, model=strangers.checkpoint))
    assert said["labels"].startswith("the file's metadata (ultralytics): class 2 is 'fox'")
    assert (
        said["preprocessing"]
        == "the file's metadata (ultralytics): size is [64, 64], in the checkpoint [32, 32]"
    )


def test_a_wide_gemm_in_a_function_of_the_file(strangers: Strangers, tmp_path: Path) -> None:
    """Older exporters put modules into functions; what is inside of them counts."""
    model = in_fp16(onnx.load(strangers.torchscript(17)))
    node = next(n for n in model.graph.node if n.op_type == "MatMul" and "fc1" in n.name)
    inside = [
        onnx.helper.make_node("Cast", ["a"], ["wide_a"], to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("Cast", ["b"], ["wide_b"], to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("MatMul", ["wide_a", "wide_b"], ["wide"], name="hidden"),
        onnx.helper.make_node("Cast", ["wide"], ["c"], to=onnx.TensorProto.FLOAT16),
    ]
    imports = [onnx.helper.make_opsetid("", 17)]
    model.functions.append(onnx.helper.make_function("mine", "Product", ["a", "b"], ["c"], inside, imports))
    model.opset_import.append(onnx.helper.make_opsetid("mine", 1))
    node.op_type, node.domain = "Product", "mine"
    onnx.save(model, tmp_path / "model_fp16.onnx")
    said = failed(vitdeploy.verify(tmp_path / "model_fp16.onnx", model=strangers.checkpoint))
    assert said.keys() == {"precision"}
    assert "1 of 18 GEMMs computes in another dtype" in said["precision"]
