"""What every runtime looks like from outside: ``Backend`` opens an artifact, ``Session`` runs it.

To add one: a module here with a class derived from ``Backend``, and a line in the table below. All that
others need to know of it, to install, package, plan or list it, are its ``Traits``.
"""

from __future__ import annotations

import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, Literal, Self, cast

import numpy as np

from vitdeploy.bundle.dtypes import ArtifactPrecision, DType
from vitdeploy.bundle.folder import WEIGHTS, Bundle
from vitdeploy.bundle.manifest import Artifact, Manifest, TensorSpec
from vitdeploy.config import BatchRange
from vitdeploy.errors import (
    BundleError,
    DeviceUnavailable,
    MissingDependency,
    UsageError,
    VitdeployError,
    did_you_mean,
)
from vitdeploy.machine.identity import LIBRARIES
from vitdeploy.machine.processors import default_threads

Array = np.ndarray[Any, Any]

_BACKENDS = {
    "onnxruntime": "vitdeploy.backends.onnxruntime:OnnxRuntime",
    "openvino": "vitdeploy.backends.openvino:OpenVino",
    "torch": "vitdeploy.backends.torch:Torch",
    "torch-compile": "vitdeploy.backends.torch_compile:TorchCompile",
    "aotinductor": "vitdeploy.backends.aotinductor:AotInductor",
    "tensorrt": "vitdeploy.backends.tensorrt:TensorRT",
    "tensorrt-rtx": "vitdeploy.backends.tensorrt:TensorRTForRTX",
    "triton": "vitdeploy.backends.triton:Triton",
}


@dataclass(frozen=True)
class Options:
    """How to run; what a backend has no choice about is refused, not ignored."""

    threads: int | None = None
    """CPU threads; the runtime's own choice when omitted."""
    provider: str | None = None
    """ONNX Runtime's execution provider: cpu, cuda, tensorrt or tensorrt-rtx."""
    device: str | None = None
    """cpu, cuda, or cuda:1; the backend's own default when omitted."""
    spin: bool = False
    """Whether threads keep a core busy while they wait for work, where the runtime has the choice. Each
    operation begins sooner for it; but other threads lack the cores."""

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"threads must be at least 1, not {self.threads}")

    @property
    def session_threads(self) -> int | None:
        """The CPU threads of a session, within a container's quota; None is the runtime's own choice."""
        return self.threads or default_threads()


@dataclass(frozen=True)
class Traits:
    """What a backend is, on every machine; known without its libraries."""

    name: str
    summary: str
    """One line for `doctor`."""
    libraries: tuple[str, ...]
    """Distributions that compute: their versions decide the numbers."""
    extras: tuple[str, ...] = ()
    """Of vitdeploy, what installs the libraries; none where vitdeploy itself requires them."""
    formats: tuple[str, ...] = ()
    """Formats of artifacts whose files it reads; of others it takes the precision and batch sizes only."""
    precisions: tuple[ArtifactPrecision, ...] = ("fp32", "mixed", "fp16", "bf16", "int8", "fp8")
    """Of the artifacts that it takes."""
    devices: tuple[Literal["cpu", "cuda"], ...] = ("cpu",)
    """Kinds of device it runs on, its default first."""
    providers: tuple[str, ...] = ()
    """What ``Options.provider`` may be; all but ``cpu`` run on a GPU."""
    spins: bool = False
    """Whether ``Options.spin`` is a choice."""

    @property
    def needs_gpu(self) -> bool:
        return "cpu" not in self.devices

    def uses_gpu(self, provider: str | None) -> bool:
        """Whether a session takes a GPU where no device is asked for."""
        return self.needs_gpu or provider not in (None, "cpu")

    @property
    def install(self) -> str:
        """The command that installs its libraries."""
        what = f'"vitdeploy[{",".join(self.extras)}]"' if self.extras else " ".join(self.libraries)
        return f"pip install {what}"

    def missing(self, library: str) -> MissingDependency:
        """The error for a library that is not installed."""
        return MissingDependency(library, extra=",".join(self.extras), purpose=f"the {self.name} backend")


@dataclass(frozen=True)
class Availability:
    """Whether a backend works on this machine, and if not, why and what would change that."""

    ok: bool
    reason: str = ""
    hint: str | None = None


