"""Exports of several image sizes into one bundle: each as if it were exported alone, and weights once."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto
from safetensors.torch import load_file
from torch import nn

from tests.helpers.models import CONFIGS, pixels, random_state
from vitdeploy.backends.base import Options, get_backend
from vitdeploy.backends.torch import reference_session
from vitdeploy.bundle.folder import WEIGHTS, Bundle
from vitdeploy.bundle.golden import FEWER_NAMES, golden_images
from vitdeploy.checkpoint.opening import Checkpoint, open_model, save_folder
from vitdeploy.config import BatchRange, Preprocess, Size, ViTConfig
from vitdeploy.errors import ConfigError, ExportError, UsageError
from vitdeploy.exporter.plan import plan_export
from vitdeploy.exporter.request import ExportRequest
from vitdeploy.exporter.run import run_export
from vitdeploy.exporter.shared_weights import LEAST, SharedWeights
from vitdeploy.model.reference import forward_float64
from vitdeploy.model.registry import build_reference
from vitdeploy.progress import Progress

SINGLE = dataclasses.replace(CONFIGS["vit"], depth=1)
FIRST: Size = SINGLE.image_size
PATCH = SINGLE.patch_size
SIZES: tuple[Size, ...] = (FIRST, (FIRST[0] + PATCH, FIRST[1] + PATCH), (PATCH, 3 * PATCH))
RANGE = BatchRange(1, 2, 4)


def folder(path: Path, config: ViTConfig = SINGLE, state: dict[str, torch.Tensor] | None = None) -> Path:
    spec = Preprocess(size=config.image_size, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    weights = random_state(config, spread=0.2) if state is None else state
    save_folder(Checkpoint(config, weights, spec, None, "vitdeploy", "test"), path)
    return path


def export(tmp_path: Path, source: Path, sizes: tuple[Size, ...] = SIZES, **request: Any) -> Bundle:
    fields = {"model": source, "batch": RANGE, "image_size": sizes[0], "further_sizes": sizes[1:]}
    progress = request.pop("progress", None)
    return run_export(ExportRequest(**{**fields, **request}), tmp_path / "out.bundle", progress=progress)


def text(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


class Notes(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Path]:
    """A small model in two precisions at three sizes, and its checkpoint; to look at only."""
    path = tmp_path_factory.mktemp("three")
    source = folder(path / "checkpoint")
    return export(path, source, precisions=("fp32", "fp16")), source


@pytest.mark.slow
def test_every_size_has_all_that_a_bundle_of_it_has(three: tuple[Bundle, Path]) -> None:
    bundle, _ = three
    bundle.verify()
    assert bundle.sizes == SIZES
    suffixes = ["", *(f".{text(size)}" for size in SIZES[1:])]
    assert sorted(bundle.manifest.files) == sorted(
        [f"{name}{suffix}.{end}" for suffix in suffixes
         for name, end in (("golden", "safetensors"), ("weights", "safetensors"), ("model", "onnx"),
                           ("model", "fp16.onnx"))]
        + ["model.onnx.data", "model.fp16.onnx.data"]
    )  # fmt: skip
    for size in SIZES:
        manifest = bundle.at_size(size).manifest
        assert manifest.model == SINGLE.at_size(size)
        assert manifest.preprocess is not None
        assert manifest.preprocess.size == size
        assert [a.precision for a in manifest.artifacts] == ["fp32", "fp16"]
        assert all(a.proof and a.proof.ok and a.inputs[0].shape[2:] == size for a in manifest.artifacts)
        assert all(record.passed for record in manifest.parity)
        run = {record.batch for record in manifest.parity if record.backend == "onnxruntime"}
        assert run == ({1, 2, 4} if size == FIRST else {1, 2})
        assert {record.artifact for record in manifest.parity if record.backend == "emulation"}
    flops = [bundle.at_size(size).manifest.flops for size in SIZES]
    assert flops[1] > flops[0] > flops[2]  # type: ignore[operator]


@pytest.mark.slow
def test_every_size_is_the_checkpoint_opened_at_that_size(three: tuple[Bundle, Path]) -> None:
    bundle, source = three
    for size in SIZES:
        view, alone = bundle.at_size(size), open_model(str(source), image_size=size)
        assert isinstance(alone, Checkpoint)
        assert view.manifest.preprocess == alone.preprocess
        truth = build_reference(alone.config, alone.state)
        golden, inputs = view.golden(), pixels(alone.config, 4)
        drawn = golden_images(size, names=None if size == FIRST else FEWER_NAMES)
        assert len(golden["pixel_values"]) == len(drawn)
        expected = forward_float64(truth, torch.from_numpy(golden["pixel_values"])).numpy()
        np.testing.assert_allclose(golden["reference"], expected, rtol=0, atol=1e-12)
        wanted = forward_float64(truth, inputs).numpy()
        scale = np.abs(wanted).max()
        feed = {"pixel_values": inputs.numpy()}
        for precision, within in (("fp32", 1e-5), ("fp16", 1e-2)):
            artifact = view.artifact(precision)
            for opened in (bundle, view):  # the whole bundle knows the size of each artifact
                with get_backend("onnxruntime").load(opened, artifact, Options()) as session:
                    np.testing.assert_allclose(session.run(feed)["logits"], wanted, atol=within * scale)
        with get_backend("torch").load(bundle, view.artifact("fp32"), Options()) as session:
            np.testing.assert_allclose(session.run(feed)["logits"], wanted, atol=1e-5 * scale)
        with reference_session(view) as session:
            answers = session.run(feed)["logits"]  # which sessions hand out in float32
            np.testing.assert_allclose(answers, wanted, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_what_sizes_share_lies_in_the_bundle_once(three: tuple[Bundle, Path], precision: str) -> None:
    bundle, _ = three
    graphs = []
    for size in SIZES:
        artifact = bundle.at_size(size).artifact(precision)
        graphs.append(onnx.load(bundle.path(artifact.path), load_external_data=False).graph)
        data = "model.onnx.data" if precision == "fp32" else "model.fp16.onnx.data"
        assert artifact.files == (artifact.path, data)
    places = [
        {t.name: tuple(e.value for e in t.external_data) for t in g.initializer if t.external_data}
        for g in graphs
    ]
    inside = [
        {t.name for t in g.initializer if not t.external_data and len(t.raw_data) >= LEAST} for g in graphs
    ]
    own = "tokens.value"  # the positions
    assert inside[0] == set()
    for other, kept in zip(places[1:], inside[1:], strict=True):
        assert kept <= {own}
        assert other == {name: place for name, place in places[0].items() if name != own}
    spans = sorted((int(offset), int(length)) for _, offset, length in places[0].values())
    assert all(offset % 4096 == 0 for offset, _ in spans)
    assert all(end >= begin + n for (begin, n), (end, _) in itertools.pairwise(spans))
    assert sum(spans[-1]) == bundle.path(data).stat().st_size


@pytest.mark.slow
def test_weights_of_a_further_size_are_those_that_differ(three: tuple[Bundle, Path]) -> None:
    bundle, source = three
    for size in SIZES[1:]:
        alone = open_model(str(source), image_size=size)
        assert isinstance(alone, Checkpoint)
        base, over = (load_file(bundle.path(name)) for name in bundle.at_size(size).weights)
        assert over.keys() == {"pos_embed"}
        assert (base | over).keys() == alone.state.keys()
        assert all(torch.equal((base | over)[name], tensor) for name, tensor in alone.state.items())


@pytest.mark.slow
def test_the_plan_names_the_files_that_the_export_writes(three: tuple[Bundle, Path]) -> None:
    bundle, source = three
    fields = {"image_size": FIRST, "further_sizes": SIZES[1:], "precisions": ("fp32", "fp16")}
    plan = plan_export(ExportRequest(model=source, formats=("onnx",), **fields))  # type: ignore[arg-type]
    assert plan.files.keys() == bundle.manifest.files.keys()
    assert all(f"(N, 3, {height}, {width})" in plan.input for height, width in SIZES)


@pytest.mark.slow
def test_a_precision_that_fails_at_one_size_falls_back_there_alone(tmp_path: Path) -> None:
    config = dataclasses.replace(SINGLE, image_size=(4 * PATCH, 4 * PATCH))
    state = random_state(config, spread=0.2)
    signs = torch.tensor([(-1.0) ** (r + c) for r in range(4) for c in range(4)])
    state["pos_embed"][1:, 0] = signs * 1e5
    small: Size = (2 * PATCH, 2 * PATCH)  # where neighbours, averaged, cancel
    notes = Notes()
    source = folder(tmp_path / "checkpoint", config, state)
    bundle = export(tmp_path, source, (small, config.image_size), precisions=("fp16",), progress=notes)
    first, further = bundle.manifest.artifacts
    assert (first.name, first.precision, first.fallback) == ("onnx-fp16", "fp16", None)
    suffix = text(config.image_size)
    assert (further.precision, further.requested) == ("mixed", "fp16")
    assert further.name == f"onnx-mixed-{suffix}"
    assert further.path == f"model.{suffix}.mixed.onnx"
    assert "model.fp16.onnx.data" in further.files  # what is the same in fp16 is not written again
    assert f"model.{suffix}.fp16.onnx" not in bundle.manifest.files
    assert any(f"model.{suffix}.mixed.onnx instead" in note for note in notes.notes)
    assert bundle.artifact("fp16").name == "onnx-fp16"
    assert bundle.at_size(config.image_size).artifact("onnx-fp16").name == further.name
    bundle.verify()


class Conv(nn.Module):
    """Takes images of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 64, 4, stride=4), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).flatten(2).mean(dim=2))


