"""The fused kernels as a backend: whole models in Triton's interpreter, against the float64 reference."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests.fakes.torch_events import CudaClock
from tests.helpers import interpreter
from tests.helpers.models import CONFIGS, pixels, random_vit
from tests.helpers.weights_bundles import CONFIG, SPEC, artifact, golden
from vitdeploy.backends import triton as module
from vitdeploy.backends.base import Options, get_backend
from vitdeploy.backends.triton import Triton
from vitdeploy.bundle.dtypes import ArtifactPrecision
from vitdeploy.bundle.folder import WEIGHTS, Bundle
from vitdeploy.cli import main
from vitdeploy.config import SwinConfig
from vitdeploy.errors import DeviceUnavailable, MissingDependency, UsageError
from vitdeploy.machine.gpus import Gpu
from vitdeploy.model.reference import forward_float64
from vitdeploy.verification.parity import check_session

Make = Callable[..., Bundle]

IMAGES = 2
"""That outputs are held against the reference of: the interpreter takes seconds for each."""


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def provider(request: pytest.FixtureRequest) -> Iterator[str]:
    """The CPU in a GPU's place, or a GPU with ``pytest -m gpu``."""
    name = str(request.param)
    if name == "cuda":
        yield name
        return
    if interpreter.ON_GPU:
        pytest.skip("a GPU is here: `pytest -m gpu` runs this test on it")
    with interpreter.environment():
        yield name


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, c in CONFIGS.items() if not c.beyond_kernels(c.outputs[0])])
def test_every_family_gives_the_reference(weights_bundle: Make, name: str, provider: str) -> None:
    config = dataclasses.replace(CONFIGS[name], depth=2)
    with Triton().load(weights_bundle(config), None, Options()) as session:
        (record,) = check_session(session, golden(config, count=IMAGES), batches=[3])
        assert record.failures == ()
        assert (session.facts.precision, session.facts.provider) == ("fp16", provider)
        fused = config.rotary is None and name != "distilled"
        assert any("attention: 2/2 blocks fused" in line for line in session.facts.fusion) == fused, (
            session.facts.fusion
        )
        assert any("first norm: fused" in line for line in session.facts.fusion) == config.pre_norm


# Heads of 16 columns, which is the least that the attention kernel takes.
SWIN = SwinConfig(
    image_size=(16, 24),
    patch_size=2,
    width=32,
    depths=(2, 3),
    heads=(2, 4),
    windows=((4, 4), (2, 3)),
    shifts=((2, 2), (1, 1)),
    window_rule="sides",
    classes=5,
)


@pytest.mark.slow
@pytest.mark.parametrize("output", ["logits", "tokens"])
def test_a_swin_gives_the_reference(weights_bundle: Make, provider: str, output: str) -> None:
    with Triton().load(weights_bundle(SWIN, output=output), None, Options()) as session:
        (record,) = check_session(session, golden(SWIN, output, count=IMAGES), batches=[2])
        assert record.failures == ()
        lines = session.facts.fusion
    assert any(
        "attention: 5/5 blocks fused (layernorm_linear, attention, linear_residual)" in it for it in lines
    )
    assert "  order of 3 blocks: gather in torch: no fused kernel moves tokens" in lines


@pytest.mark.slow
@pytest.mark.usefixtures("provider")
def test_a_swin_of_raw_pixels(weights_bundle: Make) -> None:
    images = np.random.default_rng(0).integers(0, 256, size=(2, *SWIN.image_size, 3), dtype=np.uint8)
    mean, std = (np.array(numbers, dtype=np.float32).reshape(3, 1, 1) for numbers in (SPEC.mean, SPEC.std))
    exact = torch.from_numpy((images.transpose(0, 3, 1, 2) / np.float32(255) - mean) / std)
    expected = forward_float64(random_vit(SWIN), exact).numpy()
    with Triton().load(weights_bundle(SWIN, input="uint8"), None, Options()) as session:
        (answer,) = session.run({session.facts.inputs[0].name: images}).values()
    assert np.linalg.norm(answer - expected) / np.linalg.norm(expected) < 5e-3


@pytest.mark.parametrize(
    "changes, what",
    [
        ({"image_size": (20, 24)}, "windows that do not divide their map, which is padded"),
        ({"version": 2}, "the cosine attention of Swin v2"),
    ],
)
def test_what_of_a_swin_has_no_kernels_is_named(
    weights_bundle: Make, changes: dict[str, Any], what: str
) -> None:
    manifest = weights_bundle(dataclasses.replace(SWIN, **changes)).manifest
    assert Triton().supports(manifest, None) == f"it has no kernels for {what}"


