"""Several image sizes in one bundle, and the view of one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.helpers import several_sizes as linear
from tests.helpers import small_bundles
from tests.helpers.several_sizes import SIZES, several_sizes
from tests.helpers.small_bundles import flip
from vitdeploy.bundle.folder import WEIGHTS, Bundle, BundleWriter
from vitdeploy.bundle.manifest import Choice, Manifest, SizeRecord
from vitdeploy.bundle.proofs import ParityMetrics, ParityRecord, Tolerance
from vitdeploy.bundle.sizes import size_of_shape, sized
from vitdeploy.config import Preprocess, Size, ViTConfig
from vitdeploy.errors import BundleError, UsageError, VitdeployError

WIDE = SIZES[2]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of three sizes in two precisions; not to be changed."""
    folder = tmp_path_factory.mktemp("sizes") / "linear.bundle"
    several_sizes(folder, precisions=("fp32", "fp16"))
    return folder


def record(artifact: str) -> ParityRecord:
    tolerance = Tolerance(relative=1.0, kl=1.0, batch_invariance=1.0)
    metrics = ParityMetrics(rows=1, elements=1)
    return ParityRecord(
        artifact=artifact,
        backend="onnxruntime",
        batch=1,
        provider="cpu",
        metrics=metrics,
        tolerance=tolerance,
        passed=True,
    )


@pytest.mark.parametrize(
    "name, file",
    [
        ("golden.safetensors", "golden.384x224.safetensors"),
        ("model.onnx", "model.384x224.onnx"),
        ("model.fp16.onnx", "model.384x224.fp16.onnx"),
        ("engines/sm_80+.old/model.engine", "engines/sm_80+.old/model.384x224.engine"),
        ("kernels", "kernels.384x224"),
    ],
)
def test_names_of_files(name: str, file: str) -> None:
    assert sized(name, (384, 224)) == file
    assert sized(name, None) == name


def test_a_view_is_a_bundle_of_one_size(written: Path) -> None:
    bundle = Bundle.open(written)
    assert bundle.sizes == SIZES
    for index, size in enumerate(SIZES):
        view = bundle.at_size(size)
        manifest = view.manifest
        assert view.sizes == (size,)
        assert manifest.sizes == ()
        assert manifest.preprocess == linear.preprocess(size)
        assert manifest.flops == size[0] * size[1]
        assert {artifact.inputs[0].shape for artifact in manifest.artifacts} == {("N", 3, *size)}
        suffix = f"-{size[0]}x{size[1]}" if index else ""
        assert [artifact.name for artifact in manifest.artifacts] == [
            f"onnx-fp32{suffix}",
            f"onnx-fp16{suffix}",
        ]
        golden = view.golden()
        np.testing.assert_array_equal(golden["reference"], linear.answer(golden["pixel_values"]))
        assert golden["pixel_values"].shape[2:] == size
        assert (manifest.files, manifest.digest) == (bundle.manifest.files, bundle.manifest.digest)
        view.verify()
        assert view.at_size(SIZES[1]).sizes == (SIZES[1],)


def test_a_bundle_of_one_size_is_its_own_view(tmp_path: Path) -> None:
    bundle = several_sizes(tmp_path / "one", [(8, 8)])
    assert b'"sizes"' not in (bundle.root / "manifest.json").read_bytes()
    assert b'"image_size"' not in (bundle.root / "manifest.json").read_bytes()
    assert bundle.sizes == ((8, 8),)
    assert bundle.at_size((8, 8)).manifest == bundle.manifest


def test_the_model_of_a_view_is_of_its_size() -> None:
    config = ViTConfig(image_size=(32, 32))
    manifest = small_bundles.draft(model=config, sizes=(SizeRecord(image_size=(48, 32)),))
    view = Bundle(Path("nowhere"), manifest, {}).at_size((48, 32))
    assert view.manifest.model == ViTConfig(image_size=(48, 32))


def test_an_unknown_size_names_the_known_ones(written: Path) -> None:
    with pytest.raises(UsageError, match="no image size 9x9") as caught:
        Bundle.open(written).at_size((9, 9))
    assert "8x8, 16x16, 8x16" in str(caught.value.hint)


def test_artifacts_are_found_at_every_size(written: Path) -> None:
    bundle = Bundle.open(written)
    assert bundle.artifact("fp16").name == "onnx-fp16"
    assert bundle.artifact("onnx-fp16-8x16").image_size == (8, 16)
    view = bundle.at_size((8, 16))
    for wanted in ("fp16", "onnx-fp16", "onnx-fp16-8x16"):
        assert view.artifact(wanted).name == "onnx-fp16-8x16"
    for wanted in ("onnx-fp16-16x16", "bf16", "onnx-bf16"):
        with pytest.raises(UsageError, match="has no artifact"):
            view.artifact(wanted)


