"""``vitdeploy engine``: what its flags ask for, what is printed, and that a failure changes no byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vitdeploy
from tests.fakes.machines import NEW, Machine, go_to
from tests.helpers.commands import Run
from vitdeploy.bundle.folder import Bundle
from vitdeploy.config import BatchRange
from vitdeploy.errors import ParityError, UsageError
from vitdeploy.exporter import tensorrt as exporter
from vitdeploy.exporter.request import EngineRequest
from vitdeploy.machine.gpus import Gpu
from vitdeploy.tensorrt.records import BuildSettings

ENGINES = ["tensorrt-fp32-sm_89", "tensorrt-fp16-sm_89"]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    """A machine with an L4 and TensorRT's double."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return go_to(monkeypatch, NEW, Gpu("NVIDIA L4", (8, 9)))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[EngineRequest, dict[str, Any]]]:
    """What the command asks for; the bundle comes back as it is."""
    seen: list[tuple[EngineRequest, dict[str, Any]]] = []

    def add_engines(bundle: Bundle, request: EngineRequest, **options: Any) -> Bundle:
        seen.append((request, options))
        return bundle

    monkeypatch.setattr(exporter, "add_engines", add_engines)
    return seen


@pytest.fixture
def unchanged(bundle: Bundle) -> Callable[[], bool]:
    """Whether the bundle is still byte for byte what it was, and alone in its folder."""

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in bundle.root.parent.rglob("*.bundle/*") if path.is_file()}

    def check() -> bool:
        return files() == before and not list(bundle.root.parent.glob(".vitdeploy-*"))

    before = files()
    return check


def settings(**values: Any) -> dict[str, Any]:
    return {"settings": BuildSettings(**values)}


@pytest.mark.parametrize(
    "flags, expected",
    [
        ([], {"formats": ("auto",), "architectures": (), "profiles": (), "precisions": (), **settings()}),
        (["--format", "tensorrt,tensorrt-rtx"], {"formats": ("tensorrt", "tensorrt-rtx")}),
        (["--arch", "sm_89,sm_80+sm_120"], {"architectures": ("sm_89", "sm_80+sm_120")}),
        (["--precision", "fp16,bf16"], {"precisions": ("fp16", "bf16")}),
        (
            ["--profile", "2,8,64", "--profile", "1,1,1"],
            {"profiles": (BatchRange(1, 1, 1), BatchRange(2, 8, 64))},
        ),
        (["--workspace", "4G", "--opt-level", "5"], settings(workspace=4 * 2**30, level=5)),
        (["--no-timing-cache"], settings(timing_cache=False)),
        (["--hardware-compat", "ampere_plus"], settings(hardware="ampere_plus")),
        (["--version-compatible", "--weights", "refit"], settings(version_compatible=True, weights="refit")),
    ],
    ids=str,
)
def test_flags(
    run: Run, bundle: Bundle, asked: list[Any], flags: list[str], expected: dict[str, Any]
) -> None:
    assert run("engine", bundle.root, *flags).code == 0
    ((request, options),) = asked
    assert {name: getattr(request, name) for name in expected} == expected
    assert not options["force"]


@pytest.mark.slow
def test_engines_are_added_and_shown(run: Run, bundle: Bundle, machine: Machine) -> None:
    result = run("engine", bundle.root, "--format", "tensorrt")
    assert result.code == 0, result.err
    for text in ("engines/sm_89/model.fp16.plan", "precision proof", f"vitdeploy verify {bundle.root}"):
        assert text in result.out
    stages = [line.split()[:2] for line in result.err.splitlines()]
    assert stages == [["tensorrt", "fp32"], ["tensorrt", "fp16"], ["parity", "fp32"], ["parity", "fp16"]]
    manifest = Bundle.open(bundle.root).manifest
    assert [artifact.name for artifact in manifest.artifacts] == ["onnx-fp32", "onnx-fp16", *ENGINES]
    again = run("engine", bundle.root, "--format", "tensorrt", "--precision", "fp16")
    assert again.code == 2
    assert "already has tensorrt-fp16-sm_89" in again.err
    flags = ("--format", "tensorrt", "--precision", "fp16", "--force")
    assert run("engine", bundle.root, *flags).code == 0


@pytest.mark.slow
def test_json_is_the_document_of_an_export(run: Run, bundle: Bundle, machine: Machine) -> None:
    document = run("engine", bundle.root, "--format", "tensorrt", "--json").document
    assert list(document) == ["ok", "bundle", "artifacts", "rewrites", "parity", "stages", "notes"]
    assert document["ok"] is True
    assert document["bundle"] == str(bundle.root)
    assert [artifact["name"] for artifact in document["artifacts"]][2:] == ENGINES
    assert {record["artifact"] for record in document["parity"]} >= set(ENGINES)
    assert document["stages"][0]["name"] == "tensorrt fp32"


