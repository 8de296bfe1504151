"""Whole exports of small models: what lands in the bundle, what falls back, what fails and leaves nothing."""

from __future__ import annotations

import copy
import dataclasses
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.helpers.models import CONFIGS, SMALL, random_state
from vitdeploy.backends.base import Options, get_backend
from vitdeploy.bundle.folder import Bundle
from vitdeploy.checkpoint.opening import Checkpoint, save_folder, user_module
from vitdeploy.checkpoint.stated import Stated
from vitdeploy.config import BatchRange, Preprocess, ViTConfig
from vitdeploy.errors import ExportError, ParityError, PrecisionError, UsageError
from vitdeploy.exporter.job import golden_arrays
from vitdeploy.exporter.request import ExportRequest
from vitdeploy.exporter.run import run_export
from vitdeploy.exporter.subject import CheckpointSubject, ModuleSubject
from vitdeploy.model.reference import forward_float64
from vitdeploy.model.registry import build_reference
from vitdeploy.progress import Progress
from vitdeploy.tensorrt.records import BuildSettings

SHALLOW = dataclasses.replace(CONFIGS["vit"], depth=2)
SINGLE = dataclasses.replace(CONFIGS["vit"], depth=1)
RANGE = BatchRange(1, 2, 4)


def folder(path: Path, config: ViTConfig, state: dict[str, torch.Tensor]) -> Path:
    """A checkpoint folder with these weights."""
    spec = Preprocess(size=config.image_size, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    labels = tuple(f"kind {i}" for i in range(config.classes)) if config.classes else None
    save_folder(Checkpoint(config, state, spec, labels, "vitdeploy", "test"), path)
    return path


def export(tmp_path: Path, config: ViTConfig, state: dict[str, torch.Tensor], **request: Any) -> Bundle:
    source = folder(tmp_path / "checkpoint", config, state)
    wanted = ExportRequest(model=source, **{"batch": RANGE, **request})
    return run_export(wanted, tmp_path / "out.bundle")


class Recorder(Progress):
    def __init__(self) -> None:
        self.stages: list[str] = []
        self.notes: list[str] = []

    def finished(self, stage: Any) -> None:
        self.stages.append(stage.name)

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Recorder]:
    """A small model, exported in three precisions, for all who only look at it."""
    path, recorder = tmp_path_factory.mktemp("shallow"), Recorder()
    source = folder(path / "checkpoint", SHALLOW, random_state(SHALLOW, spread=0.2))
    precisions = ("fp32", "fp16", "bf16")
    request = ExportRequest(model=source, batch=RANGE, precisions=precisions, command="vitdeploy export")
    return run_export(request, path / "out.bundle", progress=recorder), recorder


@pytest.mark.slow
def test_a_bundle_holds_everything_it_promises(shallow: tuple[Bundle, Recorder]) -> None:
    bundle, state = shallow[0], random_state(SHALLOW, spread=0.2)
    bundle.verify()
    manifest = bundle.manifest
    assert sorted(manifest.files) == [
        "golden.safetensors", "model.bf16.onnx", "model.fp16.onnx", "model.onnx", "weights.safetensors",
    ]  # fmt: skip
    assert [a.name for a in manifest.artifacts] == ["onnx-fp32", "onnx-fp16", "onnx-bf16"]
    assert manifest.model == SHALLOW
    assert manifest.labels is not None
    assert manifest.labels[3] == "kind 3"
    on_a_runtime = {(r.artifact, r.batch) for r in manifest.parity if r.backend != "emulation"}
    every = {(artifact.name, size) for artifact in manifest.artifacts for size in RANGE.sizes}
    # fp16 is fp32's graph on the same runtime, which has run its largest batch; bf16 needs another runtime.
    assert on_a_runtime == every - {("onnx-fp16", RANGE.max)}
    rounded = {r.artifact for r in manifest.parity if r.backend == "emulation"}
    assert rounded == {"onnx-fp16", "onnx-bf16"}
    assert all(r.passed and r.metrics.elements for r in manifest.parity)
    assert all(a.proof is not None and a.proof.ok for a in manifest.artifacts)
    saved = load_file(bundle.path("weights.safetensors"))
    assert set(saved) == set(state)
    assert all(torch.equal(saved[name], tensor) for name, tensor in state.items())
    assert manifest.provenance.versions["torch"]
    assert manifest.provenance.command == "vitdeploy export"
    assert "model.safetensors" in manifest.provenance.source_files


