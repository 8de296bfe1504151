"""An ONNX file that says what it is: our keys come back as they went; other tools' are understood."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitdeploy.bundle.onnx_metadata import SelfDescription, properties, read_properties
from vitdeploy.config import Preprocess

SPECS = (
    Preprocess(),
    Preprocess(size=(224, 320), resize="cover", resize_to=(256, 360), resample="bicubic", exif=True),
    Preprocess(resize="shortest_edge", resize_edge=256, crop_rounding="round", mean=(0.485, 0.456, 0.406)),
    Preprocess(resize="contain", resize_to=(248, 248), pad=(1, 2, 3), rescale=1.0, std=(1.0, 2.0, 3.0)),
)
OURS = properties(
    precision="fp16",
    input="float",
    outputs=("logits",),
    scores="softmax",
    labels=("a", "b"),
    preprocess=SPECS[2],
)


@pytest.mark.parametrize("spec", SPECS)
def test_there_and_back(spec: Preprocess) -> None:
    labels = ("crème brûlée", 'a "quoted" one', "a, comma")
    entries = properties(
        precision="mixed",
        input="uint8",
        outputs=("logits",),
        scores="sigmoid",
        labels=labels,
        preprocess=spec,
    )
    assert all(isinstance(value, str) for value in entries.values())
    said = read_properties(entries)
    assert (said.source, said.precision, said.input, said.output) == ("vitdeploy", "mixed", "uint8", "logits")
    assert (said.labels, said.scores, said.whole_preprocess, said.notes) == (labels, "sigmoid", spec, ())
    assert json.loads(json.dumps(said.as_dict()))["labels"] == list(labels)


def test_features_have_no_labels() -> None:
    entries = properties(
        precision="fp32",
        input="float",
        outputs=("features", "tokens"),
        scores="softmax",
        labels=("a",),
        preprocess=None,
    )
    assert sorted(entries) == ["vitdeploy.input", "vitdeploy.output", "vitdeploy.precision"]
    assert entries["vitdeploy.output"] == "features"
    said = read_properties(entries)
    assert (said.labels, said.scores, said.whole_preprocess, dict(said.preprocess)) == (None, None, None, {})


def test_a_bundle_from_before() -> None:
    said = read_properties({"vitdeploy.precision": "fp32", "vitdeploy.input": "float"})
    assert said == SelfDescription(
        "vitdeploy", precision="fp32", input="float", keys=("vitdeploy.precision", "vitdeploy.input")
    )


def test_only_what_is_said_is_stated() -> None:
    said = read_properties({"vitdeploy.mean": "[0.1, 0.2, 0.3]"})
    assert dict(said.preprocess) == {"mean": (0.1, 0.2, 0.3)}
    assert said.whole_preprocess is None


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("precision", "fp4", "vitdeploy.precision in its metadata is none of fp32, fp16, bf16, mixed, int8"),
        ("scores", "", "vitdeploy.scores in its metadata is none of softmax, sigmoid, none"),
        ("labels", "{", "vitdeploy.labels in its metadata is no JSON list of labels"),
        ("labels", '["a", 1]', "vitdeploy.labels"),
        ("labels", "[" * 100_000, "vitdeploy.labels"),
        ("labels", json.dumps(["x" * 3000]), "vitdeploy.labels"),
        ("mean", "[0.5, 0.5", "the preprocessing in its metadata cannot be read: mean"),
        ("mean", "[NaN, 0, 0]", "the preprocessing in its metadata cannot be read: mean"),
        ("std", "[0, 0, 0]", "the preprocessing in its metadata is wrong: mean and std"),
        ("resize", "stretch", "the preprocessing in its metadata cannot be read: resize"),
        ("size", "[224]", "the preprocessing in its metadata cannot be read: size"),
    ],
)
def test_malformed_values_are_a_note(key: str, value: str, said: str) -> None:
    found = read_properties({**OURS, f"vitdeploy.{key}": value})
    (note,) = found.notes
    assert note.startswith(said)
    assert "\n" not in note
    assert len(note) < 400


def test_a_value_beyond_any_use_is_not_parsed() -> None:
    found = read_properties({"vitdeploy.labels": '["' + "x" * 9_000_000 + '"]'})
    assert found.labels is None
    assert len(found.notes) == 1


# --- other tools ----------------------------------------------------------------------------------------


def test_ultralytics() -> None:
    """Its exporter writes ``str(value)`` of each entry: a dict of names, a list of sizes."""
    names = {0: "tench", 1: "collie's dog", 2: 'a "b"', 3: "tab\there"}
    entries = {
        "description": "Ultralytics YOLO26n-cls model",
        "stride": "1",
        "task": "classify",
        "batch": "1",
        "imgsz": str([224, 320]),
        "names": str(names),
    }
    said = read_properties(entries)
    assert (said.source, said.labels) == ("ultralytics", tuple(names.values()))
    assert dict(said.preprocess) == {"size": (224, 320)}
    assert said.notes == ()


def test_yolov5_has_a_list() -> None:
    said = read_properties({"stride": "32", "names": str(["person", "car"]), "imgsz": "640"})
    assert said.labels == ("person", "car")
    assert dict(said.preprocess) == {"size": (640, 640)}


@pytest.mark.parametrize(
    "names",
    ["{0: 'a', 2: 'b'}", "{'a': 0}", "__import__('os')", "{0: open('x')}", "{0: 'a'", "['a' 'b']", ""],
)
def test_names_are_never_evaluated(names: str) -> None:
    said = read_properties({"task": "classify", "names": names})
    assert said.labels is None
    assert said.notes == ("names in its metadata does not name classes from 0",)


def test_lightly_train() -> None:
    """JSON; rows of the head are in the order of ``classes``, not of its numbers."""
    entries = {
        "lightly_train_version": "0.15.0",
        "classes": json.dumps({7: "cat", 3: "dog"}),
        "image_normalize": json.dumps({"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}),
        "model_name": "dinov2/vits14",
    }
    said = read_properties(entries)
    assert (said.source, said.labels) == ("lightly-train", ("cat", "dog"))
    assert dict(said.preprocess) == {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@pytest.mark.parametrize(
    "value", ["null", "{}", '{"mean": [1], "std": "x"}', '{"mean": [0], "std": [0]}', "["]
)
def test_malformed_statistics(value: str) -> None:
    said = read_properties({"lightly_train_version": "1", "image_normalize": value})
    assert said.notes
    assert "std" not in said.preprocess


def test_a_file_that_says_nothing() -> None:
    assert read_properties({}) == read_properties({"names": "x"}) == SelfDescription()


@pytest.mark.slow
@given(
    st.dictionaries(
        st.sampled_from(
            [*OURS, "names", "imgsz", "task", "classes", "image_normalize", "lightly_train_version", "other"]
        ),
        st.text() | st.recursive(st.integers() | st.text(), st.lists).map(json.dumps),
    )
)
def test_anything_is_read_or_noted(entries: dict[str, str]) -> None:
    said = read_properties(entries)
    json.dumps(said.as_dict(), allow_nan=False)
    if said.whole_preprocess is not None:
        assert set(said.preprocess) == set(said.as_dict()["preprocess"])
