"""An honest bundle is verified; whatever is wrong with one is found, and says where."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vitdeploy
from tests.helpers.bundles import (
    FEATURES,
    LABELS,
    WEIGHT,
    answer_images,
    golden_arrays,
    random_image,
    write_bundle,
)
from tests.helpers.quantised_bundles import write_quantised
from vitdeploy.backends import base
from vitdeploy.backends.onnxruntime import OnnxRuntime
from vitdeploy.bundle.folder import Bundle
from vitdeploy.bundle.manifest import Artifact, Manifest
from vitdeploy.bundle.proofs import ParityMetrics, ParityRecord
from vitdeploy.config import BatchRange
from vitdeploy.errors import BundleError, DeviceUnavailable, ImageError, ParityError, UsageError
from vitdeploy.machine.identity import Cpu
from vitdeploy.progress import Progress, Stage
from vitdeploy.verification.parity import TOLERANCES

ORT = ["onnxruntime"]


def test_an_honest_bundle_is_verified(tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "b", precisions=("fp32", "fp16"))
    report = vitdeploy.verify(made.root, backends=ORT)
    assert report.passed
    report.check()
    assert [(r.artifact, r.batch) for r in report.parity] == [
        (name, batch) for name in ("onnx-fp32", "onnx-fp16") for batch in (1, 2, 8)
    ]
    assert report.files == 3
    assert report.preprocess.images == 2
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False))["ok"] is True


def test_by_default_every_backend_that_runs_artifacts_proves(tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "b")
    artifact = made.manifest.artifacts[0]
    able = {
        backend.name
        for backend in base.all_backends()
        if backend.availability().ok and backend.supports(made.manifest, artifact) is None
    }
    report = vitdeploy.verify(made)
    assert {record.backend for record in report.parity} == able
    readers = {backend.name for backend in base.all_backends() if "onnx" in backend.formats}
    assert {skipped.backend for skipped in report.skipped} == readers - able


def test_batches_are_chosen(tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "b")
    assert [r.batch for r in vitdeploy.verify(made, backends=ORT, batches=[3, 5]).parity] == [3, 5]
    with pytest.raises(UsageError, match="batch size 9"):
        vitdeploy.verify(made, backends=ORT, batches=[9])


def test_fixed_batch(tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "b", batch=BatchRange(4, 4, 4))
    assert [r.batch for r in vitdeploy.verify(made, backends=ORT).parity] == [4]


def wrong(change: str) -> np.ndarray:
    weight = WEIGHT.copy()
    match change:
        case "swapped columns":
            weight[:, [0, 1]] = weight[:, [1, 0]]
        case "one NaN":
            weight[5, 2] = np.nan
        case "a thousandth":
            weight *= 1.001
    return weight


@pytest.mark.parametrize("change", ["swapped columns", "one NaN", "a thousandth"])
def test_wrong_weights_are_found(tmp_path: Path, change: str) -> None:
    report = vitdeploy.verify(write_bundle(tmp_path / "b", weight=wrong(change)), backends=ORT)
    assert not report.passed
    assert not any(record.passed for record in report.parity)
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False))["ok"] is False
    with pytest.raises(ParityError, match="onnx-fp32 on onnxruntime, batch 1"):
        report.check()


def test_of_several_outputs_the_wrong_one_is_named(tmp_path: Path) -> None:
    right = vitdeploy.verify(write_bundle(tmp_path / "right", features=FEATURES), backends=ORT)
    assert right.passed
    assert [(r.batch, r.output) for r in right.parity] == [
        (batch, output) for batch in (1, 2, 8) for output in ("logits", "features")
    ]
    report = vitdeploy.verify(write_bundle(tmp_path / "wrong", features=FEATURES * 1.001), backends=ORT)
    assert {record.output for record in report.parity if not record.passed} == {"features"}
    with pytest.raises(ParityError, match="onnx-fp32 on onnxruntime, batch 1, features: relative error"):
        report.check()


def test_another_preprocessing_is_found(tmp_path: Path) -> None:
    golden = golden_arrays()
    golden["image.1.pixel_values"] = golden["image.1.pixel_values"][::-1]  # BGR for RGB
    report = vitdeploy.verify(write_bundle(tmp_path / "b", golden=golden), backends=ORT)
    assert [failure.split(":")[0] for failure in report.failures] == ["preprocessing"]


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "b")
    path = made.root / "model.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"model\.onnx changed"):
        vitdeploy.verify(made.root)


def test_nothing_to_compare_with_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(ParityError, match="golden"):
        vitdeploy.verify(write_bundle(tmp_path / "b", golden={}), backends=ORT)


def test_an_artifact_that_nothing_here_runs_is_not_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = write_bundle(tmp_path / "b", precisions=("fp32", "bf16"))
    monkeypatch.setattr("vitdeploy.verification.local.all_backends", lambda: (OnnxRuntime(),))
    report = vitdeploy.verify(made)
    assert len(report.failures) == 1
    assert report.failures[0].startswith("onnx-bf16: no backend here runs it (onnxruntime: ")
    assert [skipped.artifact for skipped in report.skipped] == ["onnx-bf16"]


class Weights(OnnxRuntime):
    """Runs the weights without reading an artifact, as torch does."""

    traits = dataclasses.replace(OnnxRuntime.traits, name="weights", formats=())

    def supports(self, manifest: Manifest, artifact: Artifact | None) -> str | None:
        return None if artifact is None else super().supports(manifest, artifact)


def test_an_artifact_is_verified_only_by_who_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = write_bundle(tmp_path / "b")
    monkeypatch.setattr("vitdeploy.verification.local.all_backends", lambda: (Weights(),))
    report = vitdeploy.verify(made)
    assert report.failures == ("onnx-fp32: no backend here runs it (no backend reads its format)",)
    monkeypatch.setattr("vitdeploy.verification.local.get_backend", lambda _: Weights())
    named = vitdeploy.verify(made, backends=["weights"])
    assert (named.passed, named.unproven, len(named.parity)) == (True, ("onnx-fp32",), 3)


class Substitute(OnnxRuntime):
    """Opens an artifact, and runs something else in its place."""

    def load(self, bundle: Bundle, artifact: Artifact | None, options: base.Options) -> base.Session:
        session = super().load(bundle, artifact, options)
        session.facts = dataclasses.replace(session.facts, uses_files=False)
        return session


def test_what_runs_in_an_artifacts_place_does_not_prove_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = write_bundle(tmp_path / "b")
    monkeypatch.setattr("vitdeploy.verification.local.all_backends", lambda: (Substitute(),))
    report = vitdeploy.verify(made)
    assert len(report.parity) == 3
    assert report.unproven == ("onnx-fp32",)
    why = "onnxruntime: its files are not for this machine; what was compared was compiled here"
    assert report.failures == (f"onnx-fp32: no backend here runs it ({why})",)


def test_another_backends_proof_stands_beside_a_substitute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Elsewhere(Substitute):
        traits = dataclasses.replace(OnnxRuntime.traits, name="elsewhere", formats=("other",))

    made = write_bundle(tmp_path / "b")
    monkeypatch.setattr("vitdeploy.verification.local.all_backends", lambda: (OnnxRuntime(), Elsewhere()))
    report = vitdeploy.verify(made)
    assert (report.passed, report.unproven, len(report.parity)) == (True, (), 6)


def test_what_named_backends_cannot_run_is_listed(tmp_path: Path) -> None:
    report = vitdeploy.verify(write_bundle(tmp_path / "b", precisions=("fp32", "bf16")), backends=ORT)
    assert report.passed
    assert report.unproven == ("onnx-bf16",)
    assert [skipped.artifact for skipped in report.skipped] == ["onnx-bf16"]


def test_no_artifacts_prove_nothing(tmp_path: Path) -> None:
    report = vitdeploy.verify(write_bundle(tmp_path / "b", precisions=()))
    assert report.failures == ("nothing was compared: the bundle has no artifacts",)


def test_an_artifact_that_a_runtime_cannot_read_is_a_failure(tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "b")
    with made.edit() as writer:
        writer.file("model.onnx").write_bytes(b"junk")
        writer.seal(made.manifest)
        broken = writer.commit()
    report = vitdeploy.verify(broken, backends=ORT)
    assert len(report.failures) == 1
    assert report.failures[0].startswith("onnx-fp32 on onnxruntime: ")


def test_a_backend_asked_for_by_name_must_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = write_bundle(tmp_path / "b")
    monkeypatch.setattr(OnnxRuntime, "availability", lambda _: base.Availability(False, "gone", "install it"))
    with pytest.raises(DeviceUnavailable, match="gone") as caught:
        vitdeploy.verify(made, backends=ORT)
    assert caught.value.hint == "install it"
    assert caught.value.exit_code == 3


def test_unknown_backends_get_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'onnxruntime'"):
        vitdeploy.verify(write_bundle(tmp_path / "b"), backends=["onnxrutnime"])


def test_a_backend_that_can_run_nothing_is_an_error(tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "b", precisions=("bf16",))
    with pytest.raises(UsageError, match="onnx-bf16"):
        vitdeploy.verify(made, backends=ORT)


def test_the_exports_absolute_tolerance_is_kept(tmp_path: Path) -> None:
    tolerance = TOLERANCES["fp32"].model_copy(update={"max_abs": 1e-12})
    record = ParityRecord(
        artifact="onnx-fp32",
        backend="onnxruntime",
        batch=1,
        provider="cpu",
        metrics=ParityMetrics(rows=1, elements=5),
        tolerance=tolerance,
        passed=True,
    )
    report = vitdeploy.verify(write_bundle(tmp_path / "b", parity=(record,)), backends=ORT)
    assert not report.passed
    assert all("max abs" in failure for failure in report.failures)


def test_stages_are_told(tmp_path: Path) -> None:
    class Listener(Progress):
        def __init__(self) -> None:
            self.names: list[str] = []

        def finished(self, stage: Stage) -> None:
            self.names.append(stage.name)

    listener = Listener()
    vitdeploy.verify(write_bundle(tmp_path / "b"), backends=ORT, progress=listener)
    assert listener.names == ["hashes", "preprocess", "onnx-fp32"]


# --- accuracy -------------------------------------------------------------------------------------------


def labelled(folder: Path, count: int = 20, *, flat: bool = False, names: tuple[str, ...] = LABELS) -> int:
    """Write random images under labels in turn; return how many the classifier gets right."""
    images = [random_image(seed) for seed in range(count)]
    best = answer_images(images).argmax(axis=1)
    for index, image in enumerate(images):
        label = names[index % len(LABELS)]
        path = folder / (f"{label}_{index}.png" if flat else f"{label}/{index}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return int((best == np.arange(count) % len(LABELS)).sum())


@pytest.mark.parametrize("flat", [False, True], ids=["folders", "prefixes"])
@pytest.mark.parametrize("names", [LABELS, ("0", "1", "2", "3", "4")], ids=["labels", "indices"])
def test_accuracy_is_counted(tmp_path: Path, flat: bool, names: tuple[str, ...]) -> None:
    right = labelled(tmp_path / "data", flat=flat, names=names)
    made = write_bundle(tmp_path / "b", precisions=("fp32", "fp16"))
    report = vitdeploy.verify(made, backends=ORT, data=tmp_path / "data")
    assert 0 < right < 20
    assert [(a.model, a.images, a.correct) for a in report.accuracy] == [
        ("onnx-fp32", 20, right),
        ("onnx-fp16", 20, right),
    ]
    assert report.accuracy[0].agree == 20
    assert report.notes == ("agreement is with onnx-fp32: the reference model itself does not run here",)


def test_disagreement_with_the_reference_is_counted(tmp_path: Path) -> None:
    # The second artifact is wrong: it takes one class for another, and that shows in both columns.
    labelled(tmp_path / "data")
    made = write_bundle(tmp_path / "b", precisions=("fp32", "fp16"))
    other = write_bundle(tmp_path / "o", precisions=("fp16",), weight=wrong("swapped columns"))
    with made.edit() as writer:
        writer.file("model.fp16.onnx").write_bytes(other.path("model.fp16.onnx").read_bytes())
        writer.seal(made.manifest)
        mixed = writer.commit()
    exact, swapped = vitdeploy.verify(mixed, backends=ORT, data=tmp_path / "data").accuracy
    best = answer_images([random_image(seed) for seed in range(20)]).argmax(axis=1)
    assert swapped.agree == int((best > 1).sum()) < exact.agree == 20


def test_labels_without_names(tmp_path: Path) -> None:
    right = labelled(tmp_path / "data", names=("0", "1", "2", "3", "4"))
    made = write_bundle(tmp_path / "b", labels=None)
    assert vitdeploy.verify(made, backends=ORT, data=tmp_path / "data").accuracy[0].correct == right


@pytest.mark.parametrize("place", ["dogg/1.png", "dogg_1.png"])
def test_an_unknown_label_is_named(tmp_path: Path, place: str) -> None:
    path = tmp_path / "data" / place
    path.parent.mkdir(parents=True)
    random_image(0).save(path)
    with pytest.raises(UsageError, match="'dogg' is no class of this bundle; did you mean 'dog'"):
        vitdeploy.verify(write_bundle(tmp_path / "b"), data=tmp_path / "data")


def test_bad_data_folders(tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "b")
    with pytest.raises(ImageError, match="not a folder"):
        vitdeploy.verify(made, data=tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match="no image"):
        vitdeploy.verify(made, data=tmp_path / "empty")


def test_features_have_no_accuracy(tmp_path: Path) -> None:
    labelled(tmp_path / "data", 5)
    kwargs: dict[str, Any] = {"output": "features", "labels": None}
    with pytest.raises(UsageError, match="features"):
        vitdeploy.verify(write_bundle(tmp_path / "b", **kwargs), data=tmp_path / "data")


@pytest.mark.slow
def test_a_drop_in_accuracy_fails(tmp_path: Path) -> None:
    """The second artifact takes the first class for the second, and the other way round."""
    images = [random_image(seed) for seed in range(20)]
    best = answer_images(images).argmax(axis=1)
    (tmp_path / "data").mkdir()
    for seed, (image, index) in enumerate(zip(images, best, strict=True)):
        image.save(tmp_path / f"data/{LABELS[index]}_{seed}.png")
    made = write_bundle(tmp_path / "b", precisions=("fp32", "fp16"))
    held = vitdeploy.verify(made.root, backends=ORT, data=tmp_path / "data", max_drop=0)
    held.check()
    said = "onnx-fp16: top-1 100.00 %, 0.00 points below the reference (95 % interval -"
    assert [note for note in held.notes if note.startswith(said)]
    swapped = write_bundle(tmp_path / "o", precisions=("fp16",), weight=wrong("swapped columns"))
    with made.edit() as writer:
        writer.file("model.fp16.onnx").write_bytes(swapped.path("model.fp16.onnx").read_bytes())
        writer.seal(made.manifest)
        mixed = writer.commit()
    lost = 100 * int((best < 2).sum()) / 20
    assert lost > 0

    def dropped(allowed: float) -> list[str]:
        report = vitdeploy.verify(mixed, backends=ORT, data=tmp_path / "data", max_drop=allowed)
        return [failure for failure in report.failures if "top-1" in failure]

    assert dropped(lost) == []
    (failure,) = dropped(lost - 1)
    assert failure.startswith(f"onnx-fp16: top-1 {100 - lost:.2f} %, {lost:.2f} points below the reference")
    assert failure.endswith(f"{lost - 1:g} allowed; 20 images cannot tell: the interval holds {lost - 1:g}")


def test_a_drop_is_measured_on_something(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there are none") as caught:
        vitdeploy.verify(tmp_path, max_drop=0.5)
    assert caught.value.hint == "--data DIR"


def test_quantised_artifacts_are_proven_on_held_out_images(tmp_path: Path) -> None:
    made = write_quantised(tmp_path / "b")
    report = vitdeploy.verify(made, backends=ORT, batches=[2])
    assert report.passed, report.failures
    rows = {record.artifact: record.metrics.rows for record in report.parity}
    assert rows == {"onnx-fp32": 8, "onnx-int8": 6, "onnx-fp8": 6}
    (note,) = report.notes
    assert note.startswith("onnx-fp8 on onnxruntime computes in fp32: fp8 is emulated there")


@pytest.mark.parametrize("flags, noted", [(("avx2",), True), (("avx2", "avx512_vnni"), False)])
def test_a_processor_without_vnni_is_noted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], noted: bool
) -> None:
    monkeypatch.setattr("vitdeploy.verification.local.find_cpu", lambda: Cpu("old", flags, 2, None))
    report = vitdeploy.verify(write_quantised(tmp_path / "b", kinds=("int8",)), batches=[2])
    assert report.passed, report.failures
    said = [note for note in report.notes if "VNNI" in note]
    assert said == (["onnx-int8: old has no VNNI: int8 gains little on it"] if noted else [])


def test_a_quantised_artifact_that_loses_too_much(tmp_path: Path) -> None:
    made = write_quantised(tmp_path / "b", kinds=("int8",), steps=2)
    report = vitdeploy.verify(made, backends=ORT, batches=[2])
    assert not report.passed
    assert all(failure.startswith("onnx-int8 on onnxruntime, batch 2: ") for failure in report.failures)
    assert any("mean relative error" in failure for failure in report.failures)
    assert not any("golden" in failure for failure in report.failures)
