"""Planted faults, and the check that catches each: a gate that has never failed proves nothing.

Faults of deployment are planted in the exporter's rewrites; the export's own gate is held open to get
the bad artifact into a bundle whose hashes are in order, and ``verify`` must refuse it. Faults of the
machine a bundle runs on are planted after the export. Faults of reading a checkpoint are planted in the
family's converter, and the comparison with transformers that the families' tests make must fail.
"""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.helpers import bundles
from tests.helpers.bundles import SIZE, answer, write_bundle
from tests.helpers.models import CONFIGS, random_state
from vitdeploy.bundle.folder import Bundle
from vitdeploy.bundle.golden import golden_images, raw_images
from vitdeploy.bundle.manifest import canonical, digest_of
from vitdeploy.checkpoint.opening import Checkpoint, open_model, save_folder
from vitdeploy.config import BatchRange, Preprocess
from vitdeploy.errors import BundleError, CheckpointError, ParityError, PrecisionError
from vitdeploy.exporter import job
from vitdeploy.exporter.request import ExportRequest
from vitdeploy.exporter.run import run_export
from vitdeploy.images import preprocess
from vitdeploy.images.preprocess import apply
from vitdeploy.model import folds, rewrites
from vitdeploy.model.deployed import DeployedBlock, DeployedMlp, Norm
from vitdeploy.model.parts import Mlp
from vitdeploy.model.registry import build_reference
from vitdeploy.model.vit import Block, Embedding, Readout
from vitdeploy.model.vit_deployed import AbsorbedBlock, DeployedEmbedding, DeployedReadout
from vitdeploy.verification import parity
from vitdeploy.verification.local import verify_bundle

