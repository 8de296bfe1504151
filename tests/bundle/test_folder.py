"""Reading bundles: no changed byte goes unnoticed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.paths import ROOT
from tests.helpers.small_bundles import ARRAYS, artifact, draft, flip, write_small
from vitdeploy.bundle.folder import GOLDEN, WEIGHTS, Bundle, BundleWriter
from vitdeploy.bundle.manifest import (
    MANIFEST,
    Artifact,
    FileRecord,
    Manifest,
    Provenance,
    TensorSpec,
)
from vitdeploy.bundle.proofs import ParityRecord
from vitdeploy.errors import BundleError, UsageError


class TestReading:
    def test_golden_arrays(self, target: Path) -> None:
        golden = write_small(target).golden()
        assert set(golden) == set(ARRAYS)
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(golden[name], array)

    def test_no_golden_data_is_empty(self, target: Path) -> None:
        with BundleWriter(target) as writer:
            writer.seal(draft())
            assert writer.commit().golden() == {}

    def test_golden_data_is_hashed_before_it_is_read(self, target: Path) -> None:
        write_small(target)
        flip(target / GOLDEN, -1, 3)
        with pytest.raises(BundleError, match=r"golden\.safetensors changed"):
            Bundle.open(target).golden()

    def test_golden_data_that_was_never_valid(self, target: Path) -> None:
        with BundleWriter(target) as writer:
            writer.file(GOLDEN).write_bytes(b"\xff" * 40)
            writer.seal(draft())
            with pytest.raises(BundleError, match=r"golden\.safetensors: cannot be read"):
                writer.commit().golden()

    def test_artifacts_by_name_precision_and_request(self, target: Path) -> None:
        with BundleWriter(target) as writer:
            writer.file("a").write_bytes(b"a")
            artifacts = artifact("onnx-fp32", "a"), artifact("onnx-mixed", "a", "mixed", "fp16")
            writer.seal(draft(artifacts=artifacts))
            bundle = writer.commit()
        assert bundle.artifact("onnx-mixed").name == "onnx-mixed"
        assert bundle.artifact("fp32").name == "onnx-fp32"
        assert bundle.artifact("mixed").name == "onnx-mixed"
        assert bundle.artifact("fp16").name == "onnx-mixed"
        with pytest.raises(UsageError, match="no artifact 'onnx-fp23'; did you mean 'onnx-fp32'") as caught:
            bundle.artifact("onnx-fp23")
        assert caught.value.hint == "it has onnx-fp32, onnx-mixed"

    def test_unknown_files(self, target: Path) -> None:
        bundle = write_small(target)
        with pytest.raises(BundleError, match=r"did you mean 'model\.onnx'"):
            bundle.path("model.onx")
        with pytest.raises(BundleError, match="has no file"):
            bundle.verify_hashes([WEIGHTS])

    @pytest.mark.parametrize(
        "kind, why",
        [("absent", "it does not exist"), ("file", "it is a file"), ("empty", r"it has no manifest\.json")],
    )
    def test_what_is_no_bundle(self, tmp_path: Path, kind: str, why: str) -> None:
        path = tmp_path / "bundle"
        if kind == "file":
            path.write_text("x")
        elif kind == "empty":
            path.mkdir()
        with pytest.raises(BundleError, match=rf"bundle: is not a bundle \({why}\)$") as caught:
            Bundle.open(path)
        free = path if kind == "absent" else path.with_name("bundle.bundle")
        assert caught.value.hint == f"`vitdeploy export -m MODEL -o {free}` makes one"

    def test_no_bundle_but_bundles_near_by(self, tmp_path: Path) -> None:
        cats, dogs = write_small(tmp_path / "cats.bundle"), write_small(tmp_path / "dogs.bundle")
        (tmp_path / ".hidden.bundle").symlink_to(cats.root)
        both = f"{cats.root}, {dogs.root}"
        for path, message, hint in (
            (
                tmp_path / "cat.bundle",
                "(it does not exist); did you mean 'cats.bundle'?",
                f"bundles there: {both}",
            ),
            (tmp_path / "quite else", "(it does not exist)", f"bundles there: {both}"),
            (tmp_path, "(it has no manifest.json)", f"bundles in it: {both}"),
            (cats.root / "model.onnx", "(it is in one)", f"name the bundle's folder: {cats.root}"),
            (cats.root / MANIFEST, "(it is in one)", f"name the bundle's folder: {cats.root}"),
            (cats.root / "engines", "(it is in one)", f"name the bundle's folder: {cats.root}"),
            (cats.root / "engines" / "x" / "y", "(it is in one)", f"name the bundle's folder: {cats.root}"),
        ):
            with pytest.raises(BundleError) as caught:
                Bundle.open(path)
            assert caught.value.message == f"{path}: is not a bundle {message}"
            assert caught.value.hint == hint
            Bundle.open(hint.rpartition(": ")[2].partition(", ")[0])  # following it works

    def test_many_bundles_near_by_are_counted(self, tmp_path: Path) -> None:
        write_small(tmp_path / "0.bundle")
        for number in range(1, 7):
            (tmp_path / f"{number}.bundle").symlink_to(tmp_path / "0.bundle")
        with pytest.raises(BundleError) as caught:
            Bundle.open(tmp_path / "nothing")
        assert str(caught.value.hint).endswith(f"{tmp_path / '3.bundle'} and 3 more")

    @pytest.mark.parametrize("name", ["config.json", "model-00001-of-00002.safetensors", "pytorch_model.bin"])
    def test_a_checkpoint_is_no_bundle(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).touch()
        with pytest.raises(BundleError, match=r"it has no manifest\.json") as caught:
            Bundle.open(tmp_path)
        assert caught.value.hint == f"`vitdeploy export -m {tmp_path}` makes a bundle of a checkpoint"

    def test_a_huge_manifest_is_not_read(self, target: Path) -> None:
        write_small(target)
        with (target / MANIFEST).open("r+b") as file:
            file.truncate(2**40)  # sparse: reading it would exhaust memory
        with pytest.raises(BundleError, match="a manifest has at most"):
            Bundle.open(target)


class TestDamage:
    def test_missing_short_and_long_files_are_all_named_on_opening(self, target: Path) -> None:
        write_small(target)
        (target / "model.onnx").unlink()
        (target / GOLDEN).write_bytes(b"")
        with pytest.raises(
            BundleError, match=r"golden\.safetensors has 0 bytes instead of .*; model\.onnx is missing"
        ):
            Bundle.open(target)

    @pytest.mark.parametrize("linked", ["model.onnx", "engines", "engines/sm_90/model.plan", MANIFEST])
    def test_links_are_refused(self, target: Path, tmp_path: Path, linked: str) -> None:
        write_small(target)
        shutil.move(target / linked, tmp_path / "outside")
        (target / linked).symlink_to(tmp_path / "outside")
        with pytest.raises(BundleError, match="symbolic link"):
            Bundle.open(target)

    @pytest.mark.parametrize("kind", ["folder", "pipe"])
    def test_what_is_no_regular_file_is_refused(self, target: Path, kind: str) -> None:
        write_small(target)
        (target / "model.onnx").unlink()
        os.mkfifo(target / "model.onnx") if kind == "pipe" else (target / "model.onnx").mkdir()
        with pytest.raises(BundleError, match=r"model\.onnx is not a regular file"):
            Bundle.open(target)

    @pytest.mark.parametrize("extra", ["notes.txt", "engines/evil.plan", "engines/link"])
    def test_extra_files_are_found_by_verification(self, target: Path, extra: str) -> None:
        write_small(target)
        if extra.endswith("link"):
            (target / extra).symlink_to("/")
        else:
            (target / extra).write_text("x")
        bundle = Bundle.open(target)
        assert bundle.unlisted() == (extra,)
        with pytest.raises(BundleError, match=f"'{extra}' is not listed"):
            bundle.verify()

    def test_a_manifest_swapped_after_opening_is_found(self, target: Path, tmp_path: Path) -> None:
        bundle = write_small(target)
        other = write_small(tmp_path / "other", "other")
        shutil.copy(other.root / MANIFEST, target / MANIFEST)
        with pytest.raises(BundleError, match="changed since it was opened"):
            bundle.verify()

    def test_a_file_changed_between_two_uses_is_found(self, target: Path) -> None:
        bundle = write_small(target)
        bundle.verify_hashes(["model.onnx"])
        flip(target / "model.onnx", 0, 0)
        with pytest.raises(BundleError, match=r"model\.onnx changed"):
            bundle.verify_hashes(["model.onnx"])


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("pristine") / "bundle").root


@pytest.mark.slow
@given(st.data())
@settings(max_examples=150)
def test_any_flipped_bit_in_any_file_is_found(pristine: Path, data: st.DataObject) -> None:
    files = [entry for entry in sorted(pristine.rglob("*")) if entry.is_file()]
    path = data.draw(st.sampled_from(files))
    content = path.read_bytes()
    position = data.draw(st.integers(0, len(content) - 1))
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    try:
        flip(path, position, data.draw(st.integers(0, 7)))
        os.utime(path, ns=times)  # as a failing disk would: no time stamp tells
        with pytest.raises(BundleError, match=path.name):
            Bundle.open(pristine).verify()
    finally:
        path.write_bytes(content)
    Bundle.open(pristine).verify()


DOCUMENTATION = ROOT / "docs" / "bundle.md"


class TestDocumentation:
    def check(self, bundle: Path) -> subprocess.CompletedProcess[str]:
        code = re.search(r"```python\n(.*?)```", DOCUMENTATION.read_text(), re.DOTALL)
        assert code is not None
        return subprocess.run([sys.executable, "-c", code[1], str(bundle)], capture_output=True, text=True)

    def test_the_independent_check_agrees(self, target: Path) -> None:
        write_small(target)
        assert self.check(target).stdout == "intact: tiny\n"
        flip(target / "model.onnx", 7, 1)
        assert "AssertionError: model.onnx" in self.check(target).stderr

    def test_every_key_of_the_manifest_is_described(self) -> None:
        text = DOCUMENTATION.read_text()
        for model in (Manifest, Artifact, ParityRecord, Provenance, FileRecord, TensorSpec):
            for name in model.model_fields:
                assert f"`{name}`" in text, f"{model.__name__}.{name}"
