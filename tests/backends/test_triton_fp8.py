"""An fp8 artifact on the fused kernels, against ONNX Runtime on the same file and against float64."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file

from tests.backends.test_triton import SWIN, provider  # noqa: F401  (a fixture)
from tests.helpers.models import CONFIGS, pixels, random_state, random_vit
from tests.helpers.quantised import graph_of
from tests.helpers.weights_bundles import artifact
from vitdeploy.backends import triton as module
from vitdeploy.backends.base import Options
from vitdeploy.backends.triton import Triton
from vitdeploy.bundle.folder import WEIGHTS, Bundle, BundleWriter
from vitdeploy.bundle.fp8_gemms import Fp8Gemm, read_fp8_gemms
from vitdeploy.bundle.manifest import Artifact, Manifest, Provenance
from vitdeploy.bundle.quantisation import QuantisationRecord
from vitdeploy.config import Precision, Preprocess
from vitdeploy.errors import BundleError, DeviceUnavailable, UsageError
from vitdeploy.model.fused import fuse
from vitdeploy.model.fused_fp8 import with_fp8
from vitdeploy.model.precision import PrecisionPlan
from vitdeploy.model.reference import forward_float64
from vitdeploy.model.rewrites import deploy
from vitdeploy.quantisation.deviation import Deviation
from vitdeploy.quantisation.qdq import insert
from vitdeploy.quantisation.recipe import quantise
from vitdeploy.quantisation.sites import QuantisedModel
from vitdeploy_kernels.fp8 import Fp8Linear, scaled_mm

Array = np.ndarray[Any, Any]
CONFIG = dataclasses.replace(CONFIGS["vit"], depth=3)
FILE = "model.fp8.onnx"
SPREAD = 0.1
"""Of the weights: with larger ones, attention hangs on a single rounding."""


@pytest.fixture(scope="module")
def made() -> QuantisedModel:
    """By the recipe, nothing left out."""
    model = deploy(random_vit(CONFIG, spread=SPREAD), PrecisionPlan.of("fp32"), outputs=(CONFIG.outputs[0],))
    return quantise(model, pixels(CONFIG, 16, seed=5), kind="fp8", target=Deviation(9.0, 9.0))


def bundle_of(folder: Path, made: QuantisedModel, rest: Precision, sites: tuple[str, ...]) -> Bundle:
    """A bundle with the weights and the file of these sites."""
    graph = graph_of(made, CONFIG, rest)
    insert(graph, {name: made.sites[name] for name in sites}, rest)
    record = QuantisationRecord(rest=rest, weight_bits=8, sites=sites, macs=0.9, images=16)
    update = {"path": FILE, "files": (FILE,), "quantisation": record}
    size = Preprocess(size=CONFIG.image_size, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    with BundleWriter(folder, force=True) as writer:
        save_file(random_state(CONFIG, spread=SPREAD), writer.file(WEIGHTS))
        ir.save(graph, writer.file(FILE))
        writer.seal(
            Manifest(
                name="tiny",
                created="2026-11-21T03:00:00Z",
                generator="vitdeploy 0.1.0",
                provenance=Provenance(source="tiny", family="vit"),
                model=CONFIG,
                output=CONFIG.outputs[0],
                preprocess=size,
                artifacts=(artifact("fp8").model_copy(update=update),),
            )
        )
        return writer.commit()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, made: QuantisedModel) -> Bundle:
    return bundle_of(tmp_path_factory.mktemp("fp8") / "b.bundle", made, "fp32", tuple(made.sites))


def on_onnxruntime(bundle: Bundle, images: Array, *values: str) -> list[Array]:
    """The answers of the artifact's own file, without fusions; or values inside of it."""
    model = onnx.load(bundle.path(FILE))
    for name in values:
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    settings = onnxruntime.SessionOptions()
    settings.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), settings)
    found: list[Array] = session.run(list(values) or None, {"pixel_values": images})
    return found


def apart(actual: Array, expected: Array) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def only(bundle: Bundle) -> Artifact:
    (found,) = bundle.manifest.artifacts
    return found


@pytest.mark.slow
def test_the_artifact_answers_as_it_does_in_onnx_runtime(
    bundle: Bundle,
    tmp_path: Path,
    made: QuantisedModel,
    provider: str,  # noqa: F811
) -> None:
    images = pixels(CONFIG, 4)
    exact = forward_float64(random_vit(CONFIG, spread=SPREAD), images).numpy()
    (theirs,) = on_onnxruntime(bundle, images.numpy())
    half = bundle_of(tmp_path / "half.bundle", made, "fp16", tuple(made.sites))
    (by_half,) = on_onnxruntime(half, images.numpy())
    with Triton().load(bundle, only(bundle), Options()) as session:
        (ours,) = session.run({"pixel_values": images.numpy()}).values()
        facts = session.facts
    # fp16 around the products turns some roundings, each a sixteenth of a number: as many as in ONNX Runtime.
    assert apart(ours, theirs) < 1.5 * apart(by_half, theirs)
    assert apart(ours, exact) < 1.5 * apart(theirs, exact) < 0.12
    assert facts.precision == "fp8"
    assert facts.executes == ("fp16" if provider == "interpreter" else "fp8, the rest in fp16")
    assert any("attn.qkv of 2 blocks: fp8 product in torch" in line for line in facts.fusion), facts.fusion