@dataclass(frozen=True)
class SessionFacts:
    """What a session is, fixed while it lives."""

    backend: str
    artifact: str
    """The artifact's name, or the weights file's where the model runs without an artifact."""
    precision: ArtifactPrecision
    """What the artifact is declared to be in."""
    executes: str
    """What the runtime computes in; a backend that widens or narrows the artifact says so here."""
    device: str
    provider: str
    batch: BatchRange | None
    """Batch sizes it takes; None is any."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    versions: Mapping[str, str]
    """Of the libraries that compute."""
    uses_files: bool = True
    """Whether it runs the artifact's own files, where the backend reads its format; what it makes itself in
    their place says nothing about them."""
    fusion: tuple[str, ...] = ()
    """Which parts of the model run fused, and which do not and why; from backends that know."""
    rebuild: str = "export with --batch MIN,OPT,MAX"
    """How to get an artifact for other batch sizes."""


class Session(ABC):
    """A loaded model. Not to be shared between threads unless its backend says so."""

    timed: bool
    """Set it to have runs timed on the device, too; off at first."""
    device_seconds: float | None
    """Of the last run, between two events on the device's own clock: from the first copy of an input to the
    last result (of an engine: to its copy on the host, too). None on the CPU, where the runtime does not
    tell, and where the run was not to be timed."""

    def __init__(self, facts: SessionFacts) -> None:
        self.facts = facts
        self.timed = False
        self.device_seconds = None
        self._closed = False

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute all outputs.

        Args:
            inputs: every input of ``facts.inputs`` by name, in exactly its dtype and shape; the batch
                size within ``facts.batch``.

        Raises:
            UsageError: a name, dtype, shape or batch size that the model does not take.
            BundleError: the runtime fails on this model.
        """
        if self._closed:
            raise UsageError(f"the session of {self.facts.artifact} is closed")
        check_inputs(self.facts, inputs)
        self.device_seconds = None
        return self._run({name: np.ascontiguousarray(array) for name, array in inputs.items()})

    @abstractmethod
    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute; the inputs are checked and contiguous."""

    @abstractmethod
    def _close(self) -> None:
        """Free what the runtime holds; called once."""

    def close(self) -> None:
        """Free what the runtime holds; the session cannot run afterwards."""
        if not self._closed:
            self._closed = True
            self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Backend(ABC):
    """A runtime."""

    traits: ClassVar[Traits]

    @property
    def name(self) -> str:
        return self.traits.name

    @property
    def formats(self) -> tuple[str, ...]:
        return self.traits.formats

    def availability(self) -> Availability:
        """Whether this machine can run it; imports as little as possible; by default, its libraries."""
        for library in self.traits.libraries:
            if importlib.util.find_spec(library) is None:
                return Availability(False, f"{library} is not installed", self.traits.install)
        return Availability(True)

    @abstractmethod
    def supports(self, manifest: Manifest, artifact: Artifact | None) -> str | None:
        """None if it can run this artifact (or, with None, the weights alone); else the reason why not."""

    def widened(self, bundle: Bundle, artifact: Artifact) -> tuple[str, ...]:
        """Sites of a quantised artifact that run without their 8 bits on the CPU, where no session's
        ``executes`` tells it. To find them, the artifact is compiled once more."""
        return ()

    @abstractmethod
    def load(self, bundle: Bundle, artifact: Artifact | None, options: Options) -> Session:
        """Open an artifact after checking the hashes of its files.

        Raises:
            UsageError: the artifact or an option is not for this backend.
            BundleError: its files are damaged, or the runtime cannot read them.
            MissingDependency: the runtime's library is not installed.
            DeviceUnavailable: the device or provider is not there.
        """

    def load_several(
        self, bundle: Bundle, artifact: Artifact | None, options: Options, count: int
    ) -> tuple[Session, ...]:
        """Open an artifact for so many callers at the same time, each with the threads of ``options``.

        Every session is closed by itself and leaves the others whole. Here each has the weights once more;
        a runtime whose sessions can share them does better.

        Raises: as :meth:`load`; nothing stays open then.
        """
        sessions: list[Session] = []
        try:
            for _ in range(count):
                sessions.append(self.load(bundle, artifact, options))
        except BaseException:
            for session in sessions:
                session.close()
            raise
        return tuple(sessions)


def backend_names() -> tuple[str, ...]:
    return tuple(_BACKENDS)


def get_backend(name: str) -> Backend:
    """The backend of this name; its module is imported, its runtime is not yet.

    Raises:
        UsageError: there is none (with a suggestion).
    """
    if name not in _BACKENDS:
        hint = f"known: {', '.join(_BACKENDS)}"
        raise UsageError(f"unknown backend {name!r}{did_you_mean(name, _BACKENDS)}", hint=hint)
    module, _, attribute = _BACKENDS[name].partition(":")
    return cast(Backend, getattr(importlib.import_module(module), attribute)())


def all_backends() -> tuple[Backend, ...]:
    return tuple(get_backend(name) for name in _BACKENDS)


def reader_of(artifact: Artifact) -> Backend:
    """The first backend that reads an artifact's files.

    Raises:
        UsageError: there is none.
    """
    backend = next(
        (backend for name in _BACKENDS if artifact.format in (backend := get_backend(name)).formats), None
    )
    if backend is None:
        raise UsageError(f"no backend reads {artifact.name}, whose format is {artifact.format}")
    return backend


def library_extras(backends: Iterable[str] = tuple(_BACKENDS)) -> dict[str, str]:
    """The distributions that matter to backends, and the extra that installs each; the core's have none."""
    extras = dict(LIBRARIES)
    for backend in map(get_backend, backends):
        for library in backend.traits.libraries:
            extras.setdefault(library, ",".join(backend.traits.extras))
    return extras


