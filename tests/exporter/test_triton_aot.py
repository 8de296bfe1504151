"""Kernels compiled for GPUs that are not here, as an artifact of a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.helpers.commands import in_a_process
from tests.helpers.models import CONFIGS
from vitdeploy.backends import triton as backend
from vitdeploy.bundle.folder import Bundle, BundleWriter
from vitdeploy.config import BatchRange
from vitdeploy.errors import BundleError, UsageError
from vitdeploy.exporter import triton_aot
from vitdeploy.exporter.request import ExportRequest
from vitdeploy.progress import Progress

ARCHITECTURES = ("sm_80", "sm_90")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The digits model with kernels for two architectures, compiled in a process without the interpreter."""
    folder = tmp_path_factory.mktemp("aot") / "digits.bundle"
    command = ("export", "-m", "digits", "-o", folder, "--fp16", "--batch", "1,2,2")
    result = in_a_process(*command, "--format", "onnx,triton-aot", "--arch", ",".join(ARCHITECTURES))
    assert result.code == 0, result.err
    assert "no cubin has run yet" in result.err
    return Bundle.open(folder)


@pytest.mark.slow
def test_the_bundle_holds_the_kernels_of_every_site(exported: Bundle) -> None:
    exported.verify()
    artifact = exported.artifact("triton-aot-fp16")
    assert (artifact.format, artifact.precision, artifact.batch.max) == ("triton-aot", "fp16", 2)
    for arch in ARCHITECTURES:
        index = json.loads(exported.path(f"kernels/fp16/{arch}/kernels.json").read_text())
        files = (Path(name) for name in artifact.files if f"/{arch}/" in name)
        cubins = {path.stem for path in files if path.suffix == ".cubin"}
        assert cubins == set(index["kernels"])
        for key in cubins:
            assert exported.path(f"kernels/fp16/{arch}/{key}.cubin").read_bytes()[:4] == b"\x7fELF"
    assert artifact.proof is not None
    assert artifact.proof.ok
    sites = {op.name: op.dtype for op in artifact.proof.ops}
    assert sites["blocks.2.mlp.fc1"] == sites["head"] == "float16"
    assert [(r.backend, r.passed) for r in exported.manifest.parity if r.artifact == artifact.name] == [
        ("emulation", True)
    ]


def test_kernels_of_a_further_image_size_lie_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_package(root: Path, needed: dict[str, list[object]]) -> list[Path]:
        paths = [root / arch / "kernels.json" for arch in needed]
        for path in paths:
            path.parent.mkdir(parents=True)
            path.write_text("{}")
        return paths

    library = SimpleNamespace(
        ARCHITECTURES=dict.fromkeys(ARCHITECTURES),
        AotError=ValueError,
        INDEX="kernels.json",
        shipped_table=lambda arch: {},
        format_table=lambda table: "{}",
        write_package=write_package,
    )
    monkeypatch.setattr(triton_aot, "kernels_library", lambda name: library)
    monkeypatch.setattr(triton_aot, "_launches", lambda *arguments: [])
    config = CONFIGS["vit"]
    with BundleWriter(tmp_path / "b") as writer:
        for size in (None, (64, 32)):
            artifact = triton_aot.write_kernels(
                config,
                "fp16",
                writer,
                batch=BatchRange(1, 2, 4),
                architectures=ARCHITECTURES,
                output="logits",
                input_kind="float",
                progress=Progress(),
                place=size,
            )
            suffix, folder = ("", "fp16") if size is None else ("-64x32", "fp16.64x32")
            assert (artifact.name, artifact.image_size) == (f"triton-aot-fp16{suffix}", size)
            assert artifact.path == f"kernels/{folder}/sm_80/kernels.json"
            assert all(name.startswith(f"kernels/{folder}/") for name in artifact.files)


class Unpackaged:
    """A launch that no cubin was made for."""

    name = "strange_kernel"

    def run(self) -> None:
        """Compiled at run time."""


@pytest.mark.slow
def test_the_running_gpus_kernels_are_taken(exported: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = exported.artifact("triton-aot-fp16")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (8, 9))
    monkeypatch.setattr("vitdeploy_kernels.package.CudaDriver", lambda: None)
    kernels = backend._Kernels.of(exported, artifact, "cuda:0")
    assert kernels.report == "kernels: compiled ahead of time for sm_80"
    assert kernels.table is not None
    assert kernels.table.gpu == "sm_80"
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (12, 0))
    other = backend._Kernels.of(exported, artifact, "cuda:0")
    assert "compiled at the start: no cubins for compute capability 12.0" in other.report
    assert (other.package, other.table, other.packaged) == (None, None, False)
    assert kernels.packaged
    monkeypatch.setattr(kernels.package, "run", lambda _: False)
    kernels.execute(Unpackaged())
    assert not kernels.packaged
    assert kernels.report == "kernels: compiled ahead of time for sm_80, but not strange_kernel"


@pytest.mark.slow
def test_a_damaged_cubin_is_refused(exported: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = exported.artifact("triton-aot-fp16")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))
    cubin = exported.path(next(name for name in artifact.files if name.endswith(".cubin")))
    whole = cubin.read_bytes()
    cubin.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        with pytest.raises(BundleError, match="cubin"):
            backend._Kernels.of(Bundle.open(exported.root), artifact, "cuda:0")
    finally:
        cubin.write_bytes(whole)


@pytest.mark.slow
def test_a_bundle_with_kernels_alone(tmp_path: Path) -> None:
    folder = tmp_path / "out.bundle"
    command = ("export", "-m", "digits", "-o", folder, "--bf16", "--batch", "1", "--format", "triton-aot")
    result = in_a_process(*command, "--arch", "sm_120")
    assert result.code == 0, result.err
    assert [artifact.name for artifact in Bundle.open(folder).manifest.artifacts] == ["triton-aot-bf16"]
    verified = in_a_process("verify", folder)
    assert verified.code == 5
    assert "no backend here runs it" in verified.err


@pytest.mark.parametrize(
    "options, message",
    [
        ({"formats": ("triton-aot",), "precisions": ("fp16",)}, "the GPUs that you name"),
        (
            {"formats": ("triton-aot",), "precisions": ("fp16",), "architectures": ("sm_9",)},
            "unknown architecture 'sm_9'; did you mean 'sm_90'",
        ),
        ({"formats": ("triton-aot",), "architectures": ("sm_90",)}, "fp16 or bf16, not in fp32"),
        ({"formats": ("onnx",), "architectures": ("sm_90",)}, "no format needs it"),
        ({"formats": ("triton-aut",)}, "unknown format 'triton-aut'; did you mean 'triton-aot'"),
    ],
)
def test_bad_requests(options: dict[str, tuple[str, ...]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ExportRequest(**options)  # type: ignore[arg-type]
