"""The local proof of quantised GEMMs, and the faults that it is there for."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.helpers.models import CONFIGS, pixels
from tests.helpers.quantised import quantised_file, quantised_vit
from vitdeploy.bundle.dtypes import Quantised
from vitdeploy.errors import BundleError, UsageError
from vitdeploy.machine.identity import Cpu
from vitdeploy.verification.gemms import Gemm, Operand, check_gemms, compare, processor_note, quantised_gemms

CONFIG = dataclasses.replace(CONFIGS["vit"], depth=2)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(quantised_file(CONFIG, "int8"))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("kind, attention", [("int8", False), ("fp8", False), ("fp8", True)])
def test_every_gemm_is_its_own_product(
    tmp_path: Path, kind: Quantised, attention: bool, backend: str
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(quantised_file(CONFIG, kind, attention=attention))
    sites = quantised_vit(CONFIG, kind).sites
    scales = {name: site.input_scale for name, site in sites.items()}
    records = check_gemms(path, None, backend, pixels(CONFIG, 2).numpy(), scales)
    products = {"blocks.0.attn"} if attention else set()
    assert {record.site for record in records} == {*sites, *products}
    assert [record for record in records if not record.passed] == []
    assert max(record.error for record in records) < (1e-5 if backend == "onnxruntime" else 1e-3)


def saturating(a: np.ndarray, b: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    """Products of (rows, K) and (K, columns) as ``vpmaddubsw`` sums them: in pairs, of 16 bits."""
    pairs = a[:, :, None] * b[None]
    summed = np.clip(pairs[:, 0::2] + pairs[:, 1::2], -(2**15), 2**15 - 1)
    return summed.sum(axis=1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("bits, passed", [(7, True), (8, False)])
def test_a_kernel_that_saturates(bits: int, passed: bool) -> None:
    """As it is without VNNI: inputs move by 128 to be unsigned, and 8-bit weights overflow a sum of two."""
    generator = np.random.default_rng(0)
    largest = 2 ** (bits - 1) - 1
    weight = generator.integers(-largest, largest + 1, (64, 8)).astype(np.float64)
    x = generator.uniform(-1, 1, (16, 64)).astype(np.float32)
    gemm = Gemm("fc", (Operand(None, "x", 1 / 127, "int8"), Operand(weight * 0.01)), None, "y")
    moved = np.rint(x.astype(np.float64) * 127) + 128
    y = (saturating(moved, weight) - 128 * weight.sum(axis=0)) * (0.01 / 127)
    (record,) = compare([gemm], {"x": x, "y": y.astype(np.float32)}, "a kernel")
    assert record.passed == passed
    assert (record.error > 1e-2) == (not passed)
    assert passed or "of its own product" in record.failures[0]


SCRIPT = """
import json, sys
from pathlib import Path
import numpy as np
from vitdeploy.verification.gemms import check_gemms
records = check_gemms(Path(sys.argv[1]), None, "openvino", np.load(sys.argv[2]))
print(json.dumps([[record.error, record.passed] for record in records]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("bits", [7, 8])
def test_openvino_without_vnni_saturates_with_8_bits_alone(tmp_path: Path, bits: int) -> None:
    """What oneDNN does on an older processor, which it is told that this one is."""
    pytest.importorskip("openvino")
    path, images = tmp_path / "model.onnx", tmp_path / "images.npy"
    path.write_bytes(quantised_file(CONFIG, "int8", weight_bits=bits))
    np.save(images, pixels(CONFIG, 2).numpy())
    limited = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "DNNL_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path), str(images)],
        env=limited, capture_output=True, text=True, check=True,
    )  # fmt: skip
    rows = json.loads(done.stdout)
    assert all(passed for _, passed in rows) == (bits == 7)


@pytest.mark.slow
def test_swapped_scales_of_two_sites(file: Path) -> None:
    model = onnx.load(file)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    sites = quantised_vit(CONFIG, "int8").sites
    scales = {name: site.input_scale for name, site in sites.items()}
    low, *_, high = sorted(scales, key=lambda name: scales[name])
    for name, value in ((low, scales[high]), (high, scales[low])):
        changed = numpy_helper.from_array(np.float32(value), f"{name}.input_scale")
        constants[f"{name}.input_scale"].CopyFrom(changed)
    onnx.save(model, file)
    images = pixels(CONFIG, 2).numpy()
    failed = {r.site: r.failures for r in check_gemms(file, None, "onnxruntime", images, scales) if r.failures}
    assert set(failed) == {low, high}
    assert all("are on record" in failures[-1] for failures in failed.values())
    # Without a record, the one whose range is too narrow is still found.
    records = check_gemms(file, None, "onnxruntime", images)
    (cut,) = (record for record in records if not record.passed)
    assert cut.site == high
    assert cut.failures[0].startswith("its range cuts off")


def test_wrong_weights_of_a_runtime_are_found() -> None:
    x = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
    gemm = Gemm("fc", (Operand(None, "x", 1 / 127, "int8"), Operand(np.eye(4))), np.ones(4), "y")
    exact = np.rint(x.astype(np.float64) * 127) / 127 + 1
    (record,) = compare([gemm], {"x": x, "y": exact}, "a runtime", {"fc": 1 / 127})
    assert record.passed
    for wrong in (exact * 1.01, exact - 1, np.full((3, 4), np.nan)):
        (record,) = compare([gemm], {"x": x, "y": wrong}, "a runtime")
        assert not record.passed


@pytest.mark.slow
def test_what_cannot_be_proven(file: Path, tmp_path: Path) -> None:
    images = pixels(CONFIG, 1).numpy()
    with pytest.raises(UsageError, match="torch shows no values inside of a graph"):
        check_gemms(file, None, "torch", images)
    model = onnx.load(file)
    producers = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        if node.op_type == "MatMul" and (load := producers.get(node.input[0])) is not None:
            if load.op_type == "DequantizeLinear":
                node.input[0] = producers[load.input[0]].input[0]
    assert quantised_gemms(model) == ()
    onnx.save(model, file)
    with pytest.raises(BundleError, match=r"model\.onnx has no quantised GEMM of any site"):
        check_gemms(file, None, "onnxruntime", images)


@pytest.mark.parametrize(
    "flags, bits, said",
    [
        (("avx2", "avx512f", "avx512_vnni"), 8, None),
        (("avx2", "avx_vnni"), 8, None),
        (("asimd", "asimddp"), 8, None),
        (("avx2",), 7, "old has no VNNI: int8 gains little on it"),
        (
            ("avx2", "avx512f"),
            8,
            "old has no VNNI: int8 gains little on it, and sums of 8-bit weights may saturate: --weight-bits 7",
        ),
    ],
)
def test_a_note_on_processors(flags: tuple[str, ...], bits: int, said: str | None) -> None:
    assert processor_note(Cpu("old", flags, 2, None), bits) == said
