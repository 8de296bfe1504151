"""The model repository that is written, read with the server's own protobuf."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.external_data_helper import convert_model_to_external_data

from tests.fakes.machines import L4, RTX, go_to
from tests.helpers.bundles import FEATURES, LABELS, answer, write_bundle
from tests.helpers.engine_bundles import engines
from tests.helpers.quantised_bundles import held_out, write_quantised
from vitdeploy.bundle.folder import Bundle
from vitdeploy.config import BatchRange
from vitdeploy.errors import BundleError, UsageError
from vitdeploy.packaging.triton_config import parse_config
from vitdeploy.packaging.triton_network import check_external_data
from vitdeploy.packaging.triton_repository import IMAGE, VENDORED
from vitdeploy.packaging.write import Package
from vitdeploy.verification.parity import TOLERANCES, passes

Make = Callable[..., Package]


def config(package: Package, name: str) -> Any:
    text = (package.folder / "models" / name / "config.pbtxt").read_text(encoding="utf-8")
    return parse_config(text)


def models(package: Package) -> list[str]:
    return sorted(path.name for path in (package.folder / "models").iterdir())


def test_the_network(package: Make, bundle: Bundle) -> None:
    made = package(bundle, threads=3, max_delay_ms=1.5, instances=2)
    assert models(made) == ["linear", "linear_image", "linear_labels", "linear_preprocess"]
    found = config(made, "linear")
    assert (found.name, found.platform, found.max_batch_size) == ("linear", "onnxruntime_onnx", 8)
    (pixels,), (logits,) = found.input, found.output
    assert (pixels.name, list(pixels.dims), pixels.data_type) == ("pixel_values", [3, 8, 8], 11)  # TYPE_FP32
    assert (logits.name, list(logits.dims), logits.label_filename) == ("logits", [5], "labels.txt")
    assert list(found.dynamic_batching.preferred_batch_size) == [2, 8]
    assert found.dynamic_batching.max_queue_delay_microseconds == 1500
    (group,) = found.instance_group
    assert (group.kind, group.count) == (2, 2)  # KIND_CPU
    assert [request.batch_size for request in found.model_warmup] == [1, 2]
    assert found.version_policy.latest.num_versions == 1
    assert {key: value.string_value for key, value in found.parameters.items()} == {
        "intra_op_thread_count": "3",
        "inter_op_thread_count": "1",
        "vitdeploy_artifact": "onnx-fp32",
        "vitdeploy_bundle": bundle.manifest.digest,
    }
    folder = made.folder / "models/linear"
    assert (folder / "labels.txt").read_text().splitlines() == list(LABELS)
    assert (folder / "1/model.onnx").read_bytes() == bundle.path("model.onnx").read_bytes()


def test_the_ensemble(package: Make, bundle: Bundle) -> None:
    made = package(bundle, name="eyes", version=7, top_k=2)
    found = config(made, "eyes_image")
    assert (found.platform, found.max_batch_size) == ("ensemble", 8)
    (image,) = found.input
    assert (image.name, image.data_type, list(image.dims)) == ("image", 13, [1])  # TYPE_STRING
    assert [(one.name, list(one.dims)) for one in found.output] == [
        ("labels", [2]),
        ("indices", [2]),
        ("scores", [2]),
    ]
    steps = found.ensemble_scheduling.step
    assert [step.model_name for step in steps] == ["eyes_preprocess", "eyes", "eyes_labels"]
    for step in steps:  # what a step takes and gives is what its model says
        model = config(made, step.model_name)
        assert set(step.input_map) == {one.name for one in model.input}
        assert set(step.output_map) == {one.name for one in model.output}
        assert model.max_batch_size == found.max_batch_size
    for name in models(made):
        assert (made.folder / "models" / name / "7").is_dir()
        assert any((made.folder / "models" / name / "7").iterdir())  # stores of objects know no empty folders
    labels = json.loads((made.folder / "models/eyes_labels/7/labels.json").read_text())
    assert labels == {"labels": list(LABELS), "scores": "softmax", "top_k": 2}


@pytest.mark.slow
def test_several_outputs(package: Make, tmp_path: Path) -> None:
    made = package(write_bundle(tmp_path / "two.bundle", features=FEATURES), name="eyes")
    logits, features = config(made, "eyes").output
    assert (logits.name, list(logits.dims), logits.label_filename) == ("logits", [5], "labels.txt")
    assert (features.name, list(features.dims), features.label_filename) == ("features", [7], "")
    whole = config(made, "eyes_image")
    assert [(one.name, list(one.dims)) for one in whole.output] == [
        ("labels", [5]), ("indices", [5]), ("scores", [5]), ("features", [7]),
    ]  # fmt: skip
    steps = {step.model_name: step for step in whole.ensemble_scheduling.step}
    assert dict(steps["eyes"].output_map) == {"logits": "logits", "features": "features"}
    assert dict(steps["eyes_labels"].input_map) == {"logits": "logits"}
    text = (made.folder / "README.md").read_text()
    assert "and gives `logits`, `features`." in text
    assert "`labels`, `indices`, `scores`, `features`" in text
    uri = {"storage_uri": "s3://bucket/eyes"}
    service = package(write_bundle(tmp_path / "b", features=FEATURES), "kserve", "service", **uri)
    assert "gives `logits`, `features`, over" in (service.folder / "README.md").read_text()


def test_fewer_classes_than_labels_asked_for(package: Make, bundle: Bundle) -> None:
    made = package(bundle, top_k=50)
    assert list(config(made, "linear_image").output[0].dims) == [5]


def test_labels_of_one_line_each(package: Make, tmp_path: Path) -> None:
    labels = ("a\nb", "c\td", "", "  é ", "e")
    made = package(write_bundle(tmp_path / "b.bundle", labels=labels))
    folder = made.folder / "models"
    assert (folder / "linear/labels.txt").read_text("utf-8") == "a b\nc d\n\né\ne\n"
    assert json.loads((folder / "linear_labels/1/labels.json").read_text("utf-8"))["labels"] == list(labels)


def test_without_labels(package: Make, tmp_path: Path) -> None:
    made = package(write_bundle(tmp_path / "b.bundle", labels=None))
    assert config(made, "linear").output[0].label_filename == ""
    assert not (made.folder / "models/linear/labels.txt").exists()
    assert json.loads((made.folder / "models/linear_labels/1/labels.json").read_text())["labels"] is None


@pytest.mark.slow
def test_uint8(package: Make, tmp_path: Path) -> None:
    made = package(write_bundle(tmp_path / "b.bundle", kind="uint8"))
    for pixels in (config(made, "linear").input[0], config(made, "linear_preprocess").output[0]):
        assert (pixels.data_type, list(pixels.dims)) == (2, [8, 8, 3])  # TYPE_UINT8


def test_a_fixed_batch(package: Make, tmp_path: Path) -> None:
    made = package(write_bundle(tmp_path / "b.bundle", batch=BatchRange(4, 4, 4)))
    assert {config(made, name).max_batch_size for name in models(made)} == {0}
    assert not config(made, "linear").HasField("dynamic_batching")
    assert list(config(made, "linear").input[0].dims) == [4, 3, 8, 8]
    assert list(config(made, "linear_image").input[0].dims) == [4]
    assert list(config(made, "linear_image").output[0].dims) == [4, 5]
    assert "[data] * 4" in (made.folder / "README.md").read_text()


@pytest.mark.parametrize("output", ["features", "tokens"])
def test_no_labels_of_features(package: Make, tmp_path: Path, output: str) -> None:
    bundle = write_bundle(tmp_path / "b.bundle", output=output, labels=None)
    made = package(bundle)
    assert models(made) == ["linear", "linear_image", "linear_preprocess"]
    assert [one.name for one in config(made, "linear_image").output] == [output]
    with pytest.raises(UsageError, match="--top-k"):
        package(bundle, folder="b", top_k=3)


def test_tensors_only(package: Make, bundle: Bundle) -> None:
    made = package(bundle, tensors_only=True)
    assert models(made) == ["linear"]
    assert not (made.folder / "Dockerfile").exists()
    assert IMAGE in (made.folder / "compose.yaml").read_text()
    assert "_image" not in (made.folder / "README.md").read_text()


def test_no_preprocessing(package: Make, tmp_path: Path) -> None:
    made = package(write_bundle(tmp_path / "b.bundle", preprocess=None))
    assert models(made) == ["linear"]
    assert any("says nothing of preprocessing" in note for note in made.notes)


def test_on_a_gpu(package: Make, bundle: Bundle) -> None:
    made = package(bundle, artifact="fp16", device="gpu")
    assert config(made, "linear").instance_group[0].kind == 1  # KIND_GPU
    assert config(made, "linear_preprocess").instance_group[0].kind == 2
    assert "nvidia" in (made.folder / "compose.yaml").read_text()


@pytest.mark.parametrize(
    "precisions, settings, message",
    [
        (("bf16",), {}, "no bf16 kernels"),
        (("fp32",), {"device": "gpu", "threads": 2}, "--threads is about the CPU"),
        (("fp32",), {"max_batch": 9}, "verified up to 8"),
    ],
)
def test_what_does_not_run_there(
    package: Make, tmp_path: Path, precisions: tuple[str, ...], settings: dict[str, Any], message: str
) -> None:
    bundle = write_bundle(tmp_path / "b.bundle", precisions=precisions)
    with pytest.raises(UsageError, match=message):
        package(bundle, **settings)


# --- engines -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_engine(package: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    go_to(monkeypatch, "10.16.1.11", L4)
    bundle = engines(tmp_path / "e.bundle", "10.16.1.11")
    engine = next(artifact for artifact in bundle.manifest.artifacts if artifact.format == "tensorrt")
    made = package(bundle, artifact=engine.name)
    found = config(made, "linear")
    assert found.platform == "tensorrt_plan"
    assert found.instance_group[0].kind == 1
    assert sorted(p.name for p in (made.folder / "models/linear/1").iterdir()) == ["model.plan"]
    plan = (made.folder / "models/linear/1/model.plan").read_bytes()
    assert plan == bundle.path(engine.path).read_bytes()
    assert any("TensorRT 10.16.1.11" in note for note in made.notes)
    with pytest.raises(UsageError, match="runs on a GPU only"):
        package(bundle, folder="b", artifact=engine.name, device="cpu")


def test_an_engine_of_tensorrt_for_rtx(
    package: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    go_to(monkeypatch, RTX, L4)
    bundle = engines(tmp_path / "e.bundle", RTX, "sm_89")
    engine = next(artifact for artifact in bundle.manifest.artifacts if artifact.format == "tensorrt-rtx")
    with pytest.raises(UsageError, match="does not load"):
        package(bundle, artifact=engine.name)


# --- files -------------------------------------------------------------------------------------------


def with_external_data(bundle: Bundle) -> Bundle:
    """The same bundle with the weights of its fp32 artifact in a file beside it."""
    model = onnx.load(bundle.path("model.onnx"))
    convert_model_to_external_data(model, location="model.onnx.data", size_threshold=0)
    with bundle.edit() as writer:
        folder = writer.file("model.onnx").parent
        onnx.save_model(model, folder / "model.onnx")
        artifact = bundle.manifest.artifacts[0]
        moved = artifact.model_copy(update={"files": ("model.onnx", "model.onnx.data")})
        others = bundle.manifest.artifacts[1:]
        writer.seal(bundle.manifest.model_copy(update={"artifacts": (moved, *others)}))
        return writer.commit()


@pytest.mark.slow
def test_external_data_is_found_there(package: Make, bundle: Bundle) -> None:
    made = package(with_external_data(bundle))
    folder = made.folder / "models/linear/1"
    assert sorted(path.name for path in folder.iterdir()) == ["model.onnx", "model.onnx.data"]
    pixels = np.random.default_rng(5).normal(size=(3, 3, 8, 8)).astype(np.float32)
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"pixel_values": pixels})[0], answer(pixels), atol=1e-4)


def test_external_data_that_is_elsewhere(bundle: Bundle, tmp_path: Path) -> None:
    external = with_external_data(bundle)
    shutil.copy(external.path("model.onnx"), tmp_path / "model.onnx")
    with pytest.raises(BundleError, match=r"'model\.onnx\.data', which is not there"):
        check_external_data(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    "model, name", [("linear_preprocess", "vitdeploy_images"), ("linear_labels", "vitdeploy_scores")]
)
def test_the_modules_of_vitdeploy_stand_alone(package: Make, bundle: Bundle, model: str, name: str) -> None:
    folder = package(bundle).folder / "models" / model / "1" / name
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.py")}
    assert set(files) == {"__init__.py", "config/__init__.py", *VENDORED[name]}
    for path in files.values():
        imports = [line for line in path.read_text().splitlines() if line.startswith(("from ", "import "))]
        assert not [line for line in imports if line.split()[1].partition(".")[0] == "vitdeploy"]


@pytest.mark.slow
def test_the_readme_says_what_a_server_needs(package: Make, bundle: Bundle) -> None:
    text = (package(bundle, folder="a").folder / "README.md").read_text()
    assert "any Triton server" not in text
    assert "backend `onnxruntime`" in text
    (line,) = [line for line in text.splitlines() if line.startswith("RUN ")]
    dockerfile = (package(bundle, folder="b").folder / "Dockerfile").read_text()
    assert line.split('"')[-2] in dockerfile  # the same Pillow
    tensors = (package(bundle, folder="c", tensors_only=True).folder / "README.md").read_text()
    assert "Nothing here needs Python." in tensors
    assert "Pillow" not in tensors


def test_everything_in_the_readme_is_there(package: Make, bundle: Bundle) -> None:
    text = (package(bundle).folder / "README.md").read_text()
    assert "linear_image" in text
    assert "vitdeploy verify linear.bundle --url" in text
    assert "${" not in text.replace("${#head}", "")
    for block in text.split("```python\n")[1:]:
        compile(block.partition("```")[0], "README.md", "exec")


@pytest.mark.parametrize("kind, level", [("fp32", None), ("int8", None), ("fp8", -1)])
def test_how_quantised_networks_are_optimised(
    package: Make, tmp_path: Path, kind: str, level: int | None
) -> None:
    """At the level that the configuration says, ONNX Runtime loads the file and is right."""
    made = package(write_quantised(tmp_path / "b"), artifact=kind, tensors_only=True)
    found = config(made, "linear")
    assert found.parameters["vitdeploy_artifact"].string_value == f"onnx-{kind}"
    assert (found.optimization.graph.level if found.HasField("optimization") else None) == level
    settings = onnxruntime.SessionOptions()
    if level is not None:
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    path, golden = made.folder / "models/linear/1/model.onnx", held_out()
    (logits,) = onnxruntime.InferenceSession(path, settings).run(
        None, {"pixel_values": golden["pixel_values"]}
    )
    precision: Any = kind
    assert passes(golden["reference"], logits, TOLERANCES[precision], "logits")


def test_a_quantised_artifact_is_not_packaged_unsaid(package: Make, tmp_path: Path) -> None:
    both = write_quantised(tmp_path / "a")
    assert package(both, folder="fp32").artifact == "onnx-fp32"
    assert not any("quantised" in note for note in package(both, folder="int8", artifact="int8").notes)
    alone = package(write_quantised(tmp_path / "b", precisions=()), folder="alone")
    assert alone.artifact == "onnx-int8"
    assert "onnx-int8 is quantised; the bundle has no other artifact to package" in alone.notes