@pytest.mark.slow
@pytest.mark.usefixtures("provider")
@pytest.mark.parametrize(
    "name, output",
    [("clip", "embedding"), ("beit_codes", "features"), ("dinov3", "features"), ("blip", "tokens")],
)
def test_other_outputs_of_other_families(weights_bundle: Make, name: str, output: str) -> None:
    config = dataclasses.replace(CONFIGS[name], depth=2)
    with Triton().load(weights_bundle(config, output=output), None, Options()) as session:
        (record,) = check_session(session, golden(config, output, count=IMAGES), batches=[2])
        assert record.failures == ()


@pytest.mark.parametrize(
    "name, output, refused",
    [
        ("mean_of_unnormalised", "logits", True),
        ("vit", "layer_1", True),
        ("clip", "tokens", True),
        ("clip", "features", False),
        ("mean", "tokens", False),
    ],
)
def test_tokens_without_the_final_norm_are_refused(
    weights_bundle: Make, name: str, output: str, refused: bool
) -> None:
    manifest = weights_bundle(CONFIGS[name], output=output).manifest
    reason = Triton().supports(manifest, None)
    assert reason == ("it has no kernels for tokens without the final norm" if refused else None)


@pytest.mark.slow
@pytest.mark.usefixtures("provider")
@pytest.mark.parametrize("output", ["features", "tokens"])
def test_other_outputs(weights_bundle: Make, output: str) -> None:
    config = dataclasses.replace(CONFIG, depth=2)
    with Triton().load(weights_bundle(config, output=output), None, Options()) as session:
        (record,) = check_session(session, golden(config, output, count=IMAGES), batches=[2])
        assert record.failures == ()
        assert any("head: LayerNorm, pooling and head in torch" in line for line in session.facts.fusion)


@pytest.mark.slow
@pytest.mark.usefixtures("provider")
@pytest.mark.parametrize("precision, batches", [("fp16", [1, 2, 4]), ("bf16", [4])])
def test_the_artifacts_precision_and_batches(
    weights_bundle: Make, precision: ArtifactPrecision, batches: list[int]
) -> None:
    with Triton().load(weights_bundle(), artifact(precision), Options()) as session:
        records = check_session(session, golden(count=IMAGES), batches=batches)
        assert not any(record.failures for record in records)
        assert [record.batch for record in records] == batches
        assert session.facts.executes == session.facts.precision == precision
        with pytest.raises(UsageError, match=f"onnx-{precision} serves 1 to 4"):
            session.run({"pixel_values": pixels(CONFIG, 5).numpy()})
    assert records[0].metrics.relative is not None
    assert records[0].metrics.relative > {"fp16": 1e-5, "bf16": 1e-4}[precision]  # it did round


@pytest.mark.slow
@pytest.mark.usefixtures("provider")
def test_uint8_images(weights_bundle: Make) -> None:
    images = np.random.default_rng(0).integers(0, 256, size=(3, *CONFIG.image_size, 3), dtype=np.uint8)
    exact = (images / 255 - np.array(SPEC.mean)) / np.array(SPEC.std)
    reference = forward_float64(random_vit(CONFIG), torch.from_numpy(exact.transpose(0, 3, 1, 2)))
    with Triton().load(weights_bundle(input="uint8"), None, Options()) as session:
        arrays = {"pixel_values": images, "reference": reference.numpy()}
        assert all(record.passed for record in check_session(session, arrays, batches=[3]))


@pytest.mark.slow
@pytest.mark.usefixtures("provider")
@pytest.mark.parametrize("channels, kind", [(1, "float"), (4, "uint8")])
def test_other_channels(weights_bundle: Make, channels: int, kind: str) -> None:
    config = dataclasses.replace(CONFIG, channels=channels, depth=1)
    mean, std = (0.4, 0.5, 0.6, 0.3)[:channels], (0.2, 0.25, 0.3, 0.35)[:channels]
    spec = dataclasses.replace(SPEC, mean=mean, std=std)
    images = np.random.default_rng(0).integers(0, 256, size=(2, *config.image_size, channels), dtype=np.uint8)
    exact = ((images / 255 - np.array(mean)) / np.array(std)).transpose(0, 3, 1, 2)
    reference = forward_float64(random_vit(config), torch.from_numpy(exact))
    given = images if kind == "uint8" else np.ascontiguousarray(exact, dtype=np.float32)
    with Triton().load(weights_bundle(config, preprocess=spec, input=kind), None, Options()) as session:
        arrays = {"pixel_values": given, "reference": reference.numpy()}
        assert all(record.passed for record in check_session(session, arrays, batches=[2]))


