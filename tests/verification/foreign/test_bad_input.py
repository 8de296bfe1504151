"""What is no image model, or damaged, is one line that says what it is."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import vitdeploy
from tests.helpers.bundles import write_bundle
from vitdeploy.errors import (
    BundleError,
    CheckpointError,
    DeviceUnavailable,
    ExportError,
    UsageError,
    VitdeployError,
)
from vitdeploy.verification.foreign.onnx_file import OnnxFile

FLOAT, INT64, UINT8 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.UINT8
DIGITS = ["N", 3, 32, 32]


def classifier(
    inputs: list[tuple[str, int, list[int | str]]],
    outputs: Sequence[tuple[str, list[int | str]]] = (("logits", ["N", 10]),),
) -> onnx.ModelProto:
    """A graph of one product, whatever its border says."""
    weight = numpy_helper.from_array(np.zeros((3072, 10), np.float32), "weight")
    nodes = [
        helper.make_node("Flatten", [inputs[0][0]], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], [outputs[0][0]], name="head"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(*spec) for spec in inputs],
        [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in outputs],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def refusal(path: Path, kind: type[VitdeployError] = UsageError, model: object = "digits") -> str:
    with pytest.raises(kind) as caught:
        vitdeploy.verify(path, model=model)
    text = caught.value.message
    assert "\n" not in text
    assert len(text) + len(caught.value.hint or "") <= 400 + 2 * len(str(path))
    return text


@pytest.mark.parametrize(
    "inputs, said",
    [
        ([("ids", INT64, ["N", "T"]), ("pixels", FLOAT, DIGITS)], "has 2 inputs (ids, pixels)"),
        ([("input_ids", INT64, ["N", "T"])], "its input input_ids int64 (?, ?) is no image"),
        ([("x", FLOAT, ["N", 3072])], "is no (N, C, H, W) tensor"),
        ([("x", FLOAT, [0, 3, 32, 32])], "a dimension of its input x float32 (0, 3, 32, 32) is 0"),
        ([("x", FLOAT, ["N", 32, 32, 3])], "is not (N, H, W, C), in uint8, or (N, C, H, W), in floats"),
        ([("x", UINT8, ["N", 3, 32, 32])], "is not (N, H, W, C), in uint8"),
        ([("x", TensorProto.BFLOAT16, DIGITS)], "its input x bfloat16"),
        ([("x", FLOAT, ["N", 1, 32, 32])], "reads 1 channels"),
    ],
)
def test_what_goes_in(tmp_path: Path, inputs: list, said: str) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(classifier(inputs), path)
    assert said in refusal(path)


def test_what_comes_out(tmp_path: Path) -> None:
    path = tmp_path / "decoder.onnx"
    onnx.save(classifier([("x", FLOAT, DIGITS)], [("depth", ["N", 32, 32]), ("mask", ["N", 1])]), path)
    said = refusal(path)
    assert "none of its outputs (depth float32 (?, 32, 32), mask float32 (?, 1)) is one of digits's" in said
    assert "logits (N, 10)" in said


def test_a_size_that_the_patch_does_not_divide(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(classifier([("x", FLOAT, ["N", 3, 30, 30])]), path)
    assert "30x30 is not divisible by the patch size 8" in refusal(path)


@pytest.mark.parametrize("content", [b"", b"\xff\xff\xff", b"text", b"\x89HDF\r\n"])
def test_no_onnx_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert "ONNX file" in refusal(path)


def test_a_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    data = classifier([("x", FLOAT, DIGITS)]).SerializeToString()
    path.write_bytes(data[: len(data) // 2])
    assert "not a readable ONNX file" in refusal(path)


def test_nothing_there(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "nowhere.onnx")
    assert "neither a bundle nor a folder with .onnx files" in refusal(tmp_path)


def external(tmp_path: Path, change: Callable[[onnx.TensorProto], None]) -> Path:
    """Weights in a file of their own, after ``change``."""
    path = tmp_path / "model.onnx"
    model = classifier([("x", FLOAT, DIGITS)])
    onnx.save(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    model = onnx.load(path, load_external_data=False)
    change(model.graph.initializer[0])
    path.write_bytes(model.SerializeToString())
    return path


def location(value: str, key: str = "location") -> Callable[[onnx.TensorProto], None]:
    def change(tensor: onnx.TensorProto) -> None:
        next(entry for entry in tensor.external_data if entry.key == key).value = value

    return change


@pytest.mark.parametrize("where", ["/etc/passwd", "../secret.data", "a/../../b", "C:\\weights", ""])
def test_weights_outside_of_the_folder(tmp_path: Path, where: str) -> None:
    assert "lies where nothing may lie" in refusal(external(tmp_path, location(where)), BundleError)


def test_weights_that_a_link_leads_out_to(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    path = external(tmp_path / "model", location("linked.data"))
    (tmp_path / "elsewhere").write_bytes(b"0" * 200_000)
    (tmp_path / "model/linked.data").symlink_to(tmp_path / "elsewhere")
    assert "a link that leads out of its folder" in refusal(path, BundleError)


def test_weights_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    """Its files are links from ``snapshots`` to ``blobs``: inside of the same model's folder."""
    snapshot = tmp_path / "models--a--b/snapshots/0123"
    snapshot.mkdir(parents=True)
    path = external(snapshot, lambda tensor: None)
    (tmp_path / "models--a--b/blobs").mkdir()
    blob = tmp_path / "models--a--b/blobs/weights"
    shutil.move(snapshot / "model.onnx.data", blob)
    (snapshot / "model.onnx.data").symlink_to(blob)

    assert OnnxFile(path, "model.onnx").interface.size == (32, 32)


