"""Bundles: written whole or not at all, and no changed byte goes unnoticed."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from vitdeploy import atomic
from vitdeploy import bundle as module
from vitdeploy.bundle import GOLDEN, WEIGHTS, Bundle, BundleWriter
from vitdeploy.config import BatchRange
from vitdeploy.errors import BundleError, UsageError
from vitdeploy.manifest import (
    MANIFEST,
    Artifact,
    FileRecord,
    Manifest,
    ParityRecord,
    Provenance,
    TensorSpec,
)

ARRAYS = {"pixel_values": np.arange(12, dtype=np.float32).reshape(2, 6), "reference": np.eye(2)}


def draft(name: str = "tiny", **fields: Any) -> Manifest:
    provenance = Provenance(source="tiny", family="vit")
    return Manifest(
        name=name,
        created="2026-11-21T03:00:00Z",
        generator="vitdeploy 0.1.0",
        provenance=provenance,
        **fields,
    )


def artifact(name: str, path: str, precision: str = "fp32", requested: str = "fp32") -> Artifact:
    return Artifact(
        name=name,
        format="onnx",
        precision=precision,
        requested=requested,
        path=path,
        files=(path,),
        batch=BatchRange(),
        inputs=(TensorSpec(name="pixel_values", dtype="float32", shape=("N", 6)),),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=("N", 2)),),
    )


def write(target: Path, name: str = "tiny", *, force: bool = False) -> Bundle:
    """A small bundle whose files all carry its name."""
    with BundleWriter(target, force=force) as writer:
        writer.file("model.onnx").write_bytes(name.encode() * 100)
        writer.file("engines/sm_90/model.plan").write_bytes(name.encode() * 50)
        save_file(ARRAYS, writer.file(GOLDEN))
        writer.seal(draft(name, artifacts=(artifact("onnx-fp32", "model.onnx"),)))
        return writer.commit()


def siblings(target: Path) -> list[str]:
    return sorted(entry.name for entry in target.parent.iterdir())


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "parent" / "bundle"


class TestWriting:
    def test_a_written_bundle_opens_and_is_intact(self, target: Path) -> None:
        written = write(target)
        opened = Bundle.open(target)
        opened.verify()
        assert opened.manifest == written.manifest
        assert siblings(target) == ["bundle"]
        assert set(opened.manifest.files) == {"model.onnx", "engines/sm_90/model.plan", GOLDEN}
        assert opened.path("model.onnx").read_bytes() == b"tiny" * 100
        assert opened.manifest.artifacts[0].size == 400

    def test_a_bundle_can_be_moved(self, target: Path, tmp_path: Path) -> None:
        write(target)
        target.rename(tmp_path / "elsewhere")
        Bundle.open(tmp_path / "elsewhere").verify()

    def test_permissions_follow_the_umask(self, target: Path) -> None:
        old = os.umask(0o027)
        try:
            write(target)
        finally:
            os.umask(old)
        assert target.stat().st_mode & 0o777 == 0o750

    def test_an_unfinished_bundle_can_run_and_is_hashed_once(
        self, target: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hashed: list[str] = []
        real = module.sha256
        monkeypatch.setattr(module, "sha256", lambda path: hashed.append(path.name) or real(path))
        with BundleWriter(target) as writer:
            writer.file("model.onnx").write_bytes(b"one")
            unfinished = writer.seal(draft())
            unfinished.verify_hashes(["model.onnx"])
            assert unfinished.path("model.onnx").read_bytes() == b"one"
            writer.file("other").write_bytes(b"two")
            writer.seal(draft())
            finished = writer.commit()
        finished.verify_hashes(["model.onnx", "other"])
        assert hashed == ["model.onnx", "other"]

    @pytest.mark.parametrize("force", [False, True])
    def test_an_existing_bundle_gives_way_only_to_force(self, target: Path, force: bool) -> None:
        write(target, "old")
        if force:
            write(target, "new", force=True)
        else:
            with pytest.raises(BundleError, match="already exists") as caught:
                write(target, "new")
            assert caught.value.hint == "--force replaces it"
        assert Bundle.open(target).manifest.name == ("new" if force else "old")
        Bundle.open(target).verify()
        assert siblings(target) == ["bundle"]

    def test_force_replaces_a_damaged_bundle(self, target: Path) -> None:
        write(target, "old")
        (target / MANIFEST).write_bytes((target / MANIFEST).read_bytes()[:-3])
        write(target, "new", force=True)
        Bundle.open(target).verify()

    def test_force_replaces_an_empty_folder_but_never_a_strangers(self, target: Path) -> None:
        target.mkdir(parents=True)
        write(target, force=True)
        shutil.rmtree(target)
        target.mkdir()
        (target / "thesis.tex").write_text("years of work")
        (target / MANIFEST).write_text('{"name": "a web application"}')
        with pytest.raises(BundleError, match="is not a bundle, so --force does not replace it"):
            write(target, force=True)
        assert (target / "thesis.tex").read_text() == "years of work"

    def test_a_file_in_the_way_is_kept(self, target: Path) -> None:
        target.parent.mkdir()
        target.write_text("mine")
        with pytest.raises(BundleError, match="is a file"):
            write(target, force=True)
        assert target.read_text() == "mine"

    def test_replacing_without_a_swap_works_too(self, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
        write(target, "old")
        write(target, "new", force=True)
        assert Bundle.open(target).manifest.name == "new"
        assert siblings(target) == ["bundle"]

    def test_a_link_to_a_bundle_stays_a_link(self, target: Path) -> None:
        write(target, "old")
        link = target.parent / "link"
        link.symlink_to("bundle")
        write(link, "new", force=True)
        assert link.is_symlink()
        assert Bundle.open(link).manifest.name == "new"

    @pytest.mark.parametrize("name", ["../outside", "/outside", "a/../../outside", "a\\b"])
    def test_a_writer_stays_inside(self, target: Path, name: str) -> None:
        with BundleWriter(target) as writer, pytest.raises(BundleError, match="inside the bundle"):
            writer.file(name)

    def test_links_are_not_sealed(self, target: Path) -> None:
        with BundleWriter(target) as writer:
            writer.file("model.onnx").symlink_to("/etc/hostname")
            with pytest.raises(BundleError, match="symbolic link"):
                writer.seal(draft())

    @pytest.mark.parametrize("sealed", [False, True])
    def test_only_what_was_sealed_is_committed(self, target: Path, sealed: bool) -> None:
        with BundleWriter(target) as writer:
            if sealed:
                writer.seal(draft())
            writer.file("late").write_bytes(b"x")
            with pytest.raises(BundleError, match="changed after the manifest was sealed"):
                writer.commit()
        assert not target.exists()


class TestAdding:
    def test_added_files_and_artifacts(self, target: Path, tmp_path: Path) -> None:
        old = write(target)
        (tmp_path / "engine").write_bytes(b"engine")
        new = old.add(
            artifacts=[artifact("plan", "engines/sm_80/x.plan")],
            files={"engines/sm_80/x.plan": tmp_path / "engine"},
        )
        new.verify()
        Bundle.open(target).verify()
        assert [a.name for a in new.manifest.artifacts] == ["onnx-fp32", "plan"]
        assert new.path("engines/sm_80/x.plan").read_bytes() == b"engine"
        assert siblings(target) == ["bundle"]

    def test_rewriting_a_file_leaves_the_old_bundle_alone_until_the_commit(self, target: Path) -> None:
        old = write(target)
        with old.edit() as writer:
            writer.file("model.onnx").write_bytes(b"new")
            old.verify()
            writer.seal(old.manifest)
            writer.commit()
        assert Bundle.open(target).path("model.onnx").read_bytes() == b"new"

    def test_damage_is_not_blessed_by_adding(self, target: Path) -> None:
        old = write(target)
        _flip(target / "model.onnx", 5, 0)
        new = old.add()
        with pytest.raises(BundleError, match=r"model\.onnx changed"):
            new.verify_hashes(["model.onnx"])
        with pytest.raises(BundleError, match=r"model\.onnx changed"):
            Bundle.open(target).verify()

    def test_an_edit_does_not_undo_somebody_elses(self, target: Path, tmp_path: Path) -> None:
        mine = write(target)
        (tmp_path / "x").write_bytes(b"x")
        Bundle.open(target).add(files={"x": tmp_path / "x"})
        with pytest.raises(BundleError, match="somebody else changed it meanwhile"):
            mine.add()
        assert "x" in Bundle.open(target).manifest.files

    def test_unlisted_files_are_not_thrown_away(self, target: Path) -> None:
        bundle = write(target)
        (target / "notes.txt").write_text("mine")
        with pytest.raises(BundleError, match=r"does not list: notes\.txt"):
            bundle.add()
        assert (target / "notes.txt").exists()
        assert siblings(target) == ["bundle"]

    def test_without_hard_links_files_are_copied(self, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        bundle = write(target)

        def refuse(*args: object, **kwargs: object) -> None:
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr(os, "link", refuse)
        bundle.add().verify()


class TestReading:
    def test_golden_arrays(self, target: Path) -> None:
        golden = write(target).golden()
        assert set(golden) == set(ARRAYS)
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(golden[name], array)

    def test_no_golden_data_is_empty(self, target: Path) -> None:
        with BundleWriter(target) as writer:
            writer.seal(draft())
            assert writer.commit().golden() == {}

    def test_golden_data_is_hashed_before_it_is_read(self, target: Path) -> None:
        write(target)
        _flip(target / GOLDEN, -1, 3)
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
        bundle = write(target)
        with pytest.raises(BundleError, match=r"did you mean 'model\.onnx'"):
            bundle.path("model.onx")
        with pytest.raises(BundleError, match="has no file"):
            bundle.verify_hashes([WEIGHTS])

    @pytest.mark.parametrize("kind", ["absent", "file", "empty"])
    def test_what_is_no_bundle(self, tmp_path: Path, kind: str) -> None:
        path = tmp_path / "bundle"
        if kind == "file":
            path.write_text("x")
        elif kind == "empty":
            path.mkdir()
        with pytest.raises(BundleError, match=r"bundle: is not a bundle \(it has no manifest\.json\)"):
            Bundle.open(path)

    def test_a_huge_manifest_is_not_read(self, target: Path) -> None:
        write(target)
        with (target / MANIFEST).open("r+b") as file:
            file.truncate(2**40)  # sparse: reading it would exhaust memory
        with pytest.raises(BundleError, match="a manifest has at most"):
            Bundle.open(target)


class TestDamage:
    def test_missing_short_and_long_files_are_all_named_on_opening(self, target: Path) -> None:
        write(target)
        (target / "model.onnx").unlink()
        (target / GOLDEN).write_bytes(b"")
        with pytest.raises(
            BundleError, match=r"golden\.safetensors has 0 bytes instead of .*; model\.onnx is missing"
        ):
            Bundle.open(target)

    @pytest.mark.parametrize("linked", ["model.onnx", "engines", "engines/sm_90/model.plan", MANIFEST])
    def test_links_are_refused(self, target: Path, tmp_path: Path, linked: str) -> None:
        write(target)
        shutil.move(target / linked, tmp_path / "outside")
        (target / linked).symlink_to(tmp_path / "outside")
        with pytest.raises(BundleError, match="symbolic link"):
            Bundle.open(target)

    @pytest.mark.parametrize("kind", ["folder", "pipe"])
    def test_what_is_no_regular_file_is_refused(self, target: Path, kind: str) -> None:
        write(target)
        (target / "model.onnx").unlink()
        os.mkfifo(target / "model.onnx") if kind == "pipe" else (target / "model.onnx").mkdir()
        with pytest.raises(BundleError, match=r"model\.onnx is not a regular file"):
            Bundle.open(target)

    @pytest.mark.parametrize("extra", ["notes.txt", "engines/evil.plan", "engines/link"])
    def test_extra_files_are_found_by_verification(self, target: Path, extra: str) -> None:
        write(target)
        if extra.endswith("link"):
            (target / extra).symlink_to("/")
        else:
            (target / extra).write_text("x")
        bundle = Bundle.open(target)
        assert bundle.unlisted() == (extra,)
        with pytest.raises(BundleError, match=f"'{extra}' is not listed"):
            bundle.verify()

    def test_a_manifest_swapped_after_opening_is_found(self, target: Path, tmp_path: Path) -> None:
        bundle = write(target)
        other = write(tmp_path / "other", "other")
        shutil.copy(other.root / MANIFEST, target / MANIFEST)
        with pytest.raises(BundleError, match="changed since it was opened"):
            bundle.verify()

    def test_a_file_changed_between_two_uses_is_found(self, target: Path) -> None:
        bundle = write(target)
        bundle.verify_hashes(["model.onnx"])
        _flip(target / "model.onnx", 0, 0)
        with pytest.raises(BundleError, match=r"model\.onnx changed"):
            bundle.verify_hashes(["model.onnx"])


def _flip(path: Path, position: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("pristine") / "bundle").root


@given(st.data())
@settings(max_examples=150)
def test_any_flipped_bit_in_any_file_is_found(pristine: Path, data: st.DataObject) -> None:
    files = [entry for entry in sorted(pristine.rglob("*")) if entry.is_file()]
    path = data.draw(st.sampled_from(files))
    content = path.read_bytes()
    position = data.draw(st.integers(0, len(content) - 1))
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    try:
        _flip(path, position, data.draw(st.integers(0, 7)))
        os.utime(path, ns=times)  # as a failing disk would: no time stamp tells
        with pytest.raises(BundleError, match=path.name):
            Bundle.open(pristine).verify()
    finally:
        path.write_bytes(content)
    Bundle.open(pristine).verify()


DOCUMENTATION = Path(__file__).parent.parent / "docs" / "bundle.md"


class TestDocumentation:
    def check(self, bundle: Path) -> subprocess.CompletedProcess[str]:
        code = re.search(r"```python\n(.*?)```", DOCUMENTATION.read_text(), re.DOTALL)
        assert code is not None
        return subprocess.run([sys.executable, "-c", code[1], str(bundle)], capture_output=True, text=True)

    def test_the_independent_check_agrees(self, target: Path) -> None:
        write(target)
        assert self.check(target).stdout == "intact: tiny\n"
        _flip(target / "model.onnx", 7, 1)
        assert "AssertionError: model.onnx" in self.check(target).stderr

    def test_every_key_of_the_manifest_is_described(self) -> None:
        text = DOCUMENTATION.read_text()
        for model in (Manifest, Artifact, ParityRecord, Provenance, FileRecord, TensorSpec):
            for name in model.model_fields:
                assert f"`{name}`" in text, f"{model.__name__}.{name}"


class TestRefusals:
    """A disk that refuses is one clear line, and leaves nothing."""

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO, errno.EDQUOT])
    @pytest.mark.parametrize("call", ["fsync", "mkdir", "rename"])
    def test_system_calls_that_fail(
        self, target: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
    ) -> None:
        def refuse(*args: object, **kwargs: object) -> None:
            raise OSError(code, os.strerror(code))

        target.parent.mkdir()
        monkeypatch.setattr(os, call, refuse)
        with pytest.raises(BundleError) as caught:
            write(target)
        assert caught.value.message == f"{target}: cannot be written: {os.strerror(code)}"
        assert caught.value.exit_code == 2
        monkeypatch.undo()
        assert siblings(target) == []

    def test_a_native_library_that_ran_out_of_space(self, target: Path) -> None:
        with pytest.raises(BundleError, match="No space left on device"), BundleWriter(target):
            raise RuntimeError("I/O error: No space left on device (os error 28)")
        assert not target.parent.exists()

    def test_other_errors_pass_unchanged(self, target: Path) -> None:
        with pytest.raises(FileNotFoundError), BundleWriter(target):
            Path("/nonexistent/checkpoint").read_bytes()
        with pytest.raises(ValueError, match="mine"), BundleWriter(target):
            raise ValueError("mine")
        assert not target.parent.exists()

    def test_a_real_limit_on_file_size(self, target: Path) -> None:
        script = f"""
            import resource
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
            from vitdeploy.bundle import BundleWriter
            from vitdeploy.errors import BundleError
            try:
                with BundleWriter({str(target)!r}) as writer:
                    writer.file("model.onnx").write_bytes(bytes(60_000))
            except BundleError as error:
                print(error.message)
        """
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
        assert done.stdout == f"{target}: cannot be written: File too large\n", done.stderr
        assert not target.parent.exists()

    def test_a_folder_without_permission(self, target: Path) -> None:
        target.parent.mkdir(mode=0o755)
        target.parent.chmod(0o555)
        root = os.geteuid() == 0
        if root:  # root may write anywhere: be nobody for a moment
            os.seteuid(65534)
        try:
            with pytest.raises(BundleError, match="cannot be written: Permission denied"):
                write(target)
            with pytest.raises(BundleError):
                Bundle.open(target)
        finally:
            if root:
                os.seteuid(0)
            target.parent.chmod(0o755)

    def test_a_parent_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        with pytest.raises(BundleError, match=r"cannot be written: (Not a directory|File exists)"):
            write(tmp_path / "file" / "bundle")