@pytest.mark.slow
def test_golden_outputs_are_the_float64_references(shallow: tuple[Bundle, Recorder]) -> None:
    golden = shallow[0].golden()
    vit = build_reference(SHALLOW, {n: t.double() for n, t in random_state(SHALLOW, spread=0.2).items()})
    with torch.inference_mode():
        expected = vit(torch.from_numpy(golden["pixel_values"]).double())
    np.testing.assert_allclose(golden["reference"], expected.numpy(), rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float", "uint8"])
def test_input_kinds_agree_on_the_same_images(
    tmp_path: Path, shallow: tuple[Bundle, Recorder], kind: str
) -> None:
    bundle = shallow[0]
    if kind == "uint8":
        bundle = export(tmp_path, SHALLOW, random_state(SHALLOW, spread=0.2), input=kind)
    golden = bundle.golden()
    if kind == "uint8":
        assert golden["pixel_values"].dtype == np.uint8
        assert golden["pixel_values"].shape[1:] == (32, 48, 3)
        assert bundle.manifest.artifacts[0].inputs[0].dtype == "uint8"
    spec = bundle.manifest.preprocess
    assert spec is not None
    from vitdeploy.bundle.golden import golden_images

    raw = np.stack(golden_images((32, 48))).astype(np.float64)
    normalised = (raw / 255 - np.array(spec.mean)) / np.array(spec.std)
    vit = build_reference(SHALLOW, random_state(SHALLOW, spread=0.2))
    expected = forward_float64(vit, torch.from_numpy(normalised).permute(0, 3, 1, 2))
    np.testing.assert_allclose(golden["reference"], expected.numpy(), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("output", ["features", "tokens"])
def test_other_outputs(tmp_path: Path, output: str) -> None:
    bundle = export(tmp_path, SINGLE, random_state(SINGLE, spread=0.2), output=output)
    artifact = bundle.artifact("fp32")
    assert artifact.outputs[0].name == output
    assert artifact.outputs[0].shape == (("N", 48) if output == "features" else ("N", SINGLE.tokens, 48))
    assert bundle.manifest.labels is None


def massive(config: ViTConfig) -> dict[str, torch.Tensor]:
    """Weights with the massive activations of large ViTs: one channel of the residual stream beyond fp16."""
    state = random_state(config, spread=0.2)
    for name in ("attn.proj", "mlp.fc2"):
        state[f"blocks.0.{name}.bias"][7] = 60_000.0
    for name in state:
        if "norm" in name and name.endswith("weight") and not name.startswith("blocks.0"):
            state[name][7] = 0.0
    return state


@pytest.mark.slow
def test_massive_activations_are_caught_and_exported_with_the_fewest_islands(tmp_path: Path) -> None:
    config = CONFIGS["vit"]
    bundle = export(tmp_path, config, massive(config), precisions=("fp16",))
    (artifact,) = bundle.manifest.artifacts
    assert (artifact.path, artifact.precision, artifact.requested) == ("model.mixed.onnx", "mixed", "fp16")
    added = set(artifact.islands) - {f"blocks.{i}.norm{k}" for i in range(3) for k in (1, 2)} - {"norm"}
    assert added == {"blocks.0.add2", "blocks.1.add1", "blocks.1.add2", "blocks.2.add1", "blocks.2.add2"}
    assert artifact.fallback is not None
    assert "blocks.0.add2" in artifact.fallback
    assert "65504" in artifact.fallback
    assert artifact.proof is not None
    gemms = [row for row in artifact.proof.ops if row.op in ("MatMul", "Gemm")]
    assert all(row.dtype == "float16" for row in gemms)
    assert all(record.passed for record in bundle.manifest.parity)
    assert not (bundle.root / "model.fp16.onnx").exists()


@pytest.mark.slow
def test_without_fallback_the_same_model_fails_and_leaves_nothing(tmp_path: Path) -> None:
    config = CONFIGS["vit"]
    with pytest.raises(ParityError, match="fp16 does not compute what the checkpoint computes") as caught:
        export(tmp_path, config, massive(config), precisions=("fp16",), fallback=False)
    assert caught.value.exit_code == 5
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.slow
def test_where_no_islands_help_bf16_takes_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block's MLP overflows on its way and none at its end: more sites than islands are worth."""
    config = dataclasses.replace(CONFIGS["vit"], depth=4, width=24, mlp_width=24)
    monkeypatch.setattr("vitdeploy.exporter.fallback.MOST_BRANCHES", 2)
    state = random_state(config, spread=0.1)
    for i in range(config.depth):
        state[f"blocks.{i}.mlp.fc1.bias"][0] = 60_000.0
        state[f"blocks.{i}.norm2.bias"][0] = 60_000.0
        state[f"blocks.{i}.mlp.fc1.weight"][0, 0] = 1.0
        state[f"blocks.{i}.mlp.fc2.weight"][:, 0] = 0.0
        state[f"blocks.{i}.mlp.fc1.weight"][1:, 0] = 0.0
    bundle = export(tmp_path, config, state, precisions=("fp16",))
    (artifact,) = bundle.manifest.artifacts
    assert (artifact.path, artifact.requested) == ("model.bf16.onnx", "fp16")
    assert "no few fp32 islands help" in (artifact.fallback or "")


def beyond_fp16() -> dict[str, torch.Tensor]:
    """Healthy activations, and weights of 1e5 that hardly touch them: the inputs of theirs are small."""
    state = random_state(SINGLE, spread=0.2)
    state["head.weight"][0, 0], state["blocks.0.mlp.fc2.weight"][3, 5] = 1e5, -1e5
    state["norm.weight"][0] = state["norm.bias"][0] = 1e-5
    state["blocks.0.mlp.fc1.weight"][5], state["blocks.0.mlp.fc1.bias"][5] = 0.0, 2e-5
    return state


@pytest.mark.slow
def test_weights_beyond_fp16_stay_in_fp32(tmp_path: Path) -> None:
    bundle = export(tmp_path, SINGLE, beyond_fp16(), precisions=("fp16",))
    (artifact,) = bundle.manifest.artifacts
    assert (artifact.path, artifact.precision, artifact.requested) == ("model.mixed.onnx", "mixed", "fp16")
    assert set(artifact.islands) - {"blocks.0.norm1", "blocks.0.norm2", "norm"} == {
        "blocks.0.mlp.fc2",
        "head",
    }
    assert "weights do not fit into float16" in (artifact.fallback or "")
    assert "blocks.0.mlp.fc2 has a weight of 100000, beyond the dtype's 65504" in (artifact.fallback or "")
    assert artifact.proof is not None
    wide = {row.name for row in artifact.proof.ops if row.op in ("MatMul", "Gemm") and row.dtype == "float32"}
    assert wide == {"blocks.0.mlp.fc2/Gemm", "head/Gemm"}
    assert all(record.passed for record in bundle.manifest.parity)


@pytest.mark.slow
def test_weights_beyond_fp16_are_named_where_no_fallback_is_wanted(tmp_path: Path) -> None:
    state = random_state(SINGLE, spread=0.2)
    state["head.weight"][0, 0] = 1e5
    with pytest.raises(PrecisionError, match=r"head\.weight \(largest magnitude 100000\)") as caught:
        export(tmp_path, SINGLE, state, precisions=("fp32", "fp16"), fallback=False)
    assert "--bf16" in (caught.value.hint or "")
    assert not (tmp_path / "out.bundle").exists()


class Conv(nn.Module):
    """Some module that is no ViT."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, stride=4)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.conv(x).flatten(2).mean(dim=2)
        return {"logits": self.head(self.norm(x))}


@pytest.mark.slow
def test_any_module_takes_the_generic_path(tmp_path: Path) -> None:
    torch.manual_seed(0)
    request = ExportRequest(model=Conv(), image_size=(32, 32), batch=RANGE, precisions=("fp32", "fp16"))
    bundle = run_export(request, tmp_path / "out.bundle")
    assert bundle.manifest.model is None
    assert bundle.artifact("fp16").islands == ("module.norm",)
    assert all(record.passed for record in bundle.manifest.parity)
    with get_backend("onnxruntime").load(bundle, bundle.artifact("fp32"), Options()) as session:
        x = np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)
        got = session.run({"pixel_values": x})["logits"]
    torch.manual_seed(0)
    with torch.inference_mode():
        expected = Conv().eval()(torch.from_numpy(x))["logits"].numpy()
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_a_preprocessing_of_other_channels_is_refused() -> None:
    config = dataclasses.replace(SINGLE, channels=1)
    checkpoint = Checkpoint(config, random_state(config), Preprocess(config.image_size), None, "vit", "grey")
    with pytest.raises(UsageError, match="its preprocessing is for 3 channels, but the model has 1"):
        CheckpointSubject(checkpoint, (), "float")


class Necked(nn.Module):
    """The first convolution that it registers is not the first that it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.neck, self.stem = nn.Conv2d(8, 5, 1), nn.Conv2d(3, 8, 4, stride=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.neck(self.stem(x)).mean(dim=(2, 3))


@pytest.mark.slow
def test_the_channels_of_any_module() -> None:
    grey, bands = Conv(), Conv()
    grey.conv, bands.conv = nn.Conv2d(1, 8, 4, stride=4), nn.Conv2d(7, 8, 4, stride=4)
    for module, channels in ((Conv(), 3), (grey, 1), (bands, 7), (Necked(), 3), (nn.Linear(7, 3), 3)):
        user = user_module(module, "mine", (32, 32), Stated())
        subject = ModuleSubject(user, (), "float")
        assert subject.preprocess.channels == channels
        if channels == 1:
            assert any("images become grey" in note for note in user.notes)
        if not isinstance(module, nn.Linear):
            arrays = golden_arrays(subject)
            assert arrays["pixel_values"].shape == (8, channels, 32, 32)
            with torch.inference_mode():
                exact = copy.deepcopy(module).double()(torch.from_numpy(arrays["pixel_values"]).double())
            exact = exact["logits"] if isinstance(exact, dict) else exact
            assert np.array_equal(arrays["reference"], exact.numpy())


class Overflowing(Conv):
    """Far beyond fp16 in the middle, and back again before the end."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.conv(x).flatten(2).mean(dim=2) + 1.0
        x = (x * 300) * 300
        x.mul_(1 / 90_000)
        return {"logits": self.head(self.norm(x))}


@pytest.mark.slow
def test_an_overflow_that_cpu_runtimes_hide_is_caught_in_any_module(tmp_path: Path) -> None:
    torch.manual_seed(0)
    request = ExportRequest(model=Overflowing(), image_size=(32, 32), batch=RANGE, precisions=("fp16",))
    with pytest.raises(ExportError, match="bfloat16") as caught:  # what a convolution takes from opset 22 on
        run_export(request, tmp_path / "out.bundle")
    assert "--opset" in (caught.value.hint or "")
    bundle = run_export(dataclasses.replace(request, opset=22), tmp_path / "out.bundle")
    (artifact,) = bundle.manifest.artifacts
    assert (artifact.path, artifact.requested) == ("model.bf16.onnx", "fp16")
    assert "emulation" in (artifact.fallback or "")


def test_a_module_that_does_not_run_says_what_it_was_given(tmp_path: Path) -> None:
    request = ExportRequest(model=nn.Linear(7, 3), image_size=(32, 32))
    with pytest.raises(ExportError, match=r"does not run on a \(8, 3, 32, 32\) tensor"):
        run_export(request, tmp_path / "out.bundle")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"precisions": ("fp61",)}, "unknown precision 'fp61'; did you mean 'fp16'"),
        ({"formats": ("onnx",), "profiles": (BatchRange(1, 1, 1),)}, "no format makes any"),
        ({"formats": ("onnx",), "settings": BuildSettings(level=3)}, "no format makes any"),
        ({"formats": ("onx",)}, "unknown format 'onx'; did you mean 'onnx'"),
        ({"opset": 16}, "opset 16 is not supported"),
        ({"atol": -1.0}, "atol must be positive"),
        ({"output": "logit"}, "unknown output 'logit'; did you mean 'logits'"),
        ({"input": "int8"}, "unknown input 'int8'; did you mean 'uint8'"),
    ],
)
def test_wrong_requests_fail_before_any_work(tmp_path: Path, wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        run_export(ExportRequest(model="digits", **wrong), tmp_path / "out.bundle")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_absolute_bound_gates_too(tmp_path: Path) -> None:
    with pytest.raises(ParityError):
        export(tmp_path, SINGLE, random_state(SINGLE, spread=0.2), atol=1e-12)


@pytest.mark.slow
def test_an_absolute_bound_gates_the_rehearsal_before_anything_is_built(tmp_path: Path) -> None:
    state = random_state(SHALLOW, spread=0.2)
    with pytest.raises(ParityError, match=r"onnx-fp16 on emulation.*max abs error"):
        export(tmp_path, SHALLOW, state, precisions=("fp16",), atol=1e-12, fallback=False)


@pytest.mark.slow
def test_stages_are_told_in_order(shallow: tuple[Bundle, Recorder]) -> None:
    assert shallow[1].stages == [
        *("load", "reference", "weights", "onnx fp32", "parity fp32"),
        *("round as fp16", "onnx fp16", "parity fp16", "round as bf16", "onnx bf16", "parity bf16"),
    ]


def _names(where: Path) -> list[str]:
    return sorted(path.name for path in where.iterdir())


@pytest.mark.slow
def test_killed_at_any_moment_there_is_no_bundle_or_a_whole_one(tmp_path: Path) -> None:
    source = folder(tmp_path / "checkpoint", SHALLOW, random_state(SHALLOW, spread=0.2))
    target = tmp_path / "out.bundle"
    script = (
        "import sys; from vitdeploy.cli import main; print('begin', file=sys.stderr, flush=True); "
        f"sys.exit(main(['export', '-m', {str(source)!r}, '-o', {str(target)!r}]))"
    )
    for moment, how in (
        ("begin", signal.SIGINT),
        ("load", signal.SIGKILL),
        ("weights", signal.SIGKILL),
        ("parity", signal.SIGKILL),
    ):
        process = subprocess.Popen(
            [sys.executable, "-c", script],
            stderr=subprocess.PIPE,
            text=True,
            # A test run in the background of a shell script has it ignored, and its children would, too.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert process.stderr is not None
        for line in process.stderr:
            if line.split()[0] == moment:
                break
        process.send_signal(how)
        process.communicate(timeout=600)
        if target.exists():
            Bundle.open(target).verify()
        if how == signal.SIGINT:
            assert process.returncode in (130, -signal.SIGINT), "before the command listens, Python ends"
            assert _names(tmp_path) == ["checkpoint"]
    run_export(ExportRequest(model=source, batch=RANGE), target, force=True).verify()
    assert _names(tmp_path) == ["checkpoint", "out.bundle"], "the next export cleans up"


def test_the_small_configuration_is_what_the_tests_think() -> None:
    assert SMALL["image_size"] == (32, 48)