@pytest.mark.parametrize(
    "flags, code, message",
    [
        (["--format", "onnx"], 2, "'onnx' is no format of engines"),
        (["--format", "tensort"], 2, "'tensort' is no format of engines; did you mean 'tensorrt'?"),
        (["--format", "tensorrt", "--precision", "bf16"], 2, "has no ONNX artifact in bf16"),
        (["--format", "tensorrt", "--arch", "sm_120"], 2, "builds for the GPU that is here, sm_89, not for"),
        (["--opt-level", "6"], 2, "optimization level 6 does not exist"),
        (["--workspace", "much"], 2, "--workspace much: not a size"),
        (["--weights", "striped"], 2, "unknown weights 'striped'; did you mean 'stripped'?"),
        (["--profile", "1,2"], 2, "--profile 1,2: 2 numbers"),
        (["--profile", "1,1,1", "--profile", "4,8,64"], 2, "no profile serves batch sizes 2 to 3"),
        (["--batch", "1,2,4"], 2, "no such option: --batch"),
    ],
    ids=str,
)
def test_bad_input_changes_nothing(
    run: Run,
    bundle: Bundle,
    machine: Machine,
    unchanged: Callable[[], bool],
    flags: list[str],
    code: int,
    message: str,
) -> None:
    result = run("engine", bundle.root, *flags)
    assert (result.code, result.out) == (code, "")
    assert [message in line for line in result.err.splitlines() if line.startswith("error: ")] == [True]
    assert unchanged()


def test_no_bundle_is_an_error(run: Run, tmp_path: Path) -> None:
    result = run("engine", tmp_path / "none.bundle", "--json")
    assert (result.code, result.document["error"]["kind"]) == (2, "BundleError")
    assert "is not a bundle" in result.err


@pytest.mark.slow
@pytest.mark.parametrize("failure", [ParityError("it is wrong"), OSError(28, "No space left on device")])
def test_a_failure_at_the_last_engine_changes_no_byte(
    run: Run,
    bundle: Bundle,
    machine: Machine,
    unchanged: Callable[[], bool],
    monkeypatch: pytest.MonkeyPatch,
    failure: Exception,
) -> None:
    build = exporter.build_engines

    def second_fails(job: Any, report: Any) -> Any:
        if job.onnx.endswith("model.fp16.onnx"):
            raise failure
        return build(job, report)

    monkeypatch.setattr(exporter, "build_engines", second_fails)
    result = run("engine", bundle.root, "--format", "tensorrt")
    assert result.code == (5 if isinstance(failure, ParityError) else 2)
    assert unchanged()


# --- what `export` says of it ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--profile", "1,1,1"],
        ["--workspace", "4G"],
        ["--opt-level=3"],
        ["--timing-cache"],
        ["--no-timing-cache"],
        ["--hardware-compat", "ampere_plus"],
        ["--version-compatible"],
        ["--weights", "refit"],
    ],
    ids=str,
)
def test_export_names_the_verb_that_takes_the_option(run: Run, flags: list[str]) -> None:
    option = flags[0].partition("=")[0]
    result = run("export", "-m", "digits", "--format", "tensorrt-rtx", "--arch", "sm_89", *flags)
    assert (result.code, result.out) == (2, "")
    error, hint = result.err.splitlines()
    assert error == f"error: {option} is an option of `vitdeploy engine`"
    assert f"vitdeploy engine BUNDLE {option}" in hint
    assert run("export", *flags, "--json").document["error"]["kind"] == "UsageError"


def test_another_verb_has_no_such_option(run: Run) -> None:
    assert "no such option: --opt-level" in run("verify", "x.bundle", "--opt-level", "3").err


def test_export_of_a_bundle_names_the_verb(run: Run, bundle: Bundle, unchanged: Callable[[], bool]) -> None:
    result = run("export", "-m", bundle.root, "--format", "tensorrt")
    assert result.code == 2
    assert f"{bundle.root} is a bundle, and no model to export" in result.err
    assert f"hint: `vitdeploy engine {bundle.root}` adds engines to it" in result.err
    assert unchanged()


# --- from Python ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_from_python(bundle: Bundle, machine: Machine) -> None:
    engine = {"profiles": [(1, 1, 1), (2, 4, 8)], "level": 3}
    made = vitdeploy.add_engines(bundle.root, format="tensorrt", precision="fp16", engine=engine)
    assert [artifact.name for artifact in made.manifest.artifacts][2:] == ENGINES[1:]
    assert machine.assigned("builder_optimization_level") == [3]
    assert len(machine.calls("add_optimization_profile")) == 2
    both = vitdeploy.add_engines(made, format="tensorrt", force=True)
    assert {artifact.name for artifact in both.manifest.artifacts} >= set(ENGINES)
    with pytest.raises(UsageError, match="unknown engine setting 'levl'; did you mean 'level'"):
        vitdeploy.add_engines(both, engine={"levl": 3})