def require_support(backend: Backend, bundle: Bundle, artifact: Artifact | None) -> None:
    """Raise the reason why a backend cannot run an artifact as a UsageError, if there is one."""
    if reason := backend.supports(bundle.manifest, artifact):
        name = artifact.name if artifact else WEIGHTS
        raise UsageError(f"the {backend.name} backend cannot run {name} of {bundle.root}: {reason}")


def runs_nothing(backend: Backend, bundle: Bundle) -> VitdeployError:
    """Why a backend runs nothing of a bundle; of its engines, that the GPU they are for is missing."""
    manifest = bundle.manifest
    reasons = [f"{artifact.name}: {backend.supports(manifest, artifact)}" for artifact in manifest.artifacts]
    engines = any(a.targets and a.format in backend.formats for a in manifest.artifacts)
    kind = DeviceUnavailable if engines else UsageError
    why = "; ".join(reasons) or "it has no artifacts"
    return kind(f"the {backend.name} backend can run nothing of {bundle.root}: {why}")


def split_device(device: str) -> tuple[str, int]:
    """``"cuda:1"`` as ``("cuda", 1)``; without a number it is 0.

    Raises:
        UsageError: neither cpu nor cuda.
    """
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (":" in device and not index.isdecimal()):
        raise UsageError(f"unknown device {device!r}", hint="known: cpu, cuda, cuda:N")
    return kind, int(index or 0)


def refuse(backend: str, options: Options) -> None:
    """Raise a UsageError for the first option given of those that ONNX Runtime alone has a use for."""
    if options.provider is not None:
        raise UsageError(f"the {backend} backend takes no provider (given: {options.provider!r})")
    if options.spin:
        raise UsageError(f"the {backend} backend has no threads that can be told to spin")


def check_inputs(facts: SessionFacts, inputs: Mapping[str, Array]) -> None:
    """Check names, dtypes, shapes and the batch size against what a session takes.

    Raises:
        UsageError: says what was given and what is wanted.
    """
    specs = {spec.name: spec for spec in facts.inputs}
    for name in inputs:
        if name not in specs:
            raise UsageError(f"{facts.artifact} has no input {name!r}{did_you_mean(name, specs)}")
    sizes: dict[str, int] = {}
    for name, spec in specs.items():
        if name not in inputs:
            raise UsageError(f"{facts.artifact} needs the input {name!r}")
        _check_tensor(spec, inputs[name], sizes, facts.artifact)
    if facts.batch is None or not facts.inputs:
        return
    batch = inputs[facts.inputs[0].name].shape[0]
    if not facts.batch.min <= batch <= facts.batch.max:
        served = f"{facts.batch.min}" if facts.batch.fixed else f"{facts.batch.min} to {facts.batch.max}"
        raise UsageError(f"batch size {batch}, but {facts.artifact} serves {served}", hint=facts.rebuild)


def _check_tensor(spec: TensorSpec, array: Array, sizes: dict[str, int], artifact: str) -> None:
    """Check one input; ``sizes`` remembers what each named dimension is."""
    dtype = numpy_dtype(spec.dtype)
    if array.dtype != dtype:
        raise UsageError(f"{artifact}: {spec.name} must be {dtype}, not {array.dtype}")
    fits = len(array.shape) == len(spec.shape) and all(
        have == (sizes.setdefault(want, have) if isinstance(want, str) else want)
        for have, want in zip(array.shape, spec.shape, strict=True)
    )
    if not fits:
        expected, given = (", ".join(str(size) for size in shape) for shape in (spec.shape, array.shape))
        raise UsageError(f"{artifact}: {spec.name} must have the shape ({expected}), not ({given})")


def run_in_batches(session: Session, inputs: Array, size: int) -> list[dict[str, Array]]:
    """The outputs for inputs (n, ...), ``size`` at a time; the last batch goes round."""
    name = session.facts.inputs[0].name
    order = np.arange(-(-len(inputs) // size) * size) % len(inputs)
    return [session.run({name: inputs[order[i : i + size]]}) for i in range(0, len(order), size)]


def check_declared(artifact: Artifact, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> None:
    """Hold what a runtime sees in a file, names to dtypes, against what the manifest says of it.

    Raises:
        BundleError: they differ.
    """
    for kind, specs, seen in (("input", artifact.inputs, inputs), ("output", artifact.outputs, outputs)):
        said = {spec.name: spec.dtype for spec in specs}
        if said != dict(seen):
            raise BundleError(f"{artifact.path}: its {kind}s are {dict(seen)}, but the manifest says {said}")


def one_line(error: BaseException) -> str:
    """A library's message without line breaks, cut where it becomes a stack trace."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."


def numpy_dtype(dtype: DType) -> np.dtype[Any]:
    """The numpy dtype of a tensor at the border of a model.

    Raises:
        UsageError: numpy has none (bfloat16).
    """
    try:
        return np.dtype(dtype)
    except TypeError as error:
        raise UsageError(f"{dtype} inputs and outputs are not supported") from error