CONFIG = dataclasses.replace(CONFIGS["vit"], depth=2)
SPEC = Preprocess(size=CONFIG.image_size, resample="bicubic", mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
LABELS = tuple(f"kind {i}" for i in range(CONFIG.classes))


def checkpoint(path: Path) -> Path:
    state = random_state(CONFIG, spread=0.2)
    save_folder(Checkpoint(CONFIG, state, SPEC, LABELS, "vitdeploy", "test"), path)
    return path


def export(folder: Path, **request: Any) -> Bundle:
    source = checkpoint(folder / "checkpoint")
    wanted = ExportRequest(model=source, batch=BatchRange(1, 2, 4), **request)
    return run_export(wanted, folder / "out.bundle")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The linear classifier with this file's preprocessing and labels."""
    spec = dataclasses.replace(SPEC, size=(SIZE, SIZE))
    inputs = np.stack([apply(Image.fromarray(image), spec) for image in golden_images(spec.size)])
    golden = {"pixel_values": inputs, "reference": answer(inputs)}
    for index, image in enumerate(raw_images()):
        golden |= {
            f"image.{index}": image,
            f"image.{index}.pixel_values": apply(Image.fromarray(image), spec),
        }
    labels = LABELS[: len(bundles.LABELS)]
    folder = tmp_path_factory.mktemp("good") / "linear.bundle"
    bundle = write_bundle(folder, preprocess=spec, labels=labels, golden=golden)
    verify_bundle(bundle, backends=["onnxruntime"]).check()
    return bundle


Plant = Callable[[pytest.MonkeyPatch], None]


def replace_rewrite(name: str, faulty: Callable[[Block], Block]) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        real = tuple(faulty if r.__name__ == name else r for r in folds.BLOCK_REWRITES)
        patch.setattr(rewrites, "BLOCK_REWRITES", real)
        if name == "move_value_bias":
            patch.setattr(rewrites, name, faulty)

    return plant


def swapped_q_and_k(patch: pytest.MonkeyPatch) -> None:
    real = rewrites.merge_qkv

    def merge(block: Block) -> DeployedBlock:
        block = copy.copy(block)
        attn = copy.copy(block.attn)
        attn._modules = {**attn._modules, "q": attn.k, "k": attn.q}
        block._modules = {**block._modules, "attn": attn}
        return real(block)

    patch.setattr(rewrites, "merge_qkv", merge)


def missing_scale(block: Block) -> Block:
    block = copy.deepcopy(block)
    block.attn.scale = 1.0
    return block


def lost_value_bias(block: Block) -> Block:
    block = copy.deepcopy(block)
    block.attn.v.register_parameter("bias", None)
    return block


def wrong_eps(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(rewrites, "deployed_norm", lambda norm: Norm(norm.weight, norm.bias, 1e-3))


def tanh_gelu(patch: pytest.MonkeyPatch) -> None:
    real = folds.deployed_mlp

    def mlp(part: Mlp) -> DeployedMlp:
        deployed = real(part)
        deployed.activation = "gelu_tanh"
        return deployed

    patch.setattr(rewrites, "deployed_mlp", mlp)


def transposed_positions(patch: pytest.MonkeyPatch) -> None:
    real = rewrites.patches_to_gemm

    def patches(embedding: Embedding) -> DeployedEmbedding:
        deployed = real(embedding)
        rows, columns = CONFIG.grid
        tokens = deployed.tokens.value.data
        grid = tokens[1:].reshape(rows, columns, -1).transpose(0, 1).reshape(rows * columns, -1)
        deployed.tokens.value.data = torch.cat([tokens[:1], grid])
        return deployed

    patch.setattr(rewrites, "patches_to_gemm", patches)


def dropped_head_bias(patch: pytest.MonkeyPatch) -> None:
    real = rewrites.read_out

    def read_out(readout: Readout, outputs: Any, *, absorbed: bool) -> DeployedReadout:
        deployed = real(readout, outputs, absorbed=absorbed)
        assert deployed.head is not None
        deployed.head.bias = None
        return deployed

    patch.setattr(rewrites, "read_out", read_out)


def dropped_residual(patch: pytest.MonkeyPatch) -> None:
    def forward(self: AbsorbedBlock, x: torch.Tensor) -> torch.Tensor:
        pooled = self.attn(self.norm1(x))
        result: torch.Tensor = self.add2(pooled, self.mlp(self.norm2(pooled)))
        return result

    patch.setattr(AbsorbedBlock, "forward", forward)


def swapped_mean_and_std(patch: pytest.MonkeyPatch) -> None:
    real = rewrites.fold_normalisation
    swapped = dataclasses.replace(SPEC, mean=SPEC.std, std=SPEC.mean)
    patch.setattr(rewrites, "fold_normalisation", lambda embedding, _: real(embedding, swapped))


def bgr(patch: pytest.MonkeyPatch) -> None:
    real = rewrites.patches_to_gemm

    def patches(embedding: Embedding) -> DeployedEmbedding:
        embedding = copy.deepcopy(embedding)
        embedding.patch_embed.weight = nn.Parameter(embedding.patch_embed.weight.flip(1), requires_grad=False)
        return real(embedding)

    patch.setattr(rewrites, "patches_to_gemm", patches)


DEPLOYMENT: dict[str, tuple[Plant, dict[str, Any]]] = {
    "swapped_q_and_k": (swapped_q_and_k, {}),
    "missing_attention_scale": (replace_rewrite("fold_attention_scale", missing_scale), {}),
    "value_bias_lost": (replace_rewrite("move_value_bias", lost_value_bias), {}),
    "wrong_eps": (wrong_eps, {}),
    "tanh_gelu_for_erf": (tanh_gelu, {}),
    "transposed_positions": (transposed_positions, {}),
    "head_bias_dropped": (dropped_head_bias, {}),
    "last_residual_dropped": (dropped_residual, {}),
    "mean_and_std_swapped": (swapped_mean_and_std, {"input": "uint8"}),
    "bgr_for_rgb": (bgr, {"input": "uint8"}),
}


@pytest.mark.slow
def test_nothing_is_found_where_nothing_is_planted(tmp_path: Path) -> None:
    verify_bundle(export(tmp_path), backends=["onnxruntime"]).check()


@pytest.mark.slow
@pytest.mark.parametrize("fault", DEPLOYMENT)
def test_a_fault_of_deployment_is_caught_by_export_and_by_verify(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    plant, request = DEPLOYMENT[fault]
    plant(monkeypatch)
    verdicts: list[str | None] = []
    real = job.first_failure

    def hold_open(records: Any) -> None:
        verdicts.append(real(records))

    monkeypatch.setattr(job, "first_failure", hold_open)
    bundle = export(tmp_path, **request)
    assert any(verdicts), "the export's own gate"
    bundle.verify()  # every hash is in order
    report = verify_bundle(bundle, backends=["onnxruntime"])
    assert not report.passed
    with pytest.raises(ParityError):
        report.check()


def test_one_nan_weight_is_named_when_it_is_loaded(tmp_path: Path) -> None:
    state = random_state(CONFIG)
    state["blocks.1.mlp.fc2.weight"][3, 5] = float("nan")
    save_folder(Checkpoint(CONFIG, state, SPEC, LABELS, "vitdeploy", "test"), tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match=r"blocks\.1\.mlp\.fc2\.weight"):
        open_model(str(tmp_path / "checkpoint"))


def test_one_nan_weight_is_named_when_it_appears_later() -> None:
    vit = build_reference(CONFIG, random_state(CONFIG))
    vit.blocks[1].mlp.fc2.weight[3, 5] = float("nan")
    with pytest.raises(PrecisionError, match=r"blocks\.1\.mlp\.fc2\.weight"):
        rewrites.deploy(vit, job.PrecisionPlan.of("fp32"))


def other_filter(patch: pytest.MonkeyPatch) -> None:
    real = Image.Image.resize

    def resize(self: Image.Image, size: Any, resample: Any = None, *args: Any, **kwargs: Any) -> Image.Image:
        return real(self, size, Image.Resampling.BILINEAR, *args, **kwargs)

    patch.setattr(Image.Image, "resize", resize)


def changed_spec(**change: Any) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        real = preprocess.pixel_values

        def pixel_values(image: Image.Image, spec: Preprocess, kind: Any) -> Any:
            return real(image, dataclasses.replace(spec, **change), kind)

        patch.setattr(parity, "pixel_values", pixel_values)

    return plant


def bgr_decoding(patch: pytest.MonkeyPatch) -> None:
    real = preprocess.pixel_values

    def pixel_values(image: Image.Image, *how: Any) -> Any:
        red, green, blue = image.split()
        return real(Image.merge("RGB", (blue, green, red)), *how)

    patch.setattr(parity, "pixel_values", pixel_values)


MACHINE: dict[str, Plant] = {
    "bilinear_for_bicubic": other_filter,
    "bgr_for_rgb": bgr_decoding,
    "mean_and_std_swapped": changed_spec(mean=SPEC.std, std=SPEC.mean),
    "another_rescaling": changed_spec(rescale=1 / 256),
}


@pytest.mark.parametrize("fault", MACHINE)
def test_a_machine_that_makes_other_pixels_is_caught_by_verify(
    good: Bundle, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    assert parity.check_preprocess(good).passed
    MACHINE[fault](monkeypatch)
    report = verify_bundle(good, backends=["onnxruntime"])
    assert not report.passed
    assert any("preprocessing" in reason for reason in report.failures)


def test_permuted_labels_do_not_open(good: Bundle, tmp_path: Path) -> None:
    root = shutil.copytree(good.root, tmp_path / "copy")
    text = (root / "manifest.json").read_text(encoding="utf-8")
    for old, new in (("kind 3", "kind x"), ("kind 4", "kind 3"), ("kind x", "kind 4")):
        text = text.replace(old, new)
    (root / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(BundleError, match="digest"):
        Bundle.open(root)


def test_permuted_labels_under_a_forged_digest_fail_on_labelled_images(good: Bundle, tmp_path: Path) -> None:
    root = shutil.copytree(good.root, tmp_path / "copy")
    reference = good.golden()["reference"]
    labels = good.manifest.labels
    assert labels is not None
    for i, image in enumerate(golden_images((SIZE, SIZE))):
        folder = tmp_path / "data" / labels[int(reference[i].argmax())]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.png")
    straight = verify_bundle(good, backends=["onnxruntime"], data=tmp_path / "data")
    permuted = good.manifest.model_copy(update={"labels": labels[1:] + labels[:1]})
    forged = permuted.model_copy(update={"digest": digest_of(permuted)})
    (root / "manifest.json").write_bytes(canonical(forged))
    shifted = verify_bundle(Bundle.open(root), backends=["onnxruntime"], data=tmp_path / "data")
    assert {row.correct for row in straight.accuracy} == {len(reference)}
    assert {row.correct for row in shifted.accuracy} == {0}
