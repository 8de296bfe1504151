"""TensorRT and TensorRT for RTX: engines of a bundle, on an NVIDIA GPU.

Nothing reaches the runtime before its hash, its header, the library's version and the GPU are checked: a plan
is code for the GPU, and with a lean runtime inside it is code for this machine.
"""

from __future__ import annotations

import contextlib
import mmap
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

from vitdeploy.backends.base import (
    Array,
    Availability,
    Backend,
    Options,
    Session,
    SessionFacts,
    Traits,
    one_line,
    refuse,
    require_support,
    split_device,
)
from vitdeploy.bundle.folder import Bundle
from vitdeploy.bundle.manifest import REBUILD, Artifact, Manifest
from vitdeploy.errors import BundleError, DeviceUnavailable, ExportError, UsageError
from vitdeploy.machine.gpus import Gpu, find_gpus
from vitdeploy.tensorrt import cuda
from vitdeploy.tensorrt.api import ICudaEngine, TensorRt
from vitdeploy.tensorrt.builder import Log, make_logger
from vitdeploy.tensorrt.caches import KernelCache
from vitdeploy.tensorrt.engine_file import check_files, check_machine, foreign_to, read_record, runs_on
from vitdeploy.tensorrt.flavours import FLAVOURS, Flavour, import_tensorrt
from vitdeploy.tensorrt.fusion import FusionReport, fused
from vitdeploy.tensorrt.proof import inspected_layers
from vitdeploy.tensorrt.records import EngineRecord
from vitdeploy.tensorrt.session import Engine


def _traits(flavour: Flavour, summary: str) -> Traits:
    return Traits(
        name=flavour.name,
        summary=summary,
        libraries=(flavour.name, "cuda-core"),
        extras=(flavour.name,),
        formats=(flavour.name,),
        devices=("cuda",),
    )


class _EngineBackend(Backend):
    """What both backends are; a subclass says of which flavour. A session serves one thread at a time."""

    flavour: ClassVar[Flavour]

    def availability(self) -> Availability:
        hint = self.traits.install
        if not self.flavour.is_installed:
            return Availability(False, f"{self.flavour.module} is not installed", hint)
        if not cuda.cuda_core_installed():
            return Availability(False, "cuda-core is not installed", hint)
        if not find_gpus():
            return Availability(
                False, "no NVIDIA GPU answers", "its engines can be built without one, not run"
            )
        return Availability(True)

    def supports(self, manifest: Manifest, artifact: Artifact | None) -> str | None:
        if artifact is None or artifact.format != self.flavour.name:
            return f"it runs {self.flavour.name} engines only"
        return foreign_to(artifact.targets, find_gpus())

    def load(self, bundle: Bundle, artifact: Artifact | None, options: Options) -> Session:
        refuse(self.name, options)
        if artifact is None or artifact.format != self.flavour.name:
            require_support(self, bundle, artifact)
        assert artifact is not None
        library = import_tensorrt(self.flavour, f"the {self.name} backend")
        index, gpu = self._gpu(options.device, artifact)
        path, record = self._checked(bundle, artifact)
        rebuild = rebuild_command(bundle.root, artifact)
        check_machine(record, library.__version__, gpu, rebuild)
        device = cuda.CudaDevice(index)
        log = Log()
        host_code = record.settings.version_compatible
        loaded = deserialise(self.flavour, library, path, log, host_code=host_code)
        if record.settings.weights == "stripped":
            _refit(library, loaded, bundle, record, log)
        engine = Engine(
            library,
            loaded,
            device,
            artifact.inputs,
            artifact.outputs,
            record.profiles,
            graphs=not self.flavour.portable,
            kernels=KernelCache.of(record.version, gpu.name, record.sha256)
            if self.flavour.portable
            else None,
        )
        facts = SessionFacts(
            backend=self.name,
            artifact=artifact.name,
            precision=artifact.precision,
            executes=artifact.precision,
            device=f"cuda:{index}",
            provider=self.flavour.name,
            batch=artifact.batch,
            inputs=artifact.inputs,
            outputs=artifact.outputs,
            versions={self.flavour.name: library.__version__},
            fusion=_fusion(library, loaded, record).lines(),
            rebuild=f"{rebuild} --profile MIN,OPT,MAX",
        )
        return EngineSession(facts, engine, log)

    def _gpu(self, device: str | None, artifact: Artifact) -> tuple[int, Gpu]:
        """The GPU that is asked for; else the first that runs the engine, or the first."""
        gpus = find_gpus()
        fits = (i for i, gpu in enumerate(gpus) if runs_on(artifact.targets, gpu.capability))
        kind, index = split_device(device or f"cuda:{next(fits, 0)}")
        if kind != "cuda" or index >= len(gpus):
            state = self.availability()
            reason = state.reason or f"there is no {device} for it"
            message = f"the {self.name} backend does not run here: {reason}"
            raise DeviceUnavailable(message, hint=state.hint)
        return index, gpus[index]

    def _checked(self, bundle: Bundle, artifact: Artifact) -> tuple[Path, EngineRecord]:
        """The engine's file and record, once every byte of both is known to be what was built."""
        bundle.verify_hashes(artifact.files)
        path = bundle.path(artifact.path)
        record = read_record(bundle.path(_record_name(artifact)))
        check_files(path, record)
        listed = (artifact.format, artifact.targets, bundle.manifest.files[artifact.path].sha256)
        if (record.flavour, record.targets, record.sha256) != listed:
            raise BundleError(f"{path}: its record is of another engine than the manifest lists")
        return path, record


