"""The bundle: one folder with everything a deployed model needs. docs/bundle.md shows the format.

Nothing read here is trusted: sizes are checked when a bundle is opened, hashes before a file is used,
and no path or link leads out of the folder.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from vitdeploy.bundle.absent import looks_like_bundle, no_bundle
from vitdeploy.bundle.files import Signature, names_below, sha256, signature
from vitdeploy.bundle.manifest import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    Artifact,
    FileRecord,
    Manifest,
    canonical,
    parse,
    safe_path,
    seal,
)
from vitdeploy.bundle.proofs import ParityRecord
from vitdeploy.bundle.sizes import counterpart, further, of_size, sized, sizes_of
from vitdeploy.bundle.staging import StagedFolder
from vitdeploy.config import Size
from vitdeploy.errors import BundleError, UsageError, VitdeployError, did_you_mean

WEIGHTS = "weights.safetensors"
GOLDEN = "golden.safetensors"
HELD_OUT = "held_out.safetensors"
"""As golden tensors, of images of the user's own: what quantised artifacts are proven on."""
CALIBRATION = "calibration.safetensors"
"""The images that quantised artifacts were made with."""

_BESIDE = re.compile(r"README\.md|vitdeploy-package\.json|\.gitattributes|\.git/.*|\.cache/huggingface/.*")
"""What is of no bundle, and may lie in the folder of one on a model hub: a card, and what packaging, git and
the hub's own client note there."""


