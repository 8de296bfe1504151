"""The double's loggers, builder, its configuration and its timing cache."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import onnx

from tests.fakes.tensorrt_names import Library, Played
from tests.fakes.tensorrt_network import Dims, ILayer, INetworkDefinition, ITensor
from tests.fakes.tensorrt_plan import CAPABILITY_BITS, Plan, Profile


class ILogger(Played):
    callback = True


class Logger(Played):
    callback = True

    def __init__(self, library: Library, min_severity: Any = None) -> None:
        super().__init__(library)
        self.min_severity = min_severity or self.member("ILogger.Severity.WARNING")

    def log(self, severity: Any, msg: str) -> None:
        if severity.value <= self.min_severity.value:
            print(f"[TRT] [{severity.name[0]}] {msg}", file=sys.stderr)


class IProgressMonitor(Played):
    callback = True


class IHostMemory(Played):
    def __init__(self, library: Library, data: bytes) -> None:
        super().__init__(library)
        self.data = data
        self.nbytes = len(data)
        self.dtype = self.member("DataType.INT8")

    def __bytes__(self) -> bytes:
        return self.data


class IOptimizationProfile(Played):
    def __init__(self, library: Library) -> None:
        super().__init__(library)
        self.shapes: Profile = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self.shapes[input] = [[int(size) for size in shape] for shape in (min, opt, max)]

    def get_shape(self, input: str) -> list[Dims]:
        return [Dims(self.library, shape) for shape in self.shapes.get(input, ())]

    @property
    def valid(self) -> bool:
        """Shapes of one rank, each size in order; a profile that is not does not get into a configuration."""
        return all(
            len({len(shape) for shape in shapes}) == 1
            and all(0 <= low <= best <= high for low, best, high in zip(*shapes, strict=True))
            for shapes in self.shapes.values()
        )


class ITimingCache(Played):
    """What was timed, for one version and one GPU; that of TensorRT for RTX never learns anything."""

    def __init__(self, library: Library, data: bytes = b"") -> None:
        super().__init__(library)
        fields = json.loads(data) if data else {}
        self.origin = fields.get("origin", self.here)
        self.builds = fields.get("builds", 0)
        self.timed = set(fields.get("timed", ()))

    @property
    def here(self) -> list[Any]:
        return [list(self.library.version), list(self.library.gpu or ())]

    def serialize(self) -> IHostMemory:
        fields = {"origin": self.origin, "builds": self.builds, "timed": sorted(self.timed)}
        return IHostMemory(self.library, json.dumps(fields).encode())

    def combine(self, input_cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if input_cache.origin != self.origin and not ignore_mismatch:
            return False
        self.timed |= input_cache.timed
        return True

    def reset(self) -> bool:
        self.timed.clear()
        return True

    def learn(self, layers: list[ILayer]) -> tuple[int, int]:
        """Time what was not timed before; how many were, and how many were not."""
        if self.library.rtx:
            return 0, 0
        wanted = {f"{layer.type.name} {[list(tensor.shape) for tensor in layer.inputs]}" for layer in layers}
        found = wanted & self.timed
        self.timed |= wanted
        self.builds += 1
        return len(found), len(wanted - found)


class IBuilderConfig(Played):
    def __init__(self, library: Library, logger: Any) -> None:
        super().__init__(library)
        self.logger = logger
        self.reset()

    def reset(self) -> None:
        self._flags = {"TF32"}
        self._pools: dict[str, int] = {}
        self._cache: ITimingCache | None = None
        self.profiles: list[IOptimizationProfile] = []
        self.builder_optimization_level = 3
        self.max_aux_streams = -1
        self.avg_timing_iterations = 1
        self.hardware_compatibility_level = self.member("HardwareCompatibilityLevel.NONE")
        self.profiling_verbosity = self.member("ProfilingVerbosity.LAYER_NAMES_ONLY")
        self.progress_monitor: Any = None
        self.targets: list[Any] = []

    num_optimization_profiles = property(lambda self: len(self.profiles))

    def set_flag(self, flag: Any) -> None:
        self._flags.add(self._of(flag, "BuilderFlag").name)

    def clear_flag(self, flag: Any) -> None:
        self._flags.discard(self._of(flag, "BuilderFlag").name)

    def get_flag(self, flag: Any) -> bool:
        return self._of(flag, "BuilderFlag").name in self._flags

    @property
    def flags(self) -> int:
        return sum(1 << self.member(f"BuilderFlag.{name}").value for name in self._flags)

    def flag_names(self) -> list[str]:
        return sorted(self._flags)

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self._pools[self._of(pool, "MemoryPoolType").name] = int(pool_size)

    def get_memory_pool_limit(self, pool: Any) -> int:
        return self._pools.get(self._of(pool, "MemoryPoolType").name, 1 << 34)

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        if not profile.valid:
            return -1
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: Any) -> ITimingCache | None:
        try:
            return ITimingCache(self.library, bytes(serialized_timing_cache))
        except ValueError:
            self.error("the timing cache cannot be read")
            return None

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if cache.origin != cache.here and not ignore_mismatch:
            self.error("the timing cache is of another version or another GPU")
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache | None:
        return self._cache

    @property
    def num_compute_capabilities(self) -> int:
        return len(self.targets)

    @num_compute_capabilities.setter
    def num_compute_capabilities(self, count: int) -> None:
        self.targets = [self.member("ComputeCapability.NONE")] * count

    def set_compute_capability(self, compute_capability: Any, index: int) -> bool:
        if not 0 <= index < len(self.targets):
            return False
        self.targets[index] = self._of(compute_capability, "ComputeCapability")
        return True

    def get_compute_capability(self, index: int) -> Any:
        return self.targets[index]

    def _of(self, value: Any, enum: str) -> Any:
        if not isinstance(value, self.library.enums[enum]):
            raise TypeError(f"incompatible function arguments: {value!r} is no {enum}")
        return value


class Builder(Played):
    def __init__(self, library: Library, logger: Any) -> None:
        super().__init__(library)
        self.logger = logger
        need_gpu(self)

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        bit = self.member("NetworkDefinitionCreationFlag.STRONGLY_TYPED").value
        always = self.library.rtx or self.library.version[0] >= 11
        return INetworkDefinition(self.library, strongly_typed=always or bool(flags >> bit & 1))

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig(self.library, self.logger)

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile(self.library)

    def is_network_supported(self, network: INetworkDefinition, config: IBuilderConfig) -> bool:
        return next(problems(network, config), None) is None

    def build_serialized_network(
        self, network: INetworkDefinition, config: IBuilderConfig
    ) -> IHostMemory | None:
        for problem in problems(network, config):
            self.error(f"IBuilder::buildSerializedNetwork: {problem}")
            return None
        if not report_progress(network, config.progress_monitor):
            return None
        if (cache := config.get_timing_cache()) and not config.get_flag(
            self.member("BuilderFlag.DISABLE_TIMING_CACHE")
        ):
            hits, misses = cache.learn(network.layers)
            verbose = self.member("ILogger.Severity.VERBOSE")
            self.logger.log(verbose, f"Timing cache: {hits} hits, {misses} misses")
        return IHostMemory(self.library, make_plan(network, config).to_bytes())


def need_gpu(asked: Builder | Any) -> None:
    """TensorRT's own builder and runtime cannot be made without a GPU; that is all that Python hears of it.

    https://github.com/NVIDIA/TensorRT/issues/2913
    """
    if asked.library.gpu is None and not asked.library.rtx:
        asked.error("CUDA initialization failure with error: 35. Please check your CUDA installation")
        raise TypeError("pybind11::init(): factory function returned nullptr")


def problems(network: INetworkDefinition, config: IBuilderConfig) -> Iterator[str]:
    """Why a build fails."""
    flags = config.flag_names()
    if not network.outputs:
        yield "API Usage Error (Network must have at least one output.)"
    dynamic = [tensor for tensor in network.inputs if -1 in list(tensor.shape)]
    if dynamic and not config.profiles:
        yield "API Usage Error (Network has dynamic inputs, but no optimization profile has been defined.)"
    for tensor in network.inputs if config.profiles else ():
        if not all(_fits(tensor, profile.shapes.get(tensor.name)) for profile in config.profiles):
            yield f"API Usage Error ({tensor.name}: its optimization profile does not fit its shape.)"
    if network.strongly_typed and (wide := {"FP16", "BF16", "INT8", "FP8"}.intersection(flags)):
        yield f"API Usage Error (flags {sorted(wide)} are not for strongly typed networks.)"
    targets = {target.value for target in config.targets}
    if network.library.gpu is None and ("STRIP_PLAN" in flags or 1 in targets):
        yield "Cuda Runtime (cudaError 35: CUDA driver version is insufficient for CUDA runtime version)"
    types = {tensor.dtype.name for layer in network.layers for tensor in layer.outputs}
    for narrow, lacking in (("BF16", {75}), ("FP8", {75, 80, 86})):
        if narrow in types and (without := targets & lacking):
            names = ",".join(f"sm{target}" for target in sorted(without))
            yield f"Myelin (Cannot compile for target(s) {names}, because the model contains {narrow})"


def _fits(tensor: ITensor, shapes: list[list[int]] | None) -> bool:
    own = list(tensor.shape)
    if shapes is None:
        return -1 not in own
    return all(
        len(shape) == len(own) and all(size in (-1, given) for size, given in zip(own, shape, strict=True))
        for shape in shapes
    )


def report_progress(network: INetworkDefinition, monitor: Any) -> bool:
    """Go through the phases of a build; False if the monitor stops it."""
    if monitor is None:
        return True
    phases = (("Building engine", None, 2), ("Optimizing graph", "Building engine", len(network.layers)))
    for name, parent, steps in phases:
        monitor.phase_start(name, parent, steps)
    going = all(monitor.step_complete("Optimizing graph", step) for step in range(len(network.layers)))
    monitor.phase_finish("Optimizing graph")
    going = going and all(monitor.step_complete("Building engine", step) for step in range(2))
    monitor.phase_finish("Building engine")
    return going


def make_plan(network: INetworkDefinition, config: IBuilderConfig) -> Plan:
    """What the engine of a network carries."""
    assert network.model is not None
    library = network.library
    model = onnx.ModelProto()
    model.CopyFrom(network.model)
    if "STRIP_PLAN" in config.flag_names():
        strip(model)
    targets = [target.value for target in config.targets if target.value in CAPABILITY_BITS]
    return Plan(
        rtx=library.rtx,
        version=library.version,
        model=model.SerializeToString(deterministic=True),
        profiles=[profile.shapes for profile in config.profiles],
        flags=config.flag_names(),
        verbosity=config.profiling_verbosity.name,
        compatibility=config.hardware_compatibility_level.name,
        gpu=None if library.rtx else library.gpu,
        targets=targets or [target for target in CAPABILITY_BITS if target != 75] if library.rtx else [],
    )


def strip(model: onnx.ModelProto) -> None:
    """Leave the shapes of floating-point weights, and take their values away."""
    for weight in model.graph.initializer:
        if weight.data_type not in (onnx.TensorProto.INT64, onnx.TensorProto.INT32):
            for field in ("raw_data", "float_data", "int32_data"):
                weight.ClearField(field)