@pytest.mark.slow
@pytest.mark.usefixtures("provider")
def test_a_batch_between_buckets_is_padded_and_nan_stays_in_its_image(weights_bundle: Make) -> None:
    images = pixels(CONFIG, 3).numpy()
    poisoned = images.copy()
    poisoned[1, 0, 5, 7] = np.nan
    with Triton().load(weights_bundle(), artifact("fp16"), Options()) as session:
        clean = session.run({"pixel_values": images})["logits"]
        dirty = session.run({"pixel_values": poisoned})["logits"]
        again = session.run({"pixel_values": images})["logits"]
    assert np.isnan(dirty[1]).all()
    np.testing.assert_array_equal(dirty[[0, 2]], clean[[0, 2]])
    np.testing.assert_array_equal(again, clean)


def test_reasons_why_not(weights_bundle: Make, make_bundle: Any) -> None:
    own = make_bundle()
    assert "a module of the user's own" in str(Triton().supports(own.manifest, None))
    with_model = own.manifest.model_copy(update={"model": CONFIG})
    assert Triton().supports(with_model, None) == f"the bundle has no {WEIGHTS}"
    manifest = weights_bundle().manifest
    assert "fp32 islands" in str(Triton().supports(manifest, artifact("mixed")))
    assert "computes in fp16, bf16 or fp8, and onnx-fp32 is fp32" in str(
        Triton().supports(manifest, artifact("fp32"))
    )
    assert Triton().supports(manifest, artifact("bf16")) is None
    with pytest.raises(UsageError, match="takes no provider"):
        Triton().load(weights_bundle(), None, Options(provider="cpu"))


@pytest.mark.skipif(interpreter.ON_GPU, reason="a GPU is here")
def test_without_a_gpu_it_says_what_is_missing(
    weights_bundle: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    state = get_backend("triton").availability()
    assert not state.ok
    assert state.reason == "no NVIDIA GPU answers"
    assert "TRITON_INTERPRET=1" in str(state.hint)
    bundle = weights_bundle()
    with pytest.raises(DeviceUnavailable, match="no NVIDIA GPU"):
        Triton().load(bundle, None, Options())
    assert main(["verify", str(bundle.root), "--backend", "triton"]) == 3
    assert "the triton backend does not run here: no NVIDIA GPU answers" in capsys.readouterr().err


def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_gpus", lambda: [Gpu("old", (7, 5))])
    assert "need compute capability 8.0, this GPU has 7.5" in Triton().availability().reason
    monkeypatch.setattr(module, "find_gpus", lambda: [Gpu("old", (7, 5)), Gpu("new", (9, 0))])
    assert Triton().availability().ok


@pytest.mark.parametrize("missing", ["torch", "triton"])
def test_a_missing_library_names_the_extra(
    weights_bundle: Make, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    bundle = weights_bundle()
    real = module.importlib.util.find_spec
    monkeypatch.setattr(
        module.importlib.util, "find_spec", lambda name: None if name == missing else real(name)
    )
    monkeypatch.setitem(sys.modules, missing, None)
    state = Triton().availability()
    assert (state.reason, state.hint) == (f"{missing} is not installed", 'pip install "vitdeploy[kernels]"')
    with pytest.raises(MissingDependency, match=missing):
        Triton().load(bundle, None, Options())


def test_time_on_the_gpu(
    weights_bundle: Make, cuda_clock: CudaClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session of a GPU, with something quicker in the kernels' place."""

    class Runner:
        report: tuple[str, ...] = ()

        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            cuda_clock.now += 0.25
            return torch.zeros(len(images), CONFIG.classes)

    monkeypatch.setattr(module, "_runner", lambda *_: Runner())
    with interpreter.environment(), Triton().load(weights_bundle(), None, Options()) as session:
        session.timed = True
        session.run({"pixel_values": pixels(CONFIG, 1).numpy()})
        assert session.device_seconds is None  # the interpreter runs on the CPU
        session.facts = dataclasses.replace(session.facts, device="cuda:0")
        session.run({"pixel_values": pixels(CONFIG, 1).numpy()})
        assert session.device_seconds == 0.25
