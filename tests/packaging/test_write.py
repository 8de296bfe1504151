"""What holds for every target: names, places, hashes, all or nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.bundles import write_bundle
from tests.helpers.small_bundles import artifact, draft, flip, siblings
from vitdeploy.bundle.folder import Bundle, BundleWriter
from vitdeploy.errors import BundleError, ExportError, UsageError, VitdeployError
from vitdeploy.packaging.target import (
    TARGETS,
    PackageSettings,
    fill_template,
    get_target,
    label,
    target_names,
)
from vitdeploy.packaging.write import MARKER, MAX_NAME, Package, model_name, write_package

Make = Callable[..., Package]
URI = "s3://models/linear"
SERVERS = ("triton-server", "kserve", "docker", "ray")
"""Targets that take any bundle; what holds for the hub's folder is in test_hub.py."""


def make_of(target: str) -> dict[str, object]:
    return {"storage_uri": URI} if target == "kserve" else {}


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("target", SERVERS)
def test_what_is_said_is_what_is_there(package: Make, bundle: Bundle, target: str) -> None:
    made = package(bundle, target, **make_of(target))
    found = tree(made.folder)
    marker = json.loads(found.pop(MARKER))
    assert sorted(found) == sorted(file.path for file in made.files) == sorted(marker["files"])
    for file in made.files:
        data = found[file.path]
        assert (file.size, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert marker["files"][file.path] == {"size": file.size, "sha256": file.sha256}
    assert marker["bundle"] == {"name": "linear", "digest": bundle.manifest.digest}
    assert (marker["target"], marker["artifact"], marker["version"]) == (target, "onnx-fp32", 1)
    assert "README.md" in found
    assert made.next
    assert siblings(made.folder) == ["linear.bundle", "out"]


@pytest.mark.parametrize("target", SERVERS)
def test_the_same_bundle_gives_the_same_bytes(package: Make, bundle: Bundle, target: str) -> None:
    first = tree(package(bundle, target, "a", **make_of(target)).folder)
    second = tree(package(bundle, target, "b", **make_of(target)).folder)
    assert first == second


@pytest.mark.parametrize("target", SERVERS)
def test_no_file_names_this_machine(package: Make, bundle: Bundle, target: str) -> None:
    made = package(bundle, target, **make_of(target))
    private = str(made.folder.parent).encode()
    assert [name for name, data in tree(made.folder).items() if private in data] == []


# --- places ------------------------------------------------------------------------------------------


def test_force_replaces_a_package(package: Make, bundle: Bundle) -> None:
    made = package(bundle, "docker")
    (made.folder / "README.md").write_text("changed by hand")
    with pytest.raises(UsageError, match="already exists"):
        package(bundle, "docker")
    again = package(bundle, "triton-server", force=True)
    assert (again.folder / "models/linear/config.pbtxt").exists()
    assert not (again.folder / "Dockerfile.old").exists()
    assert "changed by hand" not in (again.folder / "README.md").read_text()
    assert siblings(made.folder) == ["linear.bundle", "out"]


@pytest.mark.parametrize(
    "files",
    [
        {"notes.txt": "mine"},
        {MARKER: "no JSON"},
        {MARKER: "[]"},
        {MARKER: '{"generator": "someone else", "files": {}}'},
        {MARKER: '{"generator": "vitdeploy 0.1.0"}'},
        {"manifest.json": '{"generator": "vitdeploy 0.1.0"}'},
    ],
)
def test_force_replaces_nothing_else(
    package: Make, bundle: Bundle, tmp_path: Path, files: dict[str, str]
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    with pytest.raises(UsageError, match="is not a package"):
        package(bundle, force=True)
    assert {name: data.decode() for name, data in tree(folder).items()} == files


def test_force_keeps_what_somebody_put_into_a_package(package: Make, bundle: Bundle) -> None:
    made = package(bundle)
    cached = made.folder / "models/linear_preprocess/1/__pycache__"
    cached.mkdir()
    (cached / "model.cpython-311.pyc").write_bytes(b"")
    package(bundle, force=True)  # what a server has cached is nobody's work
    (made.folder / "secrets.env").write_text("mine")
    with pytest.raises(UsageError, match=r"did not write: secrets\.env"):
        package(bundle, force=True)
    assert (made.folder / "secrets.env").read_text() == "mine"


def test_an_empty_folder_needs_force_only(package: Make, bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="already exists"):
        package(bundle)
    assert package(bundle, force=True).files


def test_a_file_is_no_folder(package: Make, bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    for force in (False, True):
        with pytest.raises(UsageError, match="is a file"):
            package(bundle, force=force)
    assert (tmp_path / "out").read_text() == "mine"


def test_not_into_the_bundle(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(bundle.root)
    for place in (bundle.root, bundle.root / "triton", tmp_path / "link/triton", bundle.root / "a/../b"):
        with pytest.raises(UsageError, match="inside of the bundle"):
            write_package(bundle.root, "docker", place, force=True)
    Bundle.open(bundle.root).verify()


def test_missing_parents_are_made(bundle: Bundle, tmp_path: Path) -> None:
    made = write_package(bundle.root, "docker", tmp_path / "a/b/c")
    assert (made.folder / MARKER).exists()


def test_a_folder_that_may_not_be_written(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a file in the way")
    with pytest.raises(ExportError, match="cannot be written"):
        write_package(bundle.root, "docker", tmp_path / "a/b")


# --- bundles -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", SERVERS)
def test_a_damaged_bundle_is_not_packaged(package: Make, bundle: Bundle, tmp_path: Path, target: str) -> None:
    flip(bundle.root / "model.onnx", -20, 3)
    with pytest.raises(BundleError, match="changed after it was written"):
        package(bundle, target, **make_of(target))
    assert siblings(tmp_path / "out") == ["linear.bundle"]


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        write_package(tmp_path / "none", "docker", tmp_path / "out")


def test_a_bundle_without_artifacts(package: Make, tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "empty.bundle") as writer:
        writer.seal(draft())
        empty = writer.commit()
    with pytest.raises(UsageError, match="has no artifact for onnxruntime"):
        package(empty)
    with pytest.raises(UsageError, match="has no artifact 'fp16'"):
        package(empty, artifact="fp16")


def test_what_fails_in_between_leaves_nothing(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(job: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vitdeploy.packaging.docker._dockerfile", lambda *_: fails(None))
    with pytest.raises(KeyboardInterrupt):
        write_package(bundle.root, "docker", tmp_path / "deep/out")
    assert siblings(tmp_path / "out") == ["linear.bundle"]


@pytest.mark.slow
def test_the_most_exact_artifact_is_taken(package: Make, bundle: Bundle) -> None:
    assert package(bundle, folder="a").artifact == "onnx-fp32"
    assert package(bundle, folder="b", artifact="fp16").artifact == "onnx-fp16"
    assert package(bundle, folder="c", artifact="onnx-fp16").artifact == "onnx-fp16"
    with pytest.raises(UsageError, match="did you mean 'onnx-fp16'"):
        package(bundle, folder="d", artifact="onnx-pf16")


# --- names and settings ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "own, plain",
    [
        ("linear", "linear"),
        ("B/16", "B_16"),
        ("google/vit-base-patch16-224", "google_vit-base-patch16-224"),
        ("timm:vit_base", "timm_vit_base"),
        ("../../etc/passwd", "etc_passwd"),
        ("a b\nc", "a_b_c"),
        ("模型-1", "1"),
        ("x" * 200, "x" * MAX_NAME),
    ],
)
def test_the_bundle_s_own_name(tmp_path: Path, own: str, plain: str) -> None:
    made = write_bundle(tmp_path / "b.bundle", name=own)
    name, note = model_name(made, None)
    assert name == plain
    assert bool(note) == (own != plain)


def test_a_name_with_nothing_to_keep(tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "b.bundle", name="模型")
    with pytest.raises(UsageError, match="cannot be a model's name") as caught:
        model_name(made, None)
    assert "--name" in str(caught.value.hint)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "a\\b", "/etc", "a b", "a\n", "-a", ".a", "a.", "é", "x" * 61, "a\0b"],
)
def test_names_that_are_refused(package: Make, bundle: Bundle, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="cannot be a model's name"):
        package(bundle, name=name)
    assert siblings(tmp_path / "out") == ["linear.bundle"]


@pytest.mark.slow
@given(st.text(max_size=80))
def test_every_name_is_carried_or_refused(name: str) -> None:
    from vitdeploy.packaging.write import _NAME

    if _NAME.fullmatch(name):
        assert name == Path(name).name
        assert name.isascii()
        assert not set(name) & set("/\\ :\n\0")
        assert 1 <= len(name) <= MAX_NAME


@pytest.mark.slow
@given(st.text(max_size=80))
def test_labels_are_dns_labels(name: str) -> None:
    made = label(name)
    assert 1 <= len(made) <= 53
    assert made[0].isalpha()
    assert made[-1].isalnum()
    assert all(c.isascii() and (c.islower() or c.isdigit() or c == "-") for c in made)


def test_targets() -> None:
    assert target_names() == (*SERVERS, "hub")
    known = set(PackageSettings.__dataclass_fields__)
    for name in TARGETS:
        write, taken = get_target(name)
        assert callable(write)
        assert taken <= known
    with pytest.raises(UsageError, match="did you mean 'triton-server'"):
        get_target("triton")


@pytest.mark.parametrize(
    "target, settings, message",
    [
        ("docker", {"top_k": 3}, "takes no --top-k"),
        ("docker", {"storage_uri": URI}, "takes no --storage-uri"),
        ("triton-server", {"backend": "openvino"}, "takes no --backend"),
        ("triton-server", {"threads": 0}, "--threads must be at least 1"),
        ("triton-server", {"instances": -1}, "--instances must be at least 1"),
        ("triton-server", {"max_batch": 0}, "--max-batch must be at least 1"),
        ("triton-server", {"max_delay_ms": -0.5}, "--max-delay-ms"),
        ("triton-server", {"max_delay_ms": float("nan")}, "--max-delay-ms"),
        ("triton-server", {"max_delay_ms": float("inf")}, "--max-delay-ms"),
        ("triton-server", {"image": "a\nRUN rm"}, "no name of a container image"),
        ("triton-server", {"image": ""}, "no name of a container image"),
        ("kserve", {"min_replicas": -1}, "--min-replicas"),
        ("kserve", {"min_replicas": 4, "max_replicas": 2}, "is more than"),
    ],
)
def test_settings_that_are_refused(
    package: Make, bundle: Bundle, tmp_path: Path, target: str, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        package(bundle, target, **{**make_of(target), **settings})
    assert siblings(tmp_path / "out") == ["linear.bundle"]


@pytest.mark.parametrize("version", [0, -1, 2**31])
def test_versions_that_are_refused(package: Make, bundle: Bundle, version: int) -> None:
    with pytest.raises(UsageError, match="version"):
        package(bundle, version=version)


def test_templates_say_what_they_lack() -> None:
    with pytest.raises(KeyError):
        fill_template("triton_server.Dockerfile", image="a")
    with pytest.raises(KeyError, match="has no place for"):
        fill_template("triton_server.Dockerfile", image="a", pillow="1", other="b")


def test_errors_are_ours(package: Make, tmp_path: Path) -> None:
    """An artifact that no target knows."""
    with BundleWriter(tmp_path / "odd.bundle") as writer:
        writer.file("model.xyz").write_bytes(b"?")
        odd = artifact("odd", "model.xyz").model_copy(update={"format": "xyz"})
        writer.seal(draft(artifacts=(odd,)))
        bundle = writer.commit()
    for target in target_names():
        with pytest.raises(VitdeployError):
            package(bundle, target, artifact="odd", **make_of(target))
