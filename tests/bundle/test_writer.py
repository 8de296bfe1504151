"""Writing bundles: whole or not at all, and whatever a disk refuses."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.helpers.small_bundles import artifact, draft, flip, siblings, write_small
from vitdeploy.bundle import folder as module
from vitdeploy.bundle import staging
from vitdeploy.bundle.folder import GOLDEN, Bundle, BundleWriter
from vitdeploy.bundle.manifest import MANIFEST
from vitdeploy.errors import BundleError


class TestWriting:
    def test_a_written_bundle_opens_and_is_intact(self, target: Path) -> None:
        written = write_small(target)
        opened = Bundle.open(target)
        opened.verify()
        assert opened.manifest == written.manifest
        assert siblings(target) == ["bundle"]
        assert set(opened.manifest.files) == {"model.onnx", "engines/sm_90/model.plan", GOLDEN}
        assert opened.path("model.onnx").read_bytes() == b"tiny" * 100
        assert opened.manifest.artifacts[0].size == 400

    def test_a_bundle_can_be_moved(self, target: Path, tmp_path: Path) -> None:
        write_small(target)
        target.rename(tmp_path / "elsewhere")
        Bundle.open(tmp_path / "elsewhere").verify()

    def test_permissions_follow_the_umask(self, target: Path) -> None:
        old = os.umask(0o027)
        try:
            write_small(target)
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
        write_small(target, "old")
        if force:
            write_small(target, "new", force=True)
        else:
            with pytest.raises(BundleError, match="already exists") as caught:
                write_small(target, "new")
            assert caught.value.hint == "--force replaces it"
        assert Bundle.open(target).manifest.name == ("new" if force else "old")
        Bundle.open(target).verify()
        assert siblings(target) == ["bundle"]

    def test_force_replaces_a_damaged_bundle(self, target: Path) -> None:
        write_small(target, "old")
        (target / MANIFEST).write_bytes((target / MANIFEST).read_bytes()[:-3])
        write_small(target, "new", force=True)
        Bundle.open(target).verify()

    def test_force_replaces_an_empty_folder_but_never_a_strangers(self, target: Path) -> None:
        target.mkdir(parents=True)
        write_small(target, force=True)
        shutil.rmtree(target)
        target.mkdir()
        (target / "thesis.tex").write_text("years of work")
        (target / MANIFEST).write_text('{"name": "a web application"}')
        with pytest.raises(BundleError, match="is not a bundle, so --force does not replace it"):
            write_small(target, force=True)
        assert (target / "thesis.tex").read_text() == "years of work"

    def test_a_file_in_the_way_is_kept(self, target: Path) -> None:
        target.parent.mkdir()
        target.write_text("mine")
        with pytest.raises(BundleError, match="is a file"):
            write_small(target, force=True)
        assert target.read_text() == "mine"

    def test_replacing_without_a_swap_works_too(self, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(staging, "_exchange", lambda one, other: False)
        write_small(target, "old")
        write_small(target, "new", force=True)
        assert Bundle.open(target).manifest.name == "new"
        assert siblings(target) == ["bundle"]

    def test_a_link_to_a_bundle_stays_a_link(self, target: Path) -> None:
        write_small(target, "old")
        link = target.parent / "link"
        link.symlink_to("bundle")
        write_small(link, "new", force=True)
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
        old = write_small(target)
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
        old = write_small(target)
        with old.edit() as writer:
            writer.file("model.onnx").write_bytes(b"new")
            old.verify()
            writer.seal(old.manifest)
            writer.commit()
        assert Bundle.open(target).path("model.onnx").read_bytes() == b"new"

    def test_damage_is_not_blessed_by_adding(self, target: Path) -> None:
        old = write_small(target)
        flip(target / "model.onnx", 5, 0)
        new = old.add()
        with pytest.raises(BundleError, match=r"model\.onnx changed"):
            new.verify_hashes(["model.onnx"])
        with pytest.raises(BundleError, match=r"model\.onnx changed"):
            Bundle.open(target).verify()

    def test_an_edit_does_not_undo_somebody_elses(self, target: Path, tmp_path: Path) -> None:
        mine = write_small(target)
        (tmp_path / "x").write_bytes(b"x")
        Bundle.open(target).add(files={"x": tmp_path / "x"})
        with pytest.raises(BundleError, match="somebody else changed it meanwhile"):
            mine.add()
        assert "x" in Bundle.open(target).manifest.files

    def test_unlisted_files_are_not_thrown_away(self, target: Path) -> None:
        bundle = write_small(target)
        (target / "notes.txt").write_text("mine")
        with pytest.raises(BundleError, match=r"does not list: notes\.txt"):
            bundle.add()
        assert (target / "notes.txt").exists()
        assert siblings(target) == ["bundle"]

    def test_without_hard_links_files_are_copied(self, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        bundle = write_small(target)

        def refuse(*args: object, **kwargs: object) -> None:
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr(os, "link", refuse)
        bundle.add().verify()


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
            write_small(target)
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

    @pytest.mark.slow
    def test_a_real_limit_on_file_size(self, target: Path) -> None:
        script = f"""
            import resource
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
            from vitdeploy.bundle.folder import BundleWriter
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
                write_small(target)
            with pytest.raises(BundleError):
                Bundle.open(target)
        finally:
            if root:
                os.seteuid(0)
            target.parent.chmod(0o755)

    def test_a_parent_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        with pytest.raises(BundleError, match=r"cannot be written: (Not a directory|File exists)"):
            write_small(tmp_path / "file" / "bundle")
