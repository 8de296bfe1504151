"""Several outputs from one graph: what can be asked for, and the proof of each."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from torch import Tensor, nn

from tests.exporter.test_run import Recorder, folder
from tests.helpers.models import CONFIGS, random_state
from vitdeploy.backends.base import Options, get_backend
from vitdeploy.bundle.folder import Bundle
from vitdeploy.config import BatchRange
from vitdeploy.errors import ParityError, UsageError
from vitdeploy.exporter.job import EMULATION
from vitdeploy.exporter.request import ExportRequest, parse_outputs
from vitdeploy.exporter.run import run_export
from vitdeploy.exporter.subject import CheckpointSubject
from vitdeploy.model.deployed import DeployedModel
from vitdeploy.model.precision import PrecisionPlan
from vitdeploy.model.registry import build_reference
from vitdeploy.verification.parity import check_session

CLIP = dataclasses.replace(CONFIGS["clip"], depth=2)
"""Its tokens are not normalised: ``tokens`` and ``layer_1`` are one tensor under two names."""
STATE = random_state(CLIP, spread=0.2)
NAMES = ("logits", "embedding", "tokens", "layer_0", "layer_1")
RANGE = BatchRange(1, 2, 4)


def request(path: Path, state: dict[str, Tensor] = STATE, **asked: Any) -> ExportRequest:
    source = folder(path / "checkpoint", CLIP, state)
    return ExportRequest(model=source, batch=RANGE, formats=("onnx",), **asked)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("outputs")
    asked = request(path, precisions=("fp32", "fp16"), output="logits,embedding,tokens,layers:0,1")
    return run_export(asked, path / "out.bundle")


@pytest.mark.parametrize(
    "given, outputs",
    [
        (None, ()),
        ("logits", ("logits",)),
        ("logits,embedding", ("logits", "embedding")),
        ("layers:3,7,11", ("layer_3", "layer_7", "layer_11")),
        (" features , layers: 3, 7 ,tokens", ("features", "layer_3", "layer_7", "tokens")),
        ("layers:0,layers:1,layer_2", ("layer_0", "layer_1", "layer_2")),
        (["tokens", "layers:3,7", "logits"], ("tokens", "layer_3", "layer_7", "logits")),
        (("layers:3", "7"), ("layer_3", "layer_7")),
    ],
)
def test_outputs_are_named_in_one_list(given: Any, outputs: tuple[str, ...]) -> None:
    assert parse_outputs(given) == outputs
    assert ExportRequest(output=given).outputs == outputs


@pytest.mark.parametrize(
    "given, says",
    [
        ("logits,embeding", "unknown output 'embeding'; did you mean 'embedding'"),
        ("logits,,tokens", "unknown output ''"),
        ("", "unknown output ''"),
        ([], "unknown output ''"),
        ("tokens,3", "unknown output '3'"),
        ("layers:3,tokens,7", "unknown output '7'"),
        ("layers:", "layers: takes numbers of blocks, not ''"),
        ("layers:-1", "layers: takes numbers of blocks, not '-1'"),
        ("layers:3,07", "layers: takes numbers of blocks, not '07'"),
        ("layers:3,7a", "layers: takes numbers of blocks, not '7a'"),
        ("layers:٣", "layers: takes numbers of blocks"),
        ("layers:" + "9" * 5000, "layers: takes numbers of blocks"),
        ("logits,tokens,logits", "the output logits is named twice"),
        ("layers:3,layer_3", "the output layer_3 is named twice"),
    ],
)
def test_a_list_that_makes_no_sense_is_one_clear_line(given: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        ExportRequest(output=given)
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_what_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    for output, missing in (("logits,layers:1,2", "layer_2"), ("tokens,codes", "codes")):
        with pytest.raises(UsageError, match=f"has no {missing}") as caught:
            run_export(request(tmp_path, output=output), tmp_path / "out.bundle")
        assert "layer_0 to layer_1" in (caught.value.hint or "")
    with pytest.raises(UsageError, match="gives what it returns, logits; logits, tokens cannot"):
        run_export(ExportRequest(model=nn.Linear(7, 3), output="logits,tokens"), tmp_path / "out.bundle")
    with pytest.raises(UsageError, match="the kernels give one output, not logits, tokens"):
        ExportRequest(output="logits,tokens", formats=("onnx", "triton-aot"), precisions=("fp16",))


@pytest.mark.slow
def test_the_bundle_says_all_of_its_outputs(bundle: Bundle) -> None:
    manifest = Bundle.open(bundle.root).manifest
    assert (manifest.output, manifest.outputs) == ("logits", NAMES)
    assert manifest.classifies_images
    assert manifest.labels is not None
    rows, width = CLIP.tokens, CLIP.width
    shapes = [("N", 10), ("N", 20), ("N", rows, width), ("N", rows, width), ("N", rows, width)]
    for artifact in manifest.artifacts:
        assert [spec.name for spec in artifact.outputs] == list(NAMES)
        assert [spec.shape for spec in artifact.outputs] == shapes
        graph = onnx.load(bundle.path(artifact.path)).graph
        assert [value.name for value in graph.output] == list(NAMES)
        proven = {r.output for r in manifest.parity if r.artifact == artifact.name and r.backend != EMULATION}
        assert proven == set(NAMES)
    assert {r.output for r in manifest.parity if r.backend == EMULATION} == set(NAMES)
    assert all(record.passed for record in manifest.parity)


@pytest.mark.slow
def test_golden_outputs_are_the_float64_references(bundle: Bundle) -> None:
    golden = bundle.golden()
    exact = build_reference(CLIP, {name: tensor.double() for name, tensor in STATE.items()})
    pixels = torch.from_numpy(golden["pixel_values"]).double()
    for name in NAMES:
        with torch.inference_mode():
            expected = exact(pixels, name).numpy()
        key = "reference" if name == "logits" else f"reference.{name}"
        np.testing.assert_allclose(golden[key], expected, rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "torch"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_backend_gives_every_output(bundle: Bundle, backend: str, precision: str) -> None:
    with get_backend(backend).load(bundle, bundle.artifact(precision), Options()) as session:
        records = check_session(session, bundle.golden(), batches=[1, 3])
        outputs = session.run({"pixel_values": bundle.golden()["pixel_values"][:2]})
    assert [(record.batch, record.output) for record in records] == [(n, o) for n in (1, 3) for o in NAMES]
    assert [record.failures for record in records] == [()] * len(records)
    assert list(outputs) == list(NAMES)
    assert [array.shape[0] for array in outputs.values()] == [2] * len(NAMES)


@pytest.mark.slow
def test_the_weights_alone_and_the_kernels(bundle: Bundle) -> None:
    with get_backend("torch").load(bundle, None, Options()) as session:
        assert {record.output for record in check_session(session, bundle.golden())} == set(NAMES)
    reason = get_backend("triton").supports(bundle.manifest, bundle.artifact("fp16"))
    assert reason is not None
    assert reason.startswith("it computes one output, and this bundle has 5: logits, embedding")


def faulty(monkeypatch: pytest.MonkeyPatch, site: str, factor: float) -> None:
    """Let the deployed model have one weight that is ``factor`` times what it was."""
    right = CheckpointSubject.deployed

    def deployed(subject: CheckpointSubject, plan: PrecisionPlan) -> DeployedModel:
        model = right(subject, plan)
        with torch.no_grad():
            model.get_parameter(site)[0, 0] *= factor
        return model

    monkeypatch.setattr(CheckpointSubject, "deployed", deployed)


@pytest.mark.slow
@pytest.mark.parametrize(
    "site, output",
    [("readout.projection.weight", "embedding"), ("readout.head.weight", "logits")],
)
def test_a_fault_in_one_output_stops_the_export_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, site: str, output: str
) -> None:
    faulty(monkeypatch, site, 3.0)
    for precision, where in (("fp32", "onnxruntime, batch 1"), ("fp16", f"{EMULATION}, batch 8")):
        asked = request(tmp_path, precisions=(precision,), output="tokens,logits,embedding", fallback=False)
        says = rf"onnx-{precision} on {where}, {output}: relative error"
        with pytest.raises(ParityError, match=says):
            run_export(asked, tmp_path / "out.bundle")
    assert not (tmp_path / "out.bundle").exists()


@pytest.mark.slow
def test_islands_are_searched_for_all_outputs_together(tmp_path: Path) -> None:
    """The projection overflows in fp16; the embedding, of length 1, does not show it, nor do the logits."""
    state = STATE | {"projection.weight": STATE["projection.weight"].sign() * 30_000.0}
    recorder = Recorder()
    asked = request(tmp_path, state, precisions=("fp16",), output="logits,embedding")
    made = run_export(asked, tmp_path / "out.bundle", progress=recorder)
    (artifact,) = made.manifest.artifacts
    assert artifact.precision == "mixed"
    assert "projection" in artifact.islands
    assert not {"head", "blocks.0.attn.qkv", "blocks.1.mlp.fc1"} & set(artifact.islands)
    assert "onnx-fp16 on emulation, batch 8, embedding" in (artifact.fallback or "")
    assert all(record.passed for record in made.manifest.parity)


@pytest.mark.slow
def test_outputs_of_a_clip_are_transformers_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.CLIPVisionConfig(**sizes, image_size=32, patch_size=8, projection_dim=24)
    theirs = transformers.CLIPVisionModelWithProjection(config).eval()
    theirs.save_pretrained(tmp_path / "clip")
    asked = ExportRequest(
        model=tmp_path / "clip", batch=RANGE, formats=("onnx",), output="embedding,tokens,layers:0"
    )
    made = run_export(asked, tmp_path / "out.bundle")
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found = theirs.double()(pixels.double(), output_hidden_states=True)
    embedding = found.image_embeds / found.image_embeds.norm(dim=-1, keepdim=True)
    expected = {"embedding": embedding, "tokens": found.last_hidden_state, "layer_0": found.hidden_states[1]}
    with get_backend("onnxruntime").load(made, made.artifact("fp32"), Options()) as session:
        outputs = session.run({"pixel_values": pixels.numpy()})
    assert outputs.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(outputs[name], tensor.numpy(), atol=1e-4)
