"""Which engine may go to which library and GPU, and what the first bytes of an engine say."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitdeploy.bundle.proofs import PrecisionProof
from vitdeploy.config import BatchRange
from vitdeploy.errors import BundleError, DeviceUnavailable, UsageError
from vitdeploy.machine.gpus import Gpu
from vitdeploy.tensorrt.engine_file import (
    HEADER_BYTES,
    check_files,
    check_machine,
    check_size,
    foreign_to,
    read_header,
    read_record,
    runs_on,
)
from vitdeploy.tensorrt.flavours import FLAVOURS, check_targets, parse_version
from vitdeploy.tensorrt.fusion import FusionReport
from vitdeploy.tensorrt.records import BuildSettings, EngineRecord

L4, H100 = Gpu("NVIDIA L4", (8, 9)), Gpu("NVIDIA H100", (9, 0))
BITS = {"sm_75": 1, "sm_80": 2, "sm_86": 4, "sm_89": 8, "sm_120": 16, "sm_121": 32}
versions = st.tuples(*[st.integers(0, 255)] * 4)


def rtx_header(version: tuple[int, ...] = (1, 7, 1, 116), mask: int = 8, size: int = 64) -> bytes:
    return struct.pack("<4sIQQ4B4sQ24x", b"vtrt", 0, 2, size, *version, b"vtrt", mask)


def full_header(version: tuple[int, ...]) -> bytes:
    return struct.pack("<4s20x4B36x", b"ftrt", *version)


def record(**fields: Any) -> EngineRecord:
    return EngineRecord(
        **{
            "flavour": "tensorrt",
            "version": "10.16.1.11",
            "targets": ("sm_89",),
            "gpu": "NVIDIA L4",
            "size": 64,
            "sha256": "0" * 64,
            "source": "onnx-fp16",
            "source_sha256": {"model.fp16.onnx": "0" * 64},
            "profiles": (BatchRange(1, 2, 8),),
            "settings": BuildSettings(),
            "build_seconds": 1.0,
            "proof": PrecisionProof(ops=(), ok=True),
            "fusion": FusionReport(source="network", places=()),
            **fields,
        }
    )


@pytest.mark.slow
@given(versions, st.sets(st.sampled_from(sorted(BITS))), st.integers(0, 2**64 - 1))
def test_a_header_of_rtx_says_what_was_written(
    version: tuple[int, ...], targets: set[str], size: int
) -> None:
    mask = sum(BITS[target] for target in targets)
    header = read_header(rtx_header(version, mask, size), "engine")
    assert header.flavour is FLAVOURS["tensorrt-rtx"]
    assert (header.version, set(header.targets), header.size) == (version, targets, size)
    assert parse_version(header.version_text) == version


@pytest.mark.slow
@given(versions)
def test_a_header_of_the_full_one_says_its_version(version: tuple[int, ...]) -> None:
    header = read_header(full_header(version), "engine")
    assert header.flavour is FLAVOURS["tensorrt"]
    assert (header.version, header.targets, header.size) == (version, (), None)


@given(
    st.one_of(
        st.binary(max_size=200),
        st.builds(
            lambda magic, rest: magic + rest, st.sampled_from([b"vtrt", b"ftrt"]), st.binary(max_size=200)
        ),
    )
)
def test_any_bytes_are_a_header_or_a_clear_error(data: bytes) -> None:
    if len(data) >= HEADER_BYTES and data[:4] in (b"vtrt", b"ftrt"):
        assert data.startswith(read_header(data, "engine").flavour.magic)
    else:
        with pytest.raises(BundleError, match=r"\Aengine: [^\n]+\Z"):
            read_header(data, "engine")


@given(st.integers(0, 300), st.integers(0, 300))
def test_a_size_must_be_what_the_header_says(stated: int, real: int) -> None:
    header = read_header(rtx_header(size=stated), "engine")
    if stated == real:
        check_size(header, real, "engine")
    else:
        with pytest.raises(BundleError, match="truncated" if real < stated else "followed by something else"):
            check_size(header, real, "engine")
    check_size(read_header(full_header((10, 8, 0, 43)), "engine"), real, "engine")


def test_files_that_belong_together(tmp_path: Path) -> None:
    path = tmp_path / "model.plan"
    rtx = {"flavour": "tensorrt-rtx", "version": "1.7.1.116"}
    path.write_bytes(rtx_header(mask=8 | 16))
    check_files(path, record(**rtx, targets=("sm_120", "sm_89")))
    for fields, what in (
        ({**rtx, "targets": ("sm_89",)}, "architectures"),
        ({**rtx, "targets": ("sm_89", "sm_120"), "version": "1.7.1.117"}, "version"),
        ({**rtx, "targets": ("sm_89", "sm_120"), "size": 65}, "size"),
        ({"version": "1.7.1.116"}, "kind"),
    ):
        with pytest.raises(BundleError, match=f"model.plan: its {what} is .*, and its record says"):
            check_files(path, record(**fields))
    path.write_bytes(full_header((10, 16, 1, 11)))
    check_files(path, record())


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff\xfe", b"[" * 10000, b'{"schema_version": 2}'])
def test_what_is_no_record(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_bytes(data)
    with pytest.raises(BundleError, match="not the record of an engine"):
        read_record(path)


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_text(record().model_dump_json())
    assert read_record(path) == record()
    with path.open("ab") as file:
        file.truncate(17 * 2**20)
    with pytest.raises(BundleError, match="too large for the record of an engine"):
        read_record(path)


@pytest.mark.parametrize("plugins", [False, True])
def test_a_record_that_says_whether_it_has_plugins_is_read(tmp_path: Path, plugins: bool) -> None:
    path = tmp_path / "model.json"
    path.write_text(json.dumps(record().model_dump(mode="json") | {"plugins": plugins}))
    assert "plugins" not in read_record(path).model_dump()


@pytest.mark.parametrize(
    "targets, capability, runs",
    [
        (("sm_89",), (8, 9), True),
        (("sm_89",), (9, 0), False),
        (("sm_80", "sm_89"), (8, 9), True),
        (("sm_80+",), (8, 0), True),
        (("sm_80+",), (12, 0), True),
        (("sm_80+",), (7, 5), False),
        (("sm_120",), (12, 0), True),
        (("sm_121",), (12, 1), True),
        (("sm_12",), (12, 0), False),
        (("sm_100",), (10, 0), True),
        ((), (8, 9), False),
        (("", "sm_", "sm_9", "sm_90a", "gfx942", "sm_८९"), (9, 0), False),
    ],
)
def test_where_an_engine_runs(targets: tuple[str, ...], capability: tuple[int, int], runs: bool) -> None:
    assert runs_on(targets, capability) == runs
    assert (foreign_to(targets, [Gpu("GPU", capability)]) is None) == runs


@pytest.mark.slow
@given(st.lists(st.text()), st.tuples(st.integers(1, 20), st.integers(0, 9)))
def test_any_target_is_judged(targets: list[str], capability: tuple[int, int]) -> None:
    runs_on(targets, capability)


@given(st.tuples(st.integers(1, 99), st.integers(0, 9)), st.tuples(st.integers(1, 99), st.integers(0, 9)))
def test_targets_and_capabilities_are_one_order(built: tuple[int, int], here: tuple[int, int]) -> None:
    arch = Gpu("GPU", built).arch
    assert runs_on([arch], here) == (built == here)
    assert runs_on([f"{arch}+"], here) == (here >= built)


def test_foreign_to_all_gpus_that_are_here() -> None:
    assert foreign_to(("sm_75",), []) is None  # that there is no GPU is said elsewhere
    assert foreign_to(("sm_75",), [L4, H100, L4]) == "it is for sm_75, and the GPU here is sm_89, sm_90"
    assert foreign_to(("sm_90",), [L4, H100]) is None


@given(versions, versions, st.booleans())
def test_the_library_must_be_the_one_that_built(
    built: tuple[int, ...], running: tuple[int, ...], compatible: bool
) -> None:
    texts = [".".join(map(str, version)) for version in (built, running)]
    made = record(version=texts[0], settings=BuildSettings(version_compatible=compatible))
    if built == running or (compatible and running > built):
        check_machine(made, texts[1], L4, "rebuild")
    else:
        with pytest.raises(BundleError, match="older" if running < built else "newer") as caught:
            check_machine(made, texts[1], L4, "vitdeploy export")
        assert str(caught.value.hint).endswith("build it anew: vitdeploy export")


def test_the_gpu_must_be_one_that_it_was_built_for() -> None:
    with pytest.raises(DeviceUnavailable, match=r"is for sm_89, and this GPU \(NVIDIA H100\) is sm_90"):
        check_machine(record(), "10.16.1.11", H100, "rebuild")


@pytest.mark.parametrize(
    "text, numbers",
    [
        ("10.16.1.11", (10, 16, 1, 11)),
        ("1.7", (1, 7)),
        ("10.0.0.1.dev2", (10, 0, 0, 1)),
        ("", ()),
        ("x.y", ()),
    ],
)
def test_versions(text: str, numbers: tuple[int, ...]) -> None:
    assert parse_version(text) == numbers


def test_architectures_that_rtx_does_not_build_for() -> None:
    rtx = FLAVOURS["tensorrt-rtx"]
    check_targets(rtx, (("sm_75", "sm_120"), ("sm_121",)))
    with pytest.raises(UsageError, match="TensorRT for RTX does not build for 'sm_90'; did you mean"):
        check_targets(rtx, (("sm_89",), ("sm_80", "sm_90")))