class Bundle:
    """An opened bundle. Get one from :meth:`open` or from a :class:`BundleWriter`.

    Files whose hash was checked once are not read again by the same object while they stay unchanged.

    Where it has several image sizes, ``manifest``, the weights and the golden tensors are those of the first,
    beside the artifacts of all; :meth:`at_size` looks at one size alone.
    """

    def __init__(self, root: Path, manifest: Manifest, checked: Mapping[str, Signature]) -> None:
        self.root = root
        self.manifest = manifest
        self._whole = manifest
        """The manifest on the disk."""
        self._size: Size | None = None
        """As artifacts name it: None is the first."""
        self._checked = dict(checked)

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Open a bundle: its manifest, that all its files are there, and their sizes.

        Raises:
            BundleError: there is none, it is damaged or unsafe, or its schema is newer.
        """
        root = Path(path)
        bundle = cls(root, parse(_read_manifest(root), str(root / MANIFEST)), {})
        problems = [problem for name in bundle.manifest.files if (problem := bundle._size_problem(name))]
        bundle._report(problems)
        return bundle

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The image sizes, the default first; none where the manifest does not tell the only one."""
        return sizes_of(self.manifest)

    def at_size(self, size: Size) -> Bundle:
        """This bundle as if it had one size only: that one's manifest, artifacts, weights, golden tensors.

        What is verified, edited or added through it is the whole bundle.

        Raises:
            UsageError: it has no such size; names those that it has.
        """
        view = Bundle(self.root, of_size(self._whole, size), {})
        view._whole, view._checked = self._whole, self._checked
        view._size = further(self._whole, size)
        return view

    @property
    def views(self) -> tuple[Bundle, ...]:
        """The view of each image size, the default first; this bundle where there are not several."""
        return tuple(map(self.at_size, self.sizes)) if len(self.sizes) > 1 else (self,)

    @property
    def whole(self) -> Bundle:
        """The bundle with all of its sizes."""
        if self.manifest is self._whole:
            return self
        bundle = Bundle(self.root, self._whole, {})
        bundle._checked = self._checked
        return bundle

    def of(self, artifact: Artifact | None) -> Bundle:
        """The view of an artifact's size; without an artifact, this bundle of the size that it speaks of."""
        size = artifact.image_size if artifact else self._size
        return self if not self._whole.sizes else self.at_size(size or sizes_of(self._whole)[0])

    @property
    def place(self) -> Size | None:
        """The size that this is a view of, as artifacts name it: None is the first."""
        return self._size

    @property
    def weights(self) -> tuple[str, ...]:
        """The files of the reference weights: a tensor of a later one takes the place of an earlier one's."""
        names = dict.fromkeys((WEIGHTS, sized(WEIGHTS, self._size)))
        return tuple(name for name in names if name in self.manifest.files)

    def path(self, name: str) -> Path:
        """Where the listed file ``name`` is.

        Raises:
            BundleError: the manifest does not list it.
        """
        if name not in self.manifest.files:
            raise BundleError(f"{self.root}: has no file {name!r}{did_you_mean(name, self.manifest.files)}")
        return self.root / name

    def artifact(self, wanted: str) -> Artifact:
        """The artifact of this name; else the first of this precision; else the first built for it.

        Of several sizes, a precision is the first one's. At one size alone, the name of an artifact of the
        first size stands for what was built as that was.

        Raises:
            UsageError: there is none.
        """
        artifacts = self.manifest.artifacts
        mine = [artifact for artifact in artifacts if artifact.image_size == self._size]
        for key, among in (("name", artifacts), ("precision", mine), ("requested", mine)):
            for artifact in among:
                if getattr(artifact, key) == wanted:
                    return artifact
        first = (a for a in self._whole.artifacts if a.name == wanted and a.image_size is None)
        for artifact in first:
            if same := counterpart(artifact, artifacts):
                return same
        names = [artifact.name for artifact in artifacts]
        raise UsageError(
            f"{self.root}: has no artifact {wanted!r}{did_you_mean(wanted, names)}",
            hint=f"it has {', '.join(names)}" if names else "it has no artifacts at all",
        )

    def golden(self, artifact: Artifact | str | None = None) -> dict[str, np.ndarray[Any, Any]]:
        """Golden inputs and outputs, their hash checked; empty if the bundle has none.

        A quantised artifact is held against images of the user's own, which were held out from calibration:
        noise and constants say nothing of what it loses.

        Args:
            artifact: what is to be held against them, or its name; None, and the name of none, is one that
                is not quantised.

        ``pixel_values`` (K, ...) are network inputs, ``reference`` (K, ...) the float64 reference's outputs
        (of several the first; ``reference.NAME`` is another), ``image.i`` (H, W, 3) uint8 and
        ``image.i.pixel_values`` are for comparing the preprocessing, where images can go in.
        """
        if isinstance(artifact, str):
            artifact = next((a for a in self.manifest.artifacts if a.name == artifact), None)
        return self.tensors(HELD_OUT if artifact is not None and artifact.is_quantised else GOLDEN)

    def tensors(self, file: str) -> dict[str, np.ndarray[Any, Any]]:
        """A file of tensors at this image size, its hash checked; empty if the bundle has none.

        Raises:
            BundleError: it is damaged.
        """
        name = sized(file, self._size)
        if name not in self.manifest.files:
            return {}
        self.verify_hashes([name])
        try:
            return load_file(self.path(name))
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise BundleError(f"{self.path(name)}: cannot be read: {error}") from error

    def verify(self) -> None:
        """Check every byte: the manifest on disk, each file's hash, and that nothing else is there, but for
        what belongs to the folder: a model card, git's files and the hub's.

        Raises:
            BundleError: names every file that is missing, changed or not listed.
        """
        if parse(_read_manifest(self.root), str(self.root / MANIFEST)) != self._whole:
            raise BundleError(f"{self.root / MANIFEST}: changed since it was opened")
        self._checked.clear()
        problems = [problem for name in self.manifest.files if (problem := self._hash_problem(name))]
        strange = [name for name in self.unlisted() if not _BESIDE.fullmatch(name)]
        self._report(problems + [f"{name!r} is not listed in the manifest" for name in strange])

    def verify_hashes(self, names: Iterable[str]) -> None:
        """Check the hashes of the files that are about to be used.

        Raises:
            BundleError: names every one that is missing, changed or not listed.
        """
        self._report([problem for name in names if (problem := self._hash_problem(self._listed(name)))])

    def unlisted(self) -> tuple[str, ...]:
        """Files and links in the folder that the manifest does not know."""
        return tuple(name for name in _names(self.root) if name not in self.manifest.files)

    def edit(self) -> BundleWriter:
        """A writer that starts with this bundle's files and will replace it as a whole."""
        return BundleWriter(self.root, force=True, base=self)

    def add(
        self,
        *,
        artifacts: Sequence[Artifact] = (),
        parity: Sequence[ParityRecord] = (),
        files: Mapping[str, Path] | None = None,
    ) -> Bundle:
        """Return the bundle with more artifacts, parity records and copies of ``files``, atomically.

        Raises:
            BundleError: the additions do not fit, or somebody else changed the bundle meanwhile.
        """
        old = self._whole
        update = {"artifacts": (*old.artifacts, *artifacts), "parity": (*old.parity, *parity)}
        with self.edit() as writer:
            for name, source in (files or {}).items():
                shutil.copyfile(source, writer.file(name))
            writer.seal(old.model_copy(update=update))
            return writer.commit()

    def _listed(self, name: str) -> str:
        self.path(name)
        return name

    def _report(self, problems: Sequence[str]) -> None:
        if problems:
            more = f" (and {len(problems) - 8} more)" if len(problems) > 8 else ""
            raise BundleError(
                f"{self.root}: damaged: {'; '.join(problems[:8])}{more}",
                hint="copy or export the bundle again",
            )

    def _size_problem(self, name: str) -> str | None:
        try:
            size = signature(self.root, name).size
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        except ValueError as error:
            return str(error)
        expected = self.manifest.files[name].size
        return None if size == expected else f"{name} has {size} bytes instead of {expected}"

    def _hash_problem(self, name: str) -> str | None:
        if problem := self._size_problem(name):
            return problem
        try:
            found = signature(self.root, name)
            if self._checked.get(name) == found:
                return None
            if sha256(self.root / name) != self.manifest.files[name].sha256:
                return f"{name} changed after it was written (its sha256 does not match)"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        self._checked[name] = found
        return None