def test_weights_that_are_missing_or_cut_off(tmp_path: Path) -> None:
    path = external(tmp_path, lambda tensor: None)
    data = tmp_path / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])
    assert "too short for the weight 'weight'" in refusal(path, BundleError)
    data.unlink()
    assert "its weights in model.onnx.data are missing" in refusal(path, BundleError)
    assert "lies where nothing may lie" in refusal(external(tmp_path, location("x", "offset")), BundleError)


def test_a_bundle_has_its_own_reference(tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "b")
    assert "is a bundle, which carries its own reference" in refusal(made.root)


def test_a_variant_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(classifier([("x", FLOAT, [1, 3, 32, 32])], [("logits", [1, 1000])]), path)
    assert "whose weights would be random" in refusal(path, model="Ti/16")


def test_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(classifier([("x", FLOAT, DIGITS)]), path)
    assert "no such file" in refusal(path, CheckpointError, tmp_path / "none")


def test_bf16_does_not_run_here(tmp_path: Path) -> None:
    path = tmp_path / "model_bf16.onnx"
    onnx.save(classifier([("x", FLOAT, DIGITS)]), path)
    assert "bf16" in refusal(path, DeviceUnavailable)


def test_what_onnx_runtime_does_not_load(tmp_path: Path) -> None:
    model = classifier([("x", FLOAT, DIGITS)])
    model.graph.node[1].op_type = "NoSuchOperator"
    onnx.save(model, tmp_path / "model.onnx")
    assert "ONNX Runtime cannot load it" in refusal(tmp_path / "model.onnx", BundleError)


def test_other_files_of_a_folder_are_left_out_with_a_word(tmp_path: Path) -> None:
    """CLIP's repositories have a text model beside the vision model."""
    onnx.save(classifier([("x", FLOAT, DIGITS)]), tmp_path / "model.onnx")
    onnx.save(classifier([("input_ids", INT64, ["N", "T"])]), tmp_path / "text_model.onnx")
    report = vitdeploy.verify(tmp_path, model="digits")
    assert not report.passed  # its weights are zeros
    (left,) = [f for f in report.findings if f.file == "text_model.onnx"]
    assert (left.state, left.detail) == ("not checked", "its input input_ids int64 (?, ?) is no image")
    (tmp_path / "model.onnx").unlink()
    assert "is no image" in refusal(tmp_path)


