"""The local proof of quantised GEMMs: each is computed again from what the runtime itself gave it to read.

Nothing can follow a quantised network from end to end: a rounding that falls the other way in the first block
is a few per cent at the end. A single GEMM can be followed, to about 1e-6; one whose sums saturate is off by
2 %.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitdeploy.backends.base import get_backend
from vitdeploy.bundle.folder import Bundle
from vitdeploy.bundle.manifest import Artifact
from vitdeploy.bundle.onnx_graph import site_of
from vitdeploy.errors import BundleError, DeviceUnavailable, UsageError
from vitdeploy.machine.identity import Cpu
from vitdeploy.machine.temporary import temporary_folder

if TYPE_CHECKING:
    import onnx

Array = np.ndarray[Any, Any]
BOUND = 1e-3
"""Of a GEMM's relative error: 3e-4 is what reciprocals of scales cost, 2e-2 a kernel that saturates."""
CLIPPED_BOUND = 0.3
"""Of the relative error that a GEMM's input has because it is cut off at its range."""
WEIGHTS_BOUND = 0.2
"""Of what rounding its weights costs a GEMM, relative to how its float product varies."""
_SCALE_BOUND = 1e-3
"""Of the difference between a scale and its record: its rounding to fp16."""
BACKENDS = ("onnxruntime", "openvino")
_LARGEST = {"int8": (-128.0, 127.0), "float8_e4m3fn": (-448.0, 448.0)}
_VNNI = ("avx512_vnni", "avx_vnni", "asimddp", "i8mm")


@dataclass(frozen=True)
class GemmRecord:
    """One quantised GEMM on one runtime."""

    site: str
    backend: str
    error: float
    """||y - exact|| / ||exact|| of its output."""
    clipped: float
    """||x - cut(x)|| / ||x|| of what it reads, the larger one of its inputs."""
    lost: float
    """||x (w - float w)|| / ||x float w||, with x what it reads less its mean; 0 where nothing is known."""
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.failures


@dataclass(frozen=True)
class Operand:
    """What a quantised GEMM reads on one side: a constant, or a value on its way through 8 bits."""

    constant: Array | None
    """Dequantised, float64."""
    value: str = ""
    scale: float = 1.0
    dtype: str = ""

    def read(self, values: Mapping[str, Array], *, by_half: bool) -> Array:
        """What the GEMM computes with, float64.

        Args:
            by_half: rounded to fp16 on the way to fp8, as OpenVINO does.
        """
        if self.constant is not None:
            return self.constant
        cut = np.clip(self._steps(values), *_LARGEST[self.dtype])
        if self.dtype == "int8":
            rounded = np.rint(cut)
        else:
            rounded = (cut.astype(np.float16) if by_half else cut).astype(_dtype(self.dtype))
        read: Array = rounded.astype(np.float64) * self.scale
        return read

    def clipped(self, values: Mapping[str, Array]) -> float:
        """The relative error of being cut off."""
        if self.constant is not None:
            return 0.0
        steps = self._steps(values)
        return _relative(np.clip(steps, *_LARGEST[self.dtype]), steps)

    def _steps(self, values: Mapping[str, Array]) -> Array:
        """In single precision, as the operator is defined."""
        return values[self.value].astype(np.float32) / np.float32(self.scale)


@dataclass(frozen=True)
class Gemm:
    """A quantised GEMM of a file, with its own integers and scales."""

    site: str
    inputs: tuple[Operand, Operand]
    bias: Array | None
    """float64."""
    output: str

    @property
    def values(self) -> tuple[str, ...]:
        """What a runtime has to show."""
        return (*(side.value for side in self.inputs if side.value), self.output)

    def product(self, values: Mapping[str, Array], *, by_half: bool) -> Array:
        """Of what a runtime gave it to read, float64."""
        a, b = (side.read(values, by_half=by_half) for side in self.inputs)
        return a @ b if self.bias is None else a @ b + self.bias

    def lost(self, values: Mapping[str, Array], exact: Array) -> float:
        """The relative error of its product with the float weights (in, out) in place of its own.

        Without the mean of what it reads, which biases make up for.
        """
        x, weight = (side.read(values, by_half=False) for side in self.inputs)
        rows = x.reshape(-1, x.shape[-1])
        rows = rows - rows.mean(axis=0)
        return _relative(rows @ weight, rows @ exact.astype(np.float64))

    @property
    def is_fp8(self) -> bool:
        return any(side.dtype.startswith("float8") for side in self.inputs)