class BundleWriter:
    """Writes a bundle atomically: ``file()`` for each file, ``seal()`` the manifest, ``commit()``.

    Used as a context manager; whatever happens before the commit leaves nothing behind, and an existing
    bundle stays until the new one is complete. A disk that refuses becomes a BundleError.

    Raises:
        BundleError: the target exists (without ``force``), is something else than a bundle (with it),
            or cannot be written.
    """

    def __init__(self, path: str | Path, *, force: bool = False, base: Bundle | None = None) -> None:
        self.target = Path(path).resolve()
        self._force = force
        self._base = base
        self._staged = StagedFolder(self.target)
        self._records: dict[str, tuple[Signature, FileRecord]] = {}
        self._hashed = dict(base._checked) if base else {}
        self._sealed: Bundle | None = None

    def __enter__(self) -> Self:
        try:
            self._staged.__enter__()
            try:
                self._check_target()
                if self._base:
                    self._take_over(self._base)
            except BaseException:
                self._staged.__exit__(None, None, None)
                raise
        except OSError as error:
            raise _disk_error(error, self.target) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._staged.__exit__(kind, error, trace)
        refused = self._refused(error)
        if refused:
            raise _disk_error(refused, self.target) from error

    @property
    def directory(self) -> Path:
        """The temporary folder being filled."""
        return self._staged.path

    def file(self, name: str) -> Path:
        """Where to write the file ``name``; whatever was there before is gone.

        Raises:
            BundleError: not a plain relative path.
        """
        try:
            path = self.directory / safe_path(name)
        except ValueError as error:
            raise BundleError(str(error)) from error
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # never write into a file that the replaced bundle still shares
        return path

    def seal(self, draft: Manifest) -> Bundle:
        """Hash what is new, write the manifest, and return the unfinished bundle, ready to run.

        May be repeated, to add parity records for instance; only changed files are read again.

        Raises:
            ValueError: the draft is of one size, and the bundle that is edited has several.
        """
        if self._base and len(draft.sizes) < len(self._base._whole.sizes):
            raise ValueError("the manifest of one size alone is not the bundle's: take it from Bundle.whole")
        files = self._scan()
        manifest = seal(draft, files)
        self.file(MANIFEST).write_bytes(canonical(manifest))
        self._sealed = Bundle(self.directory, manifest, self._hashed)
        return self._sealed

    def commit(self) -> Bundle:
        """Make the sealed bundle durable, put it in its place, and return it from there.

        Raises:
            BundleError: files changed since they were sealed, or the replaced bundle was edited meanwhile.
        """
        if self._sealed is None or self._scan() != self._sealed.manifest.files:
            raise BundleError(f"{self.target}: files changed after the manifest was sealed")
        if self._base:
            self._check_unchanged(self._base)
        self._staged.commit(replace=self._force)
        return Bundle(self.target, self._sealed.manifest, self._sealed._checked)

    def _check_target(self) -> None:
        target = self.target
        if not target.exists():
            return
        if not target.is_dir() or target.is_mount():
            what = "a mount point" if target.is_dir() else "a file"
            raise BundleError(f"{target}: is {what}", hint="choose a folder that does not exist yet")
        if not self._force:
            raise BundleError(f"{target}: already exists", hint="--force replaces it")
        if any(target.iterdir()) and not looks_like_bundle(target):
            raise BundleError(f"{target}: is not a bundle, so --force does not replace it")

    def _check_unchanged(self, base: Bundle) -> None:
        if parse(_read_manifest(self.target), str(self.target / MANIFEST)) != base._whole:
            raise BundleError(f"{self.target}: somebody else changed it meanwhile", hint="run it again")

    def _take_over(self, base: Bundle) -> None:
        self._check_unchanged(base)
        if extra := base.unlisted():
            raise BundleError(f"{base.root}: has files its manifest does not list: {', '.join(extra[:8])}")
        for name, record in base.manifest.files.items():
            path = self.file(name)
            try:
                os.link(base.root / name, path, follow_symlinks=False)
            except OSError:  # no hard links here
                shutil.copy2(base.root / name, path, follow_symlinks=False)
            # The old record stays: hashing again would bless a file that was damaged meanwhile.
            self._records[name] = (signature(self.directory, name), record)

    def _scan(self) -> dict[str, FileRecord]:
        records = {}
        for name in _names(self.directory):
            try:
                found = signature(self.directory, safe_path(name))
            except ValueError as error:
                raise BundleError(f"{self.target}: {error}") from error
            known = self._records.get(name)
            if known is None or known[0] != found:
                known = found, FileRecord(size=found.size, sha256=sha256(self.directory / name))
                self._records[name] = known
                self._hashed[name] = found
            records[name] = known[1]
        return records

    def _refused(self, error: BaseException | None) -> OSError | None:
        """The disk's refusal behind an exception, if that is what it is."""
        if isinstance(error, OSError):
            ours = str(error.filename or "").startswith(str(self._staged.target.parent))
            return error if ours or error.errno in _HINTS else None
        if error is None or isinstance(error, VitdeployError):
            return None
        native = re.search(r"\(os error (\d+)\)", str(error))  # how libraries written in Rust say it
        return OSError(int(native[1]), os.strerror(int(native[1]))) if native else None


_HINTS = {
    errno.ENOSPC: "free some space, or choose another folder",
    errno.EDQUOT: "free some space, or choose another folder",
    errno.EEXIST: "--force replaces it",
    errno.EFBIG: "choose a file system that takes larger files",
    errno.EIO: "the disk may be failing",
    errno.EROFS: "choose a folder on another file system",
    errno.EACCES: "choose a folder you may write to",
    errno.EPERM: "choose a folder you may write to",
}


def _disk_error(error: OSError, target: Path) -> BundleError:
    hint = _HINTS.get(error.errno or 0)
    return BundleError(f"{target}: cannot be written: {error.strerror or error}", hint=hint)


def _read_manifest(root: Path) -> bytes:
    path = root / MANIFEST
    try:
        size = signature(root, MANIFEST).size
        if size > MAX_MANIFEST_BYTES:
            raise BundleError(f"{path}: {size} bytes, but a manifest has at most {MAX_MANIFEST_BYTES}")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise no_bundle(root) from error
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise BundleError(f"{root}: {error}") from error


def _names(folder: Path) -> Iterator[str]:
    """What a manifest of ``folder`` would list: everything but itself."""
    return (name for name in names_below(folder) if name != MANIFEST)