def test_an_artifact_leads_to_the_view_of_its_size(written: Path) -> None:
    bundle = Bundle.open(written)
    for index, size in enumerate(SIZES):
        artifact = bundle.at_size(size).artifact("fp16")
        assert artifact.image_size == (size if index else None)
        for opened in (bundle, bundle.at_size(WIDE)):
            assert opened.of(artifact).sizes == (size,)
    assert bundle.of(None).sizes == SIZES[:1]
    assert bundle.at_size(WIDE).of(None).sizes == (WIDE,)


def test_a_tensor_is_of_the_size_that_has_its_shape(written: Path) -> None:
    manifest = Bundle.open(written).manifest
    assert [size_of_shape(manifest, (3, *size)) for size in SIZES] == list(SIZES)
    with pytest.raises(UsageError, match=r"no image size takes an input of the shape \(3, 9, 9\)") as caught:
        size_of_shape(manifest, (3, 9, 9))
    assert caught.value.hint == "the sizes are 8x8, 16x16, 8x16"
    config = ViTConfig(image_size=(32, 32))
    weights_alone = small_bundles.draft(model=config, sizes=(SizeRecord(image_size=(48, 32)),))
    assert size_of_shape(weights_alone, [3, 48, 32]) == (48, 32)


@pytest.mark.slow
def test_a_precision_is_the_first_sizes_where_another_fell_back(tmp_path: Path) -> None:
    bundle = several_sizes(tmp_path / "b", precisions=("fp32", "fp16"))
    fell = bundle.manifest.artifacts[1].model_copy(
        update={"name": "onnx-mixed", "precision": "mixed", "requested": "fp16"}
    )
    artifacts = (*bundle.manifest.artifacts[:1], fell, *bundle.manifest.artifacts[2:])
    with bundle.edit() as writer:
        writer.seal(bundle.manifest.model_copy(update={"artifacts": artifacts}))
        bundle = writer.commit()
    assert bundle.artifact("fp16").name == "onnx-mixed"
    assert bundle.at_size((16, 16)).artifact("onnx-mixed").name == "onnx-fp16-16x16"


@pytest.mark.slow
def test_parity_and_choices_are_of_the_size(tmp_path: Path) -> None:
    choice = Choice(
        machine=("m",),
        goal="latency",
        backend="onnxruntime",
        provider="cpu",
        artifact="onnx-fp16",
        batch=1,
        p50_ms=1.0,
        images_per_s=1.0,
        created="2026-11-21T03:00:00Z",
    )
    names = ("onnx-fp32", "onnx-fp32-16x16", "onnx-fp32-8x16")
    bundle = several_sizes(
        tmp_path / "b", precisions=("fp32", "fp16"), parity=tuple(map(record, names)), choices=(choice,)
    )
    views = [bundle.at_size(size).manifest for size in SIZES]
    assert [[parity.artifact for parity in view.parity] for view in views] == [[name] for name in names]
    picked = [view.choices[0].artifact for view in views]
    assert picked == ["onnx-fp16", "onnx-fp16-16x16", "onnx-fp16-8x16"]


def test_weights_of_a_size_lie_over_those_of_the_first(tmp_path: Path) -> None:
    manifest = small_bundles.draft(
        preprocess=Preprocess(size=(8, 8)),
        sizes=tuple(
            SizeRecord(image_size=size, preprocess=Preprocess(size=size)) for size in [(4, 4), (6, 6)]
        ),
    )
    with BundleWriter(tmp_path / "b") as writer:
        for name in (WEIGHTS, sized(WEIGHTS, (4, 4))):
            save_file({"x": np.zeros(1)}, writer.file(name))
        writer.seal(manifest)
        bundle = writer.commit()
    assert bundle.weights == bundle.at_size((8, 8)).weights == bundle.at_size((6, 6)).weights == (WEIGHTS,)
    assert bundle.at_size((4, 4)).weights == (WEIGHTS, "weights.4x4.safetensors")