def check_gemms(
    source: Bundle | Path,
    artifact: Artifact | None,
    backend: str,
    inputs: Array,
    scales: Mapping[str, float] | None = None,
    weights: Mapping[str, Array] | None = None,
) -> tuple[GemmRecord, ...]:
    """Compute every quantised GEMM of an ONNX file again from what a runtime gives it.

    Args:
        source: a bundle with the artifact, or an ONNX file of its own.
        artifact: whose recorded sites must be there; None asks for none.
        backend: ``onnxruntime`` or ``openvino``, on the CPU.
        inputs: (K, ...) as the file reads them; every activation of these images is held in memory.
        scales: the recorded scale of what each site reads; None compares none.
        weights: of each site, (in, out), before they were rounded; None compares none.

    Raises:
        BundleError: the file has no quantised GEMM of a recorded site, or the runtime fails.
        UsageError: a backend whose values cannot be seen.
        DeviceUnavailable: it does not run here.
    """
    import onnx

    path = source.path(artifact.path) if isinstance(source, Bundle) and artifact else source
    if isinstance(path, Bundle):
        raise UsageError("a bundle has several artifacts: say which")
    if backend not in BACKENDS:
        raise UsageError(f"{backend} shows no values inside of a graph", hint=" or ".join(BACKENDS))
    state = get_backend(backend).availability()
    if not state.ok:
        raise DeviceUnavailable(f"the {backend} backend does not run here: {state.reason}", hint=state.hint)
    model = onnx.load(path)
    gemms = quantised_gemms(model)
    recorded = artifact.quantisation.sites if artifact and artifact.quantisation else ()
    if not gemms or (missing := set(recorded) - {gemm.site for gemm in gemms}):
        what = min(missing) if gemms else "any site"
        raise BundleError(f"{path.name} has no quantised GEMM of {what}")
    feeds = {model.graph.input[0].name: inputs}
    names = [name for name in dict.fromkeys(n for gemm in gemms for n in gemm.values) if name not in feeds]
    _expose(model, names)
    fp8 = any(gemm.is_fp8 for gemm in gemms)
    with tempfile.TemporaryDirectory(dir=temporary_folder()) as folder:
        exposed = Path(folder, "exposed.onnx")
        onnx.save(model, exposed)
        del model
        run = _run_onnxruntime if backend == "onnxruntime" else _run_openvino
        values = run(exposed, feeds, names, fp8=fp8)
    return compare(gemms, {**feeds, **values}, backend, scales, weights)


def compare(
    gemms: Sequence[Gemm],
    values: Mapping[str, Array],
    backend: str,
    scales: Mapping[str, float] | None = None,
    weights: Mapping[str, Array] | None = None,
) -> tuple[GemmRecord, ...]:
    """Hold what a runtime computed against the GEMMs themselves.

    Args:
        values: all that the GEMMs read and give.
        scales, weights: as :func:`check_gemms`.
    """
    records = []
    for gemm in gemms:
        got = values[gemm.output].astype(np.float64)
        ways = (False, True) if gemm.is_fp8 else (False,)
        error = min(_relative(got, gemm.product(values, by_half=by_half)) for by_half in ways)
        clipped = max(side.clipped(values) for side in gemm.inputs)
        failures = []
        if not error <= BOUND:
            failures.append(f"off by {error:.1e} of its own product, bound {BOUND:g}")
        if not clipped <= CLIPPED_BOUND:
            failures.append(f"its range cuts off {clipped:.2g} of what it reads, bound {CLIPPED_BOUND:g}")
        recorded = (scales or {}).get(gemm.site)
        if recorded is not None and abs(gemm.inputs[0].scale - recorded) > _SCALE_BOUND * recorded:
            failures.append(f"reads in steps of {gemm.inputs[0].scale:.4g}, and {recorded:.4g} are on record")
        exact = (weights or {}).get(gemm.site)
        lost = 0.0 if exact is None else gemm.lost(values, exact)
        if not lost <= WEIGHTS_BOUND:
            failures.append(f"its weights are off by {lost:.2g} of the float ones, bound {WEIGHTS_BOUND:g}")
        records.append(GemmRecord(gemm.site, backend, error, clipped, lost, tuple(failures)))
    return tuple(records)