class Fixed(Conv):
    """Takes images of one size only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x.reshape(-1, 3 * 32 * 32)[:, :64]


@pytest.mark.slow
def test_any_module_that_takes_several_sizes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Conv().eval()
    sizes: tuple[Size, ...] = ((32, 32), (16, 48))
    request = ExportRequest(model=module, batch=RANGE, image_size=sizes[0], further_sizes=sizes[1:])
    bundle = run_export(request, tmp_path / "out.bundle")
    assert bundle.sizes == sizes
    assert bundle.at_size(sizes[1]).weights == (WEIGHTS,)
    assert (bundle.root / "model.16x48.onnx").stat().st_size < 10_000
    for size in sizes:
        x = np.random.default_rng(0).normal(size=(3, 3, *size)).astype(np.float32)
        artifact = bundle.at_size(size).artifact("fp32")
        with get_backend("onnxruntime").load(bundle, artifact, Options()) as session:
            got = session.run({"pixel_values": x})["logits"]
        with torch.inference_mode():
            np.testing.assert_allclose(got, module(torch.from_numpy(x)).numpy(), atol=1e-5)


def test_a_module_of_one_size_is_refused_in_one_line(tmp_path: Path) -> None:
    request = ExportRequest(model=Fixed(), image_size=(32, 32), further_sizes=((16, 16),))
    with pytest.raises(ExportError, match=r"does not run on a \(1, 3, 16, 16\) tensor") as caught:
        run_export(request, tmp_path / "out.bundle")
    assert len(str(caught.value)) <= 400
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_uint8_and_several_outputs_at_two_sizes(tmp_path: Path) -> None:
    source = folder(tmp_path / "checkpoint")
    names = ("logits", "tokens")
    bundle = export(tmp_path, source, SIZES[:2], input="uint8", output=names)
    for size in SIZES[:2]:
        view, alone = bundle.at_size(size), open_model(str(source), image_size=size)
        assert isinstance(alone, Checkpoint)
        images = np.stack(golden_images(size)[2:5])
        spec = alone.preprocess
        normal = (images * spec.rescale - np.array(spec.mean)) / np.array(spec.std)
        truth = build_reference(alone.config, alone.state)
        inputs = torch.from_numpy(normal.transpose(0, 3, 1, 2))
        with get_backend("onnxruntime").load(view, view.artifact("fp32"), Options()) as session:
            outputs = session.run({"pixel_values": images})
        for name in names:
            expected = forward_float64(truth, inputs, name).numpy()
            assert outputs[name].shape == expected.shape
            np.testing.assert_allclose(outputs[name], expected, atol=1e-4 * np.abs(expected).max())


def test_sizes_named_twice_or_not_divisible_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"the image size {text(FIRST)} is named twice"):
        ExportRequest(image_size=FIRST, further_sizes=(SIZES[1], FIRST))
    with pytest.raises(UsageError, match=f"the image size {text(SIZES[1])} is named twice"):
        ExportRequest(image_size=FIRST, further_sizes=(SIZES[1], SIZES[1]))
    with pytest.raises(UsageError, match="go with a first one"):
        ExportRequest(further_sizes=(FIRST,))
    source = folder(tmp_path / "checkpoint")
    uneven: Size = (PATCH + 1, PATCH)
    with pytest.raises(ConfigError, match=f"{text(uneven)} is not divisible"):
        export(tmp_path, source, (FIRST, uneven))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def graph(**constants: np.ndarray[Any, Any]) -> ir.Model:
    """A graph with these constants and hardly anything else."""
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()]
    nodes = [onnx.helper.make_node("Identity", [name], [f"{name}_out"]) for name in constants]
    outputs = [
        onnx.helper.make_tensor_value_info(f"{n}_out", TensorProto.FLOAT, a.shape)
        for n, a in constants.items()
    ]
    made = onnx.helper.make_graph(nodes, "g", [], outputs, tensors)
    return ir.from_proto(onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 20)]))


def test_shared_weights_hold_each_tensor_once(tmp_path: Path) -> None:
    a, b = np.arange(2000, dtype=np.float32), np.arange(2000, 4000, dtype=np.float32)
    shared = SharedWeights(tmp_path / "model.onnx.data")
    first = graph(a=a, again=a.reshape(40, 50), b=b, small=np.ones(5, np.float32))
    assert shared.take(first)
    size = (tmp_path / "model.onnx.data").stat().st_size
    assert size == 8192 + 8000
    second = graph(b=b, other=a + 1, a=a.reshape(2, 1000))
    assert shared.take(second)
    assert (tmp_path / "model.onnx.data").stat().st_size == size
    for model, external, inside in ((first, {"a", "again", "b"}, {"small"}), (second, {"a", "b"}, {"other"})):
        values = model.graph.initializers
        assert {n for n, v in values.items() if isinstance(v.const_value, ir.ExternalTensor)} == external
        assert values.keys() - external == inside
    for name, expected in (("a", a.reshape(2, 1000)), ("b", b), ("other", a + 1)):
        value = second.graph.initializers[name].const_value
        assert value is not None
        np.testing.assert_array_equal(value.numpy(), expected)
    assert not shared.take(graph(other=a + 2))
