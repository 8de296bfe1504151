"""Building engines from one ONNX file: parse once, prove, then build for each target.

Runs in a process of its own (``vitdeploy.tensorrt.child``): what crashes here takes no command line with it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from vitdeploy.bundle.proofs import PrecisionProof
from vitdeploy.errors import DeviceUnavailable, ExportError, UsageError
from vitdeploy.machine.gpus import Gpu, find_gpus
from vitdeploy.machine.memory import peak_memory
from vitdeploy.tensorrt.api import (
    Builder,
    IBuilderConfig,
    INetworkDefinition,
    OnnxParser,
    ParserError,
    RtxBuilderConfig,
    TensorRt,
    TensorRtForRtx,
)
from vitdeploy.tensorrt.caches import TimingCache
from vitdeploy.tensorrt.flavours import FLAVOURS, Flavour, import_tensorrt
from vitdeploy.tensorrt.fusion import FusionReport, fused, fusible
from vitdeploy.tensorrt.proof import (
    Layer,
    check_built,
    inspected_layers,
    network_layers,
    prove_network,
    require,
)
from vitdeploy.tensorrt.records import BuildJob, BuildResult, BuiltEngine, Report

_KEPT = 40
"""Lines of the log that an error may quote."""
_ERRORS = ("INTERNAL_ERROR", "ERROR")


def run_build_job(job: BuildJob, report: Report) -> BuildResult:
    """Build every engine of a job.

    Raises:
        MissingDependency, DeviceUnavailable: TensorRT, or the GPU it needs, is not there.
        PrecisionError: the network has a GEMM that is wider than declared.
        ExportError: the graph has operators that TensorRT lacks, or the builder fails.
    """
    flavour = FLAVOURS[job.flavour]
    library = import_tensorrt(flavour, f"building {flavour.title} engines")
    gpu = None if flavour.portable else _gpu(flavour)
    framework = peak_memory()
    log = Log()
    begin = time.perf_counter()
    report("parsing", 0.0)
    work = _Work(job, flavour, library, gpu, log, report)
    layers = work.parse()
    parsed = time.perf_counter() - begin
    proof = prove_network(layers, job.precision, job.islands, job.quantised)
    require(proof, job.precision, f"an engine of {Path(job.onnx).name}", job.quantised)
    fusion = fusible(layers)
    engines = tuple(work.build(index, proof, fusion) for index in range(len(job.targets)))
    return BuildResult(
        version=library.__version__,
        gpu=gpu.name if gpu else None,
        proof=proof,
        fusion=fusion,
        engines=engines,
        layers=len(layers),
        parse_seconds=round(parsed, 3),
        framework_bytes=framework,
        peak_bytes=peak_memory(),
    )


def _gpu(flavour: Flavour) -> Gpu:
    gpus = find_gpus()
    if not gpus:
        raise DeviceUnavailable(
            f"{flavour.title} builds for the GPU that is here, and there is none",
            hint="build where the GPU is, or --format tensorrt-rtx with --arch, which builds anywhere",
        )
    return gpus[0]


class _Work:
    """One network and what is built from it; the parser lives as long, because it holds the weights."""

    def __init__(
        self, job: BuildJob, flavour: Flavour, library: TensorRt, gpu: Gpu | None, log: Log, report: Report
    ) -> None:
        self.job, self.flavour, self.library, self.gpu = job, flavour, library, gpu
        self.log, self.report = log, report
        self.logger = make_logger(library, log)
        try:
            self.builder: Builder = library.Builder(self.logger)
        except TypeError as error:  # how the bindings say that there is no CUDA
            errors = log.last_errors()
            raise DeviceUnavailable(f"{flavour.title} does not start on this machine: {errors}") from error
        flag = 1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        self.network: INetworkDefinition = self.builder.create_network(flag)
        self.parser: OnnxParser = library.OnnxParser(self.network, self.logger)

    def parse(self) -> list[Layer]:
        """Read the graph.

        Raises:
            ExportError: names every operator that TensorRT cannot take, and where it stands.
        """
        name = Path(self.job.onnx).name
        if not self.parser.parse_from_file(self.job.onnx):
            errors = [self.parser.get_error(index) for index in range(self.parser.num_errors)]
            places = dict.fromkeys(_place(error) for error in errors if error.node_operator())
            if not places:
                raise ExportError(f"{self.flavour.title} cannot read {name}: {self.log.last_errors()}")
            what = f"{self.flavour.title} has no form of {', '.join(places)}"
            raise ExportError(
                f"{name}: {what}", hint="rewrite these parts of the model, or export to ONNX only"
            )
        if not self.network.num_layers or not self.network.num_outputs:
            raise ExportError(f"{name}: {self.flavour.title} read an empty network from it")
        return network_layers(self.network)

    def build(self, index: int, proof: PrecisionProof, fusion: FusionReport) -> BuiltEngine:
        """Build and write one engine.

        Raises:
            ExportError: the builder fails; quotes its log.
            PrecisionError: the engine computes in fp32 what the network has in half precision.
        """
        begin = time.perf_counter()
        config = self._configure(self.job.targets[index])
        config.progress_monitor = make_monitor(self.library, self.report, index, len(self.job.targets))
        cache = self._timing_cache(config)
        engine = self.builder.build_serialized_network(self.network, config)
        if engine is None:
            for_what = "+".join(self.job.targets[index]) or "this GPU"
            raise ExportError(
                f"{self.flavour.title} built no engine for {for_what}: {self.log.last_errors()}"
            )
        if cache is not None:
            cache.save(config)
        path = Path(self.job.outputs[index])
        with path.open("wb") as file:
            file.write(memoryview(engine))
        engine_fusion = self._inspect(engine, proof, fusion, path.name) if self.gpu else None
        seconds = round(time.perf_counter() - begin, 3)
        return BuiltEngine(seconds=seconds, size=path.stat().st_size, fusion=engine_fusion)

    def _configure(self, targets: tuple[str, ...]) -> IBuilderConfig:
        library, settings = self.library, self.job.settings
        config = self.builder.create_builder_config()
        # TF32 has ten bits of mantissa: an fp32 engine in it would not be one.
        config.clear_flag(library.BuilderFlag.TF32)
        config.profiling_verbosity = library.ProfilingVerbosity.DETAILED
        if settings.workspace is not None:
            config.set_memory_pool_limit(library.MemoryPoolType.WORKSPACE, settings.workspace)
        if settings.level is not None:
            config.builder_optimization_level = settings.level
        if settings.version_compatible:
            config.set_flag(library.BuilderFlag.VERSION_COMPATIBLE)
        if settings.hardware != "none":
            config.hardware_compatibility_level = self._hardware_level()
        if settings.weights != "full":
            config.set_flag(library.BuilderFlag.REFIT)
        if settings.weights == "stripped":
            config.set_flag(library.BuilderFlag.STRIP_PLAN)
        if self.flavour.portable:
            self._target(cast(RtxBuilderConfig, config), targets)
        self._add_profiles(config)
        return config

    def _hardware_level(self) -> Any:
        name = self.job.settings.hardware.upper()
        level = getattr(self.library.HardwareCompatibilityLevel, name, None)
        if level is None:
            raise UsageError(f"{self.flavour.title} {self.library.__version__} has no {name} compatibility")
        return level

    def _target(self, config: RtxBuilderConfig, targets: tuple[str, ...]) -> None:
        capabilities = cast(TensorRtForRtx, self.library).ComputeCapability
        config.num_compute_capabilities = len(targets)
        for index, arch in enumerate(targets):
            config.set_compute_capability(getattr(capabilities, self.flavour.targets[arch]), index)

    def _add_profiles(self, config: IBuilderConfig) -> None:
        """One optimization profile for each range of batch sizes, where the batch varies."""
        spec = self.job.input
        if not isinstance(spec.shape[0], str):
            return
        rest = tuple(int(size) for size in spec.shape[1:])
        for batch in self.job.profiles:
            profile = self.builder.create_optimization_profile()
            profile.set_shape(spec.name, *((size, *rest) for size in (batch.min, batch.opt, batch.max)))
            if config.add_optimization_profile(profile) < 0:
                raise ExportError(
                    f"{self.flavour.title} refuses the profile {batch}: {self.log.last_errors()}"
                )

    def _timing_cache(self, config: IBuilderConfig) -> TimingCache | None:
        """The measurements of earlier builds; where kernels are not timed there are none."""
        if self.gpu is None or not self.job.settings.timing_cache:
            return None
        cache = TimingCache.of(self.library.__version__, self.gpu.name)
        cache.load(config)
        return cache

    def _inspect(
        self, engine: Any, proof: PrecisionProof, network: FusionReport, where: str
    ) -> FusionReport | None:
        """Ask the built engine itself, on the GPU it was built for."""
        runtime = self.library.Runtime(self.logger)
        # A version-compatible engine brings a runtime of its own, code for this machine; it was built here.
        runtime.engine_host_code_allowed = self.job.settings.version_compatible
        loaded = runtime.deserialize_cuda_engine(engine)
        if loaded is None:
            raise ExportError(f"{where} does not load where it was built: {self.log.last_errors()}")
        if self.job.settings.weights == "stripped":
            return None  # it has no weights to make a context of
        inspector = loaded.create_engine_inspector()
        layers = inspected_layers(inspector.get_engine_information(self.library.LayerInformationFormat.JSON))
        check_built(layers, proof, where)
        return fused(layers, network)


def _place(error: ParserError) -> str:
    return f"{error.node_operator()} at {error.node_name() or 'an unnamed node'}"


def make_monitor(library: TensorRt, report: Report, index: int, count: int) -> Any:
    """A progress monitor of TensorRT's kind; ``index`` of ``count`` engines are done already."""

    class Monitor(library.IProgressMonitor):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}
            self.outermost: str | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = max(num_steps, 1)
            if parent_phase is None:
                self.outermost = phase_name

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name == self.outermost:
                report(phase_name, (index + min(1.0, (step + 1) / self.steps[phase_name])) / count)
            return True

        def phase_finish(self, phase_name: str) -> None:
            if phase_name == self.outermost:
                self.outermost = None

    return Monitor()


@dataclass
class Log:
    """What TensorRT says while it works, kept so that an error can quote it."""

    lines: list[tuple[str, str]] = field(default_factory=list)
    """Severity and text."""

    def add(self, severity: str, text: str) -> None:
        self.lines.append((severity, " ".join(text.split())))
        del self.lines[:-_KEPT]

    def last_errors(self, count: int = 3) -> str:
        """The newest errors; where there are none, the newest lines."""
        errors = [text for severity, text in self.lines if severity in _ERRORS]
        texts = dict.fromkeys((errors or [text for _, text in self.lines])[-count:])
        return "; ".join(texts) or "its log is empty"


def make_logger(library: TensorRt, log: Log) -> Any:
    """A logger of TensorRT's kind that keeps what is worth quoting."""

    class Logger(library.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, msg: str) -> None:
            if severity.name in (*_ERRORS, "WARNING"):
                log.add(severity.name, msg)

    return Logger()
