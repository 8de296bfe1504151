"""TensorRT for RTX engines by ``vitdeploy engine`` and ``export``, of real models, without a GPU."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tensorrt_rtx
import torch

from tests.helpers.commands import COMMAND, Result, in_a_process, in_this_process
from tests.helpers.onnx_graphs import widen
from vitdeploy.bundle.folder import Bundle, BundleWriter
from vitdeploy.bundle.manifest import Artifact
from vitdeploy.config import BatchRange, Precision
from vitdeploy.exporter.onnx import INPUT, write_onnx
from vitdeploy.exporter.request import EngineRequest, ExportRequest, orders_of
from vitdeploy.exporter.subject import open_subject
from vitdeploy.exporter.tensorrt import write_engines
from vitdeploy.model.precision import PrecisionPlan
from vitdeploy.progress import Progress
from vitdeploy.tensorrt.engine_file import check_files, read_record
from vitdeploy.tensorrt.records import EngineRecord

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
RTX = ("--format", "tensorrt-rtx")
pytestmark = pytest.mark.slow


@pytest.fixture
def bundle(digits_onnx: Path, tmp_path: Path) -> Path:
    """The digits model as ONNX in three precisions, to add to."""
    return Path(shutil.copytree(digits_onnx, tmp_path / "digits.bundle"))


@pytest.fixture
def unchanged(bundle: Path) -> Iterator[Callable[[], bool]]:
    """Whether the bundle, and the folder it lies in, are still what they were."""
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}

    def check() -> bool:
        after = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
        return after == before and list(bundle.parent.iterdir()) == [bundle]

    yield check
    Bundle.open(bundle).verify()


def add(bundle: Path, *flags: str) -> Result:
    return in_a_process("engine", bundle, *RTX, *flags)


def record_of(bundle: Path, artifact: Artifact) -> EngineRecord:
    path = bundle / artifact.path
    record = read_record(path.with_suffix(".json"))
    check_files(path, record)
    return record


def proven(record: EngineRecord, precision: str, gemms: int, norms: int) -> None:
    """The proof lists every GEMM in the precision asked for, and every LayerNorm in fp32."""
    found = [op for op in record.proof.ops if op.op == "MatMul"]
    assert {op.dtype for op in found} == {DTYPES[precision]}
    assert len(found) == gemms
    normalisations = [op for op in record.proof.ops if op.op == "LayerNormalization"]
    assert {(op.dtype, op.island) for op in normalisations} == {("float32", precision != "fp32")}
    assert len(normalisations) == norms
    assert record.proof.ok


# --- what is built --------------------------------------------------------------------------------------


def test_three_precisions_and_several_targets(bundle: Path) -> None:
    before = Bundle.open(bundle).manifest
    result = add(bundle, "--arch", "sm_89,sm_80+sm_120")
    assert result.code == 0, result.err
    for text in ("4/4 attention can be fused", "built, not yet run (no NVIDIA GPU answers)"):
        assert text in result.err
    opened = Bundle.open(bundle)
    opened.verify()
    assert opened.manifest.artifacts[:3] == before.artifacts
    assert opened.manifest.parity == before.parity
    engines = opened.manifest.artifacts[3:]
    assert [engine.name for engine in engines] == [
        f"tensorrt-rtx-{precision}-{arch}" for precision in DTYPES for arch in ("sm_89", "sm_80+sm_120")
    ]
    for engine in engines:
        record = record_of(bundle, engine)
        assert record.targets == engine.targets == tuple(engine.name.rsplit("-", 1)[1].split("+"))
        assert record.version == tensorrt_rtx.__version__
        assert record.profiles == (BatchRange(1, 8, 64),)
        assert engine.batch == BatchRange(1, 8, 64)
        assert record.source_sha256 == {
            name: opened.manifest.files[name].sha256 for name in opened.artifact(record.source).files
        }
        assert record.sha256 == opened.manifest.files[engine.path].sha256
        proven(record, engine.precision, gemms=28, norms=9)


def test_one_command_from_model_to_engine(tmp_path: Path) -> None:
    folder = tmp_path / "made.bundle"
    flags = ("--fp16", "--image-size", "48x64", "--input", "uint8", *RTX, "--arch", "sm_89")
    result = in_a_process("export", "-m", "digits", *flags, "-o", folder, "--json")
    assert result.code == 0, result.err
    names = [artifact["name"] for artifact in result.document["artifacts"]]
    assert names == ["onnx-fp16", "tensorrt-rtx-fp16-sm_89"]
    assert any("built, not yet run" in note for note in result.document["notes"])
    engine = Bundle.open(folder).artifact("tensorrt-rtx-fp16-sm_89")
    assert engine.inputs[0].shape == ("N", 48, 64, 3)
    proven(record_of(folder, engine), "fp16", gemms=28, norms=9)


def test_a_dry_run_names_the_engines(tmp_path: Path) -> None:
    flags = ("--fp16", *RTX, "--arch", "sm_89,sm_80+sm_120", "--dry-run", "--json")
    result = in_a_process("export", "-m", "digits", *flags, "-o", tmp_path / "made.bundle")
    assert result.code == 0, result.err
    files = list(result.document["files"])
    assert files[2:] == [
        "model.fp16.onnx",
        "engines/sm_89-rtx/model.fp16.plan",
        "engines/sm_80+sm_120-rtx/model.fp16.plan",
    ]
    assert result.document["notes"] == []
    assert list(tmp_path.iterdir()) == []


def test_profiles_and_another_build_of_the_same_name(bundle: Path) -> None:
    flags = ("--precision", "fp16", "--arch", "sm_89")
    profiles = ("--profile", "1,1,1", "--profile", "2,8,64")
    assert add(bundle, *flags, *profiles).code == 0
    engine = Bundle.open(bundle).artifact("tensorrt-rtx-fp16-sm_89")
    assert record_of(bundle, engine).profiles == (BatchRange(1, 1, 1), BatchRange(2, 8, 64))
    assert engine.batch == BatchRange(1, 8, 64)
    again = add(bundle, *flags)
    assert again.code == 2
    assert "already has tensorrt-rtx-fp16-sm_89" in again.err
    assert "hint: --force replaces it" in again.err
    assert add(bundle, *flags, "--force").code == 0
    opened = Bundle.open(bundle)
    assert record_of(bundle, opened.artifact("tensorrt-rtx-fp16-sm_89")).profiles == (BatchRange(1, 8, 64),)
    assert len(opened.manifest.artifacts) == 4


def test_inspect_and_verify_tell_of_engines(bundle: Path) -> None:
    assert add(bundle, "--precision", "fp16", "--arch", "sm_80+sm_120").code == 0
    plan = bundle / "engines/sm_80+sm_120-rtx/model.fp16.plan"
    shown = in_a_process("inspect", plan)
    for text in ("TensorRT for RTX 1.", "sm_80, sm_120", "28 GEMMs fp16", "batch 1 to 64", "9/9 LayerNorm"):
        assert text in shown.out
    document = in_a_process("inspect", plan, "--json").document
    assert document["targets"] == ["sm_80", "sm_120"]
    assert document["record"]["profiles"] == [{"min": 1, "opt": 8, "max": 64}]
    assert "engines/sm_80+sm_120-rtx/model.fp16.plan" in in_a_process("inspect", bundle).out
    verified = in_a_process("verify", bundle)
    assert verified.code == 5
    assert "no backend here runs it (tensorrt-rtx: no NVIDIA GPU answers)" in verified.err
    named = in_a_process("verify", bundle, "--backend", "tensorrt-rtx")
    assert named.code == 3
    assert "the tensorrt-rtx backend does not run here: no NVIDIA GPU answers" in named.err


def test_engines_can_be_added_without_pytorch(bundle: Path) -> None:
    script = (
        "import sys; sys.modules['torch'] = None\nfrom vitdeploy.cli import main\n"
        f"sys.exit(main(['engine', {str(bundle)!r}, '--format', 'tensorrt-rtx', '--arch', 'sm_89']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "precision, size, tokens",
    [("fp16", 224, 197), ("fp16", 384, 577)],
)
def test_vit_base(tmp_path: Path, precision: Precision, size: int, tokens: int) -> None:
    batch = BatchRange(1, 8, 64)
    _, subject = open_subject(ExportRequest(model="B/16", image_size=(size, size)))
    (order,), _ = orders_of(EngineRequest(("tensorrt-rtx",), ("sm_89", "sm_80+sm_120")))
    with BundleWriter(tmp_path / "b.bundle") as writer:
        source = write_onnx(
            subject,
            PrecisionPlan.of(precision),
            writer,
            batch=batch,
            opset=20,
            example=torch.zeros(1, 3, size, size),
            requested=precision,
        )
        assert source.inputs[0].name == INPUT
        assert subject.config is not None
        assert subject.config.tokens == tokens
        weights = (writer.directory / source.path).stat().st_size
        for engine in write_engines(order, source, writer, Progress()):
            plan = writer.directory / engine.path
            proven(record_of(writer.directory, engine), precision, gemms=76, norms=25)
            assert plan.stat().st_size < 1.05 * weights


# --- what is refused ------------------------------------------------------------------------------------


def test_one_gemm_in_fp32_is_refused_and_named(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    with opened.edit() as writer:
        shutil.copyfile(bundle / "model.fp16.onnx", writer.file("model.fp16.onnx"))
        widen(writer.directory / "model.fp16.onnx", "blocks.1.mlp.fc1/MatMul")
        writer.seal(opened.manifest)
        writer.commit()
    before = sorted(path.name for path in bundle.rglob("*"))
    result = add(bundle, "--precision", "fp16", "--arch", "sm_89")
    assert result.code == 4
    assert result.err.splitlines()[-2].startswith(
        "error: an engine of model.fp16.onnx would not be fp16 everywhere: blocks.1.mlp.fc1/MatMul (float32)"
    )
    assert sorted(path.name for path in bundle.rglob("*")) == before
    Bundle.open(bundle).verify()


BAD: list[tuple[tuple[str, ...], int, str]] = [
    (("--arch", "sm_90"), 2, "TensorRT for RTX does not build for 'sm_90'; did you mean 'sm_89'?"),
    ((), 2, "TensorRT for RTX builds for the GPUs that you name"),
    (("--arch", "sm_75"), 4, "built no engine for sm_75: "),
    (("--arch", "sm_89", "--precision", "int8"), 2, "has no ONNX artifact in int8 to build engines from"),
    (("--arch", "sm_89", "--opt-level", "6"), 2, "optimization level 6 does not exist"),
    (("--arch", "sm_89", "--precision", "fp16", "--workspace", "1M"), 4, "within workspace limit"),
    (("--arch", "sm_89", "--workspace", "much"), 2, "--workspace much: not a size"),
    (("--arch", "sm_89", "--weights", "striped"), 2, "unknown weights 'striped'; did you mean 'stripped'?"),
    (("--arch", "sm_89", "--weights", "stripped"), 3, "TensorRT for RTX needs a GPU to build an engine with"),
    (("--arch", "sm_89", "--hardware-compat", "ampere_plus"), 2, "has no hardware compatibility level"),
    (("--arch", "sm_89", "--version-compatible"), 2, "builds no version-compatible engines"),
    (("--arch", "sm_89", "--profile", "1,2"), 2, "--profile 1,2: 2 numbers"),
    (("--arch", "sm_89", "--profile", "4,2,1"), 2, "batch sizes must rise"),
    (
        ("--arch", "sm_89", "--profile", "1,1,1", "--profile", "4,8,64"),
        2,
        "no profile serves batch sizes 2 to 3",
    ),
    (("--arch", "sm_89", "--batch", "1,2,4"), 2, "no such option: --batch"),
    (("--format", "onnx"), 2, "'onnx' is no format of engines"),
    (("--format", "tensort"), 2, "'tensort' is no format of engines; did you mean 'tensorrt'?"),
    (("--arch", "sm_89", "--format", "tensorrt"), 3, "a TensorRT engine needs the library 'tensorrt'"),
]


@pytest.mark.parametrize("flags, code, message", BAD)
def test_bad_input_is_one_line_and_changes_nothing(
    bundle: Path,
    unchanged: Callable[[], bool],
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    result = in_this_process(capsys, "engine", bundle, *RTX, *flags)
    assert result.code == code, result.err
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in result.err
    assert unchanged()


def test_a_fixed_batch_takes_no_other_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "fixed.bundle"
    command = ("export", "-m", "digits", "--fp16", "--batch", "4", "-o", folder)
    assert in_this_process(capsys, *command).code == 0
    refused = add(folder, "--arch", "sm_89", "--profile", "1,2,4")
    assert (refused.code, "has the fixed batch size 4" in refused.err) == (2, True)
    assert add(folder, "--arch", "sm_89").code == 0
    assert Bundle.open(folder).artifact("tensorrt-rtx-fp16-sm_89").batch == BatchRange(4, 4, 4)


def test_a_damaged_onnx_file_is_not_built_from(bundle: Path) -> None:
    path = bundle / "model.fp16.onnx"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    result = add(bundle, "--precision", "fp16", "--arch", "sm_89")
    assert result.code == 2
    assert "model.fp16.onnx changed after it was written" in result.err


def test_a_full_disk_leaves_the_bundle_as_it_was(bundle: Path, unchanged: Callable[[], bool]) -> None:
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))\n"
        "from vitdeploy.cli import main\n"
        f"sys.exit(main(['engine', {str(bundle)!r}, '--format', 'tensorrt-rtx', '--arch', 'sm_89']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"{bundle}: cannot be written: File too large" in done.stderr
    assert unchanged()


# --- interruptions --------------------------------------------------------------------------------------


def building(bundle: Path) -> subprocess.Popen[str]:
    """A build of many engines, at the moment when the first lies on the disk."""
    process = subprocess.Popen(
        [*COMMAND, "engine", bundle, *RTX, "--arch", "sm_75,sm_80,sm_86,sm_89", "--precision", "fp16"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background of a shell script has it ignored, and its children would, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not list(bundle.parent.glob(".vitdeploy-*.tmp/engines/*/*.plan")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def test_ctrl_c_leaves_no_file(bundle: Path, unchanged: Callable[[], bool]) -> None:
    process = building(bundle)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "error: interrupted by SIGINT"
    assert unchanged()


def test_a_killed_build_leaves_the_bundle_and_the_next_one_cleans_up(bundle: Path, digits_onnx: Path) -> None:
    process = building(bundle)
    process.kill()
    process.communicate(timeout=600)
    Bundle.open(bundle).verify()
    assert Bundle.open(bundle).manifest == Bundle.open(digits_onnx).manifest
    result = add(bundle, "--precision", "fp16", "--arch", "sm_89")
    assert result.code == 0, result.err
    assert list(bundle.parent.iterdir()) == [bundle]


def test_two_builds_at_once_do_not_lose_an_engine(bundle: Path) -> None:
    """The one that finishes first wins; the other says so and changes nothing."""
    slow = building(bundle)
    slow.send_signal(signal.SIGSTOP)
    quick = add(bundle, "--precision", "fp16", "--arch", "sm_120")
    slow.send_signal(signal.SIGCONT)
    _, err = slow.communicate(timeout=600)
    assert (quick.code, slow.returncode) == (0, 2), quick.err + err
    assert "somebody else changed it meanwhile" in err
    opened = Bundle.open(bundle)
    opened.verify()
    names = {artifact.name for artifact in opened.manifest.artifacts}
    assert "tensorrt-rtx-fp16-sm_120" in names
    assert "tensorrt-rtx-fp16-sm_75" not in names
