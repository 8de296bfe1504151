"""Engines and records that were damaged or exchanged: none of them reaches TensorRT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vitdeploy
from tests.fakes.machines import NEW, RTX, MakeMachine
from tests.helpers.engine_bundles import RECORD, each, engines, loads, name_of, reseal
from vitdeploy.bundle.folder import Bundle
from vitdeploy.errors import BundleError


def junk(data: bytes) -> bytes:
    return b"\x7fELF" + bytes(len(data) - 4)


def swapped(data: bytes) -> bytes:
    return (b"ftrt" if data[:4] == b"vtrt" else b"vtrt") + data[4:]


def newer(data: bytes) -> bytes:
    return data[:24] + bytes([data[24] + 1]) + data[25:]


@pytest.mark.slow
@each
@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda data: data[:40], "40 bytes are too few for an engine: it is truncated"),
        (lambda data: b"", "too few for an engine"),
        (lambda data: data[:-1], "truncated|its size is"),
        (lambda data: data + b"x", "followed by something else|its size is"),
        (junk, "not an engine of TensorRT"),
        (swapped, "its kind is|its header says"),
        (newer, "its version is"),
        (lambda data: data[:-4] + b"\0\0\0\0", "its record is of another engine"),
    ],
    ids=["short", "empty", "truncated", "longer", "junk", "swapped", "newer", "changed"],
)
def test_bytes_that_are_no_engine_do_not_reach_the_runtime(
    version: str, spoil: Callable[[bytes], bytes], message: str, machine: MakeMachine, target: Path
) -> None:
    machine(version)
    bundle = engines(target, version)
    folder = "engines/sm_89-rtx" if version == RTX else "engines/sm_89"
    here = machine(version)

    with bundle.edit() as writer:
        plan = f"{folder}/model.fp32.plan"
        data = (writer.directory / plan).read_bytes()
        writer.file(plan).write_bytes(spoil(data))
        writer.seal(bundle.manifest)
        writer.commit()
    Bundle.open(target).verify()
    with pytest.raises(BundleError, match=message) as caught:
        vitdeploy.load(target, backend=name_of(version))
    assert "\n" not in caught.value.message
    assert loads(here) == 0


@pytest.mark.slow
@each
def test_a_changed_byte_does_not_reach_the_runtime(version: str, machine: MakeMachine, target: Path) -> None:
    machine(version)
    bundle = engines(target, version)
    path = bundle.path(bundle.artifact(f"{name_of(version)}-fp32-sm_89").path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    here = machine(version)
    with pytest.raises(BundleError, match="sha256 does not match"):
        vitdeploy.load(target, backend=name_of(version))
    assert loads(here) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, message",
    [
        ({"size": 3}, "its size is"),
        ({"version": "11.5.0.0"}, "its version is"),
        ({"sha256": "0" * 64}, "its record is of another engine than the manifest lists"),
        ({"targets": ["sm_90"]}, "its record is of another engine than the manifest lists"),
        ({"flavour": "tensorrt-rtx"}, "its kind is"),
        ({"flavour": "onnx"}, "not the record of an engine"),
        ({"speed": 3}, "not the record of an engine"),
        ({"profiles": []}, "not the record of an engine"),
        ({"profiles": [{"min": 1, "opt": 1, "max": 4}]}, "the engine's profiles are"),
    ],
)
def test_a_record_that_disagrees(
    change: dict[str, Any], message: str, machine: MakeMachine, target: Path
) -> None:
    machine(NEW)
    bundle = engines(target)

    def edit(folder: Path) -> None:
        fields = json.loads((folder / RECORD).read_text())
        (folder / RECORD).write_text(json.dumps(fields | change))

    reseal(bundle, edit)
    here = machine(NEW)
    with pytest.raises(BundleError, match=message):
        vitdeploy.load(target, backend="tensorrt")
    assert loads(here) == bool(change.get("profiles"))