@pytest.mark.slow
@pytest.mark.parametrize("left_out", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
def test_sites_that_were_left_out_stay_float(
    tmp_path: Path,
    made: QuantisedModel,
    provider: str,  # noqa: F811
    left_out: str,
) -> None:
    gone = {f"blocks.0.{left_out}", "blocks.1.attn.qkv"}
    sites = tuple(name for name in made.sites if name not in gone)
    bundle = bundle_of(tmp_path / "b.bundle", made, "fp32", sites)
    images = pixels(CONFIG, 2)
    with Triton().load(bundle, only(bundle), Options()) as session:
        (ours,) = session.run({"pixel_values": images.numpy()}).values()
    exact = forward_float64(random_vit(CONFIG, spread=SPREAD), images).numpy()
    assert apart(ours, exact) < 0.1


@pytest.mark.parametrize("rest", ["fp32", "fp16"])
def test_every_product_is_the_files_own(tmp_path: Path, made: QuantisedModel, rest: Precision) -> None:
    """From what ONNX Runtime quantised: its rounding is ours, and its product is ours to float32's sums."""
    bundle = bundle_of(tmp_path / "b.bundle", made, rest, tuple(made.sites))
    gemms = read_fp8_gemms(bundle.path(FILE), made.sites)
    shared = fuse(random_vit(CONFIG, spread=SPREAD), torch.float16)
    model = with_fp8(shared, random_vit(CONFIG, spread=SPREAD), gemms, "cpu")
    images = pixels(CONFIG, 2).numpy()
    names = [(f"{site}/DequantizeLinear", f"{site}/Add") for site in made.sites]
    seen = on_onnxruntime(bundle, images, *(name for pair in names for name in pair))
    for number, (site, gemm) in enumerate(gemms.items()):
        assert gemm.input_scale == pytest.approx(made.sites[site].input_scale, rel=1e-3)
        read, answer = seen[2 * number], seen[2 * number + 1]
        _, index, _, field = site.split(".")
        linear = getattr(model.weights.blocks[int(index)], field)  # type: ignore[union-attr]
        assert isinstance(linear, Fp8Linear)
        steps = torch.from_numpy(read.astype(np.float32).reshape(-1, read.shape[-1])) / gemm.input_scale
        out = torch.empty(len(steps), linear.weight.shape[1], dtype=torch.float16)
        scaled_mm(steps.to(torch.float8_e4m3fn), linear, out)
        assert apart(out.float().numpy(), answer.reshape(out.shape).astype(np.float32)) < 1e-3


def gemm(*size: int) -> Fp8Gemm:
    return Fp8Gemm(np.zeros(size, np.uint8), 1.0, 1.0, None)


def test_what_has_no_route_is_named() -> None:
    vit = random_vit(CONFIG, spread=SPREAD)
    model = fuse(vit, torch.float16)
    with pytest.raises(UsageError, match=r"no fp8 route for blocks\.2\.attn\.q, patch_embed"):
        with_fp8(model, vit, {"patch_embed": gemm(192, 48), "blocks.2.attn.q": gemm(48, 48)}, "cpu")
    with pytest.raises(
        BundleError, match=r"blocks\.0\.attn\.qkv is \(48, 48\) in the artifact, not \(48, 144\)"
    ):
        with_fp8(model, vit, {"blocks.0.attn.qkv": gemm(48, 48)}, "cpu")
    narrow = random_vit(dataclasses.replace(CONFIG, mlp_width=100))
    with pytest.raises(UsageError, match=r"sizes that 16 divides, and blocks\.0\.mlp\.fc1 is \(48, 100\)"):
        with_fp8(fuse(narrow, torch.float16), narrow, {"blocks.0.mlp.fc1": gemm(48, 100)}, "cpu")
    normed = random_vit(dataclasses.replace(CONFIG, mlp_norm=True))
    with pytest.raises(UsageError, match="behind the LayerNorm inside of an MLP"):
        with_fp8(fuse(normed, torch.float16), normed, {"blocks.0.mlp.fc2": gemm(96, 48)}, "cpu")


def test_a_site_that_is_no_fp8_product_is_named(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"has no fp8 product of head"):
        read_fp8_gemms(bundle.path(FILE), ["blocks.0.attn.qkv", "head"])
    junk = tmp_path / "junk.onnx"
    junk.write_bytes(b"junk")
    with pytest.raises(BundleError, match=r"junk\.onnx: not a readable ONNX file"):
        read_fp8_gemms(junk, ["head"])


def test_who_has_no_fp8_is_refused(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = bundle.manifest.model_copy(update={"model": SWIN})
    assert Triton().supports(manifest, only(bundle)) == "it has no fp8 kernels for swin"
    assert Triton().supports(bundle.manifest, only(bundle)) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(DeviceUnavailable, match=r"fp8 needs compute capability 8\.9, and cuda has 8\.6"):
        module._check_fp8(torch, only(bundle), "cuda")