def deserialise(
    flavour: Flavour, library: TensorRt, path: Path, log: Log, *, host_code: bool = False
) -> ICudaEngine:
    """Let TensorRT load an engine.

    Args:
        host_code: whether it may bring a lean runtime of its own; only where its hash stands in a manifest.

    Raises:
        BundleError: it does not take it.
    """
    runtime = library.Runtime(make_logger(library, log))
    if host_code:
        runtime.engine_host_code_allowed = True
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        loaded = runtime.deserialize_cuda_engine(data)
    if loaded is None:
        raise BundleError(f"{path}: {flavour.title} does not take it: {log.last_errors()}")
    return loaded


class TensorRT(_EngineBackend):
    """The full TensorRT."""

    flavour = FLAVOURS["tensorrt"]
    traits = _traits(flavour, "TensorRT engines, built for one GPU architecture")


class TensorRTForRTX(_EngineBackend):
    """TensorRT for RTX."""

    flavour = FLAVOURS["tensorrt-rtx"]
    traits = _traits(flavour, "TensorRT for RTX engines, built anywhere, compiled where they first run")


class EngineSession(Session):
    """A loaded engine."""

    def __init__(self, facts: SessionFacts, engine: Engine, log: Log) -> None:
        super().__init__(facts)
        self._engine, self._log = engine, log

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        with self._explained():
            outputs = self._engine.run(inputs, timed=self.timed)
        self.device_seconds = self._engine.device_seconds
        return outputs

    def run_tensors(self, inputs: Mapping[str, object]) -> dict[str, object]:
        """Compute on tensors that lie on the GPU; see ``vitdeploy.tensorrt.session.Engine``."""
        with self._explained():
            return self._engine.run_tensors(inputs)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Say of a failure which engine it was, and what TensorRT has said of it."""
        try:
            yield
        except UsageError:
            raise
        except Exception as error:  # those of CUDA have no base class of their own
            said = f"; TensorRT said: {self._log.last_errors()}" if self._log.lines else ""
            raise BundleError(f"{self.facts.artifact}: {one_line(error)}{said}") from error

    def _close(self) -> None:
        self._engine.close()


def rebuild_command(bundle: Path, artifact: Artifact) -> str:
    """The command that builds an engine anew."""
    words = ["vitdeploy", "engine", str(bundle), "--format", artifact.format]
    words += ["--precision", artifact.precision]
    if FLAVOURS[artifact.format].portable:
        words += ["--arch", "+".join(artifact.targets)]
    return shlex.join([*words, "--force"])


def _record_name(artifact: Artifact) -> str:
    """The file with an engine's record."""
    name = next((name for name in artifact.files if name.endswith(".json")), None)
    if name is None:
        raise BundleError(f"{artifact.name} has no record beside its engine", hint=REBUILD)
    return name


def _refit(library: TensorRt, engine: ICudaEngine, bundle: Bundle, record: EngineRecord, log: Log) -> None:
    """Put the weights of the ONNX artifact into an engine that was built without them.

    Raises:
        BundleError: the artifact is not there any more, or is another one.
    """
    artifact = bundle.artifact(record.source)
    bundle.verify_hashes(artifact.files)
    for name in artifact.files:
        if bundle.manifest.files[name].sha256 != record.source_sha256.get(name):
            raise BundleError(
                f"{bundle.path(name)}: not the file whose weights the engine needs", hint=REBUILD
            )
    source = bundle.path(artifact.path)
    logger = make_logger(library, log)
    refitter = library.Refitter(engine, logger)
    done = library.OnnxParserRefitter(refitter, logger).refit_from_file(str(source))
    if not done or refitter.get_missing_weights() or not refitter.refit_cuda_engine():
        raise BundleError(f"{source}: its weights do not fit the engine: {log.last_errors()}")


def _fusion(library: TensorRt, engine: ICudaEngine, record: EngineRecord) -> FusionReport:
    """What the engine fuses, from itself; from its record where it does not tell."""
    if record.fusion.source == "engine":
        return record.fusion
    inspector = engine.create_engine_inspector()
    try:
        layers = inspected_layers(inspector.get_engine_information(library.LayerInformationFormat.JSON))
    except ExportError:
        return record.fusion
    return fused(layers, record.fusion) if any(layer.nodes for layer in layers) else record.fusion