def quantised_gemms(model: onnx.ModelProto) -> tuple[Gemm, ...]:
    """The products of a loaded file whose inputs both come out of DequantizeLinear."""
    from onnx import numpy_helper

    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for value in node.input:
            readers.setdefault(value, []).append(node)

    def array(name: str) -> Array:
        return np.asarray(numpy_helper.to_array(constants[name]))

    def operand(value: str) -> Operand | None:
        node = producers.get(value)
        if node is None or node.op_type != "DequantizeLinear":
            return None
        scale = array(node.input[1]).astype(np.float64)
        if node.input[0] in constants:
            return Operand(array(node.input[0]).astype(np.float64) * scale)  # columns are the last axis
        store = producers[node.input[0]]
        dtype = str(array(store.input[2]).dtype) if len(store.input) > 2 else "uint8"
        return Operand(None, store.input[0], float(scale), dtype)

    gemms = []
    for node in graph.node:
        sides = [operand(value) for value in node.input[:2]] if node.op_type == "MatMul" else [None]
        if None in sides:
            continue
        output, bias = node.output[0], None
        followers = readers.get(output, [])
        if [follower.op_type for follower in followers] == ["Reshape"]:  # to the same shape, before a bias
            followers = readers.get(followers[0].output[0], [])
        if [follower.op_type for follower in followers] == ["Add"]:
            others = [name for name in followers[0].input if name in constants]
            if others:
                output, bias = followers[0].output[0], array(others[0]).astype(np.float64)
        gemms.append(Gemm(site_of(node.name), (sides[0], sides[1]), bias, output))  # type: ignore[arg-type]
    return tuple(gemms)


def processor_note(cpu: Cpu, weight_bits: int) -> str | None:
    """What to say of int8 on a processor without instructions for it; None where it has them."""
    if any(flag in cpu.flags for flag in _VNNI):
        return None
    saturates = ", and sums of 8-bit weights may saturate: --weight-bits 7" if weight_bits > 7 else ""
    return f"{cpu.name or 'this processor'} has no VNNI: int8 gains little on it{saturates}"


def _expose(model: onnx.ModelProto, names: Sequence[str]) -> None:
    """Make values inside of a graph outputs of it, too."""
    from onnx import helper, shape_inference

    there = {value.name for value in model.graph.output}
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    if any(name not in types for name in names):
        inferred = shape_inference.infer_shapes(model).graph.value_info
        types |= {value.name: value.type.tensor_type.elem_type for value in inferred}
    for name in names:
        if name not in there:
            model.graph.output.append(helper.make_tensor_value_info(name, types[name], None))


def _run_onnxruntime(
    path: Path, feeds: Mapping[str, Array], names: Sequence[str], *, fp8: bool
) -> dict[str, Array]:
    from vitdeploy.backends.onnxruntime import session_settings
    from vitdeploy.backends.onnxruntime_providers import PROVIDERS, import_onnxruntime

    library = import_onnxruntime()
    settings = session_settings(library, None, "cpu", fp8=fp8)
    try:
        session = library.InferenceSession(path, settings, providers=[PROVIDERS["cpu"]], enable_fallback=0)
        return dict(zip(names, session.run(list(names), dict(feeds)), strict=True))
    except Exception as error:  # its errors have no base class of their own
        raise BundleError(
            f"ONNX Runtime fails with the GEMMs shown: {' '.join(str(error).split())}"
        ) from error


def _run_openvino(
    path: Path, feeds: Mapping[str, Array], names: Sequence[str], *, fp8: bool
) -> dict[str, Array]:
    import openvino

    core = openvino.Core()
    try:
        # In bf16, the rounding of what is shown would hide what is looked for.
        compiled = core.compile_model(core.read_model(str(path)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        results = compiled(dict(feeds))
    except RuntimeError as error:
        raise BundleError(f"OpenVINO fails with the GEMMs shown: {' '.join(str(error).split())}") from error
    found = {name: np.array(value) for output, value in results.items() for name in output.get_names()}
    return {name: found[name] for name in names}


def _dtype(name: str) -> np.dtype[Any]:
    import ml_dtypes

    dtype: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
    return dtype


def _relative(got: Array, exact: Array) -> float:
    size = float(np.linalg.norm(exact))
    error = float(np.linalg.norm(got - exact))
    return error / size if size else (0.0 if error == 0 else float("inf"))