def test_what_is_added_through_a_view_is_added_to_the_whole(written: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(written, tmp_path / "b")
    view = Bundle.open(folder).at_size((16, 16))
    more = view.manifest.artifacts[0].model_copy(update={"name": "again-16x16"})
    whole = view.add(artifacts=[more], parity=[record("again-16x16")])
    assert whole.sizes == SIZES
    assert len(whole.manifest.artifacts) == 7
    whole.verify()
    assert [r.artifact for r in whole.at_size((16, 16)).manifest.parity] == ["again-16x16"]
    with pytest.raises(BundleError, match="somebody else"):
        view.add(parity=[record("again-16x16")])


def test_a_view_cannot_take_the_place_of_the_whole(written: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(written, tmp_path / "b")
    bundle = Bundle.open(folder)
    view = bundle.at_size((16, 16))
    assert view.whole.manifest == bundle.manifest
    assert bundle.whole is bundle
    with view.edit() as writer, pytest.raises(ValueError, match=r"Bundle\.whole"):
        writer.seal(view.manifest)
    with view.edit() as writer:
        writer.seal(view.whole.manifest.model_copy(update={"name": "renamed"}))
        assert writer.commit().sizes == SIZES


@pytest.mark.slow
def test_every_changed_byte_is_found_from_every_view(written: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(written, tmp_path / "moved" / "elsewhere")
    bundle = Bundle.open(folder)
    bundle.verify()
    for name in bundle.manifest.files:
        flip(folder / name, -1, 3)
        for size in SIZES:
            with pytest.raises(BundleError, match=name.replace(".", r"\.")):
                bundle.at_size(size).verify()
        flip(folder / name, -1, 3)
    flip(folder / "golden.16x16.safetensors", -1, 0)
    bundle.at_size((8, 8)).golden()
    with pytest.raises(BundleError, match=r"golden\.16x16\.safetensors changed"):
        bundle.at_size((16, 16)).golden()


def test_a_missing_or_foreign_file_of_a_size_is_found(written: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(written, tmp_path / "b")
    shutil.copyfile(folder / "golden.16x16.safetensors", folder / "golden.9x9.safetensors")
    with pytest.raises(BundleError, match=r"golden\.9x9\.safetensors' is not listed"):
        Bundle.open(folder).at_size((16, 16)).verify()
    (folder / "model.8x16.onnx").unlink()
    with pytest.raises(BundleError, match=r"model\.8x16\.onnx is missing"):
        Bundle.open(folder)


def test_force_replaces_all_sizes(written: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(written, tmp_path / "b")
    bundle = several_sizes(folder, [(8, 8), (4, 4)])
    assert sorted(bundle.manifest.files) == sorted(
        ["golden.safetensors", "golden.4x4.safetensors", "model.onnx", "model.4x4.onnx", "model.onnx.data"]
    )
    bundle.verify()


@pytest.mark.parametrize(
    "edit, complaint",
    [
        ({"sizes": [(8, 8)]}, "differ from the first"),
        ({"sizes": [(4, 4), (4, 4)]}, "differ from the first"),
        ({"sizes": [(4, 4)], "preprocess": None}, "differ from the first"),
        ({"sizes": [(4, 4)], "model": ViTConfig(image_size=(8, 8), patch_size=8)}, "not divisible"),
        ({"of": (4, 4)}, "sizes does not list"),
        ({"of": (8, 8), "sizes": [(4, 4)]}, "sizes does not list"),
    ],
)
def test_sizes_that_contradict_each_other(edit: dict[str, Any], complaint: str) -> None:
    sizes: list[Size] = edit.pop("sizes", [])
    of = edit.pop("of", None)
    artifact = small_bundles.artifact("a", "a.onnx").model_copy(update={"image_size": of})
    fields = {"preprocess": Preprocess(size=(8, 8)), "artifacts": (artifact,)} | edit
    records = tuple(SizeRecord(image_size=size, preprocess=Preprocess(size=size)) for size in sizes)
    with pytest.raises((ValueError, VitdeployError), match=complaint):
        small_bundles.draft(sizes=records, **fields)


def test_a_record_of_another_preprocessing() -> None:
    for other in (None, Preprocess(size=(4, 4), mean=(0.1, 0.2, 0.3))):
        with pytest.raises(ValueError, match="preprocess"):
            small_bundles.draft(
                preprocess=Preprocess(size=(8, 8)), sizes=(SizeRecord(image_size=(4, 4), preprocess=other),)
            )


def test_a_swapped_size_changes_the_digest(written: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(written, tmp_path / "b")
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    document["sizes"].reverse()
    text = json.dumps(document, sort_keys=True, indent=2, ensure_ascii=False)
    path.write_text(f"{text}\n")
    with pytest.raises(BundleError, match="digest"):
        Bundle.open(folder)


def test_the_manifest_is_written_and_read_again(written: Path) -> None:
    manifest = Bundle.open(written).manifest
    assert Manifest.model_validate(manifest.model_dump(mode="json")) == manifest