def test_a_file_of_a_folder_that_does_not_run_fails(tmp_path: Path) -> None:
    onnx.save(classifier([("x", FLOAT, DIGITS)]), tmp_path / "model.onnx")
    broken = classifier([("x", FLOAT, DIGITS)])
    broken.graph.node[1].op_type = "NoSuchOperator"
    onnx.save(broken, tmp_path / "model_q4.onnx")
    report = vitdeploy.verify(tmp_path, model="digits")
    (left,) = [f for f in report.findings if f.file == "model_q4.onnx"]
    assert (left.check, left.state) == ("parity", "failed")
    assert left.detail.startswith("ONNX Runtime cannot load it")


def test_a_module_that_does_not_take_such_images(tmp_path: Path) -> None:
    import torch

    path = tmp_path / "model.onnx"
    onnx.save(classifier([("x", FLOAT, DIGITS)]), path)
    assert "does not run on a" in refusal(path, ExportError, torch.nn.Linear(5, 10))


@pytest.mark.parametrize("flags", [{"backends": ["onnxruntime"]}, {"provider": "cuda"}])
def test_backends_are_for_bundles(tmp_path: Path, flags: dict) -> None:
    with pytest.raises(UsageError, match="a file of no bundle is run by ONNX Runtime on the CPU"):
        vitdeploy.verify(tmp_path, model="digits", **flags)


def engine(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "model.plan"
    path.write_bytes(content)
    return path


def test_an_engine_that_does_not_run_here(tmp_path: Path) -> None:
    head = bytearray(64)
    head[:4], head[24:28] = b"ptrt", bytes([10, 13, 0, 35])
    from vitdeploy.tensorrt.flavours import FLAVOURS

    head[: len(FLAVOURS["tensorrt"].magic)] = FLAVOURS["tensorrt"].magic
    said = refusal(engine(tmp_path, bytes(head)), DeviceUnavailable)
    assert "an engine of TensorRT 10.13.0.35, which does not run here: " in said


def test_no_engine(tmp_path: Path) -> None:
    assert "too few for an engine" in refusal(engine(tmp_path, b"short"), BundleError)
    assert "not an engine" in refusal(engine(tmp_path, b"junk" * 20), BundleError)


@pytest.mark.parametrize("place", ["name", "op_type", "input", "metadata"])
def test_names_that_are_no_text(tmp_path: Path, place: str) -> None:
    """Protobuf hands such names out as bytes, which nothing expects."""
    model = classifier([("x", FLOAT, DIGITS)])
    mark = "mark-of-the-test"
    match place:
        case "name" | "op_type":
            setattr(model.graph.node[0], place, mark)
        case "input":
            model.graph.node[0].input[0] = mark
        case "metadata":
            helper.set_model_props(model, {mark: "value"})
    data = model.SerializeToString()
    path = tmp_path / "model.onnx"
    path.write_bytes(data.replace(mark.encode(), b"\xff" * len(mark)))
    assert "names in it are no text: it is damaged" in refusal(path)


@pytest.mark.slow
def test_any_byte_may_be_another(tmp_path: Path) -> None:
    """What is damaged is refused or held against the checkpoint, and never a traceback."""
    model = classifier([("x", FLOAT, DIGITS)])
    sound = model.SerializeToString()
    weight = numpy_helper.to_array(model.graph.initializer[0]).tobytes()
    begin = sound.index(weight)
    places = [*range(begin), *range(begin + len(weight), len(sound))]
    path = tmp_path / "model.onnx"
    for place in places:
        for value in (0, sound[place] ^ 1, 0xFF):
            path.write_bytes(sound[:place] + bytes([value]) + sound[place + 1 :])
            said = complaint(path)
            assert "\n" not in said
            assert len(said) < 400 + len(str(path))


def complaint(path: Path) -> str:
    """What is wrong with a file before it runs; empty if nothing is."""
    try:
        return str(OnnxFile(path, "model.onnx").interface)[:0]
    except VitdeployError as error:
        return error.message
