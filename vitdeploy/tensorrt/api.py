"""The calls of TensorRT's Python API that vitdeploy makes, by TensorRT's own names.

The bindings carry no type information, and their native library is not everywhere. A test holds every name
here against the recorded symbols of TensorRT 10 and 11 and of TensorRT for RTX; what only some of them have
stands in a class of its own, named after who has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

Shape = Sequence[int]
Buffer = Any
"""Bytes, a memory map, or what a builder returns."""
Member = Any
"""A member of an enum; its ``name`` says which."""


class ITensor(Protocol):
    name: str
    dtype: Member
    shape: Shape


class ILayer(Protocol):
    name: str
    type: Member
    metadata: str
    num_inputs: int
    num_outputs: int

    def get_input(self, index: int) -> ITensor | None: ...
    def get_output(self, index: int) -> ITensor | None: ...


class INetworkDefinition(Protocol):
    num_layers: int
    num_inputs: int
    num_outputs: int

    def get_layer(self, index: int) -> ILayer: ...
    def get_input(self, index: int) -> ITensor: ...
    def get_output(self, index: int) -> ITensor: ...


class ParserError(Protocol):
    def code(self) -> Member: ...
    def desc(self) -> str: ...
    def node_name(self) -> str: ...
    def node_operator(self) -> str: ...


class OnnxParser(Protocol):
    num_errors: int

    def parse_from_file(self, model: str) -> bool: ...
    def get_error(self, index: int) -> ParserError: ...


class IOptimizationProfile(Protocol):
    def set_shape(self, input: str, min: Shape, opt: Shape, max: Shape) -> None: ...


class IHostMemory(Protocol):
    nbytes: int

    def __buffer__(self, flags: int, /) -> memoryview: ...


class ITimingCache(Protocol):
    def serialize(self) -> IHostMemory: ...
    def combine(self, input_cache: ITimingCache, ignore_mismatch: bool) -> bool: ...


class IBuilderConfig(Protocol):
    builder_optimization_level: int
    hardware_compatibility_level: Member
    profiling_verbosity: Member
    progress_monitor: Any

    def set_flag(self, flag: Member) -> None: ...
    def clear_flag(self, flag: Member) -> None: ...
    def set_memory_pool_limit(self, pool: Member, pool_size: int) -> None: ...
    def add_optimization_profile(self, profile: IOptimizationProfile) -> int: ...
    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache | None: ...
    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool: ...
    def get_timing_cache(self) -> ITimingCache | None: ...


class RtxBuilderConfig(IBuilderConfig, Protocol):
    """TensorRT for RTX alone builds for GPUs that need not be here."""

    num_compute_capabilities: int

    def set_compute_capability(self, compute_capability: Member, index: int) -> bool: ...


class Builder(Protocol):
    def create_network(self, flags: int) -> INetworkDefinition: ...
    def create_builder_config(self) -> IBuilderConfig: ...
    def create_optimization_profile(self) -> IOptimizationProfile: ...
    def build_serialized_network(
        self, network: INetworkDefinition, config: IBuilderConfig
    ) -> IHostMemory | None: ...


class EngineInspector(Protocol):
    execution_context: Any

    def get_engine_information(self, format: Member) -> str: ...


class IExecutionContext(Protocol):
    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool: ...
    def set_input_shape(self, name: str, shape: Shape) -> bool: ...
    def set_tensor_address(self, name: str, memory: int) -> bool: ...
    def set_device_memory(self, memory: int, size: int) -> None: ...
    def execute_async_v3(self, stream_handle: int) -> bool: ...


class IRuntimeConfig(Protocol):
    """How an execution context is made."""


class ICudaEngine(Protocol):
    num_io_tensors: int
    num_layers: int
    num_optimization_profiles: int
    device_memory_size_v2: int
    refittable: bool

    def get_tensor_name(self, index: int) -> str: ...
    def get_tensor_mode(self, name: str) -> Member: ...
    def get_tensor_dtype(self, name: str) -> Member: ...
    def get_tensor_shape(self, name: str) -> Shape: ...
    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Shape]: ...
    def create_execution_context(self, *how: Member | IRuntimeConfig) -> IExecutionContext | None: ...
    def create_engine_inspector(self) -> EngineInspector: ...


class IRuntimeCache(Protocol):
    """TensorRT for RTX alone: the kernels it compiles when an engine is first run."""

    def serialize(self) -> IHostMemory: ...
    def deserialize(self, blob: bytes) -> bool: ...


class RtxRuntimeConfig(IRuntimeConfig, Protocol):
    cuda_graph_strategy: Member

    def create_runtime_cache(self) -> IRuntimeCache: ...
    def set_runtime_cache(self, cache: IRuntimeCache) -> bool: ...


class RtxCudaEngine(ICudaEngine, Protocol):
    def create_runtime_config(self) -> RtxRuntimeConfig: ...


class Runtime(Protocol):
    engine_host_code_allowed: bool

    def deserialize_cuda_engine(self, serialized_engine: Buffer) -> ICudaEngine | None: ...


class Refitter(Protocol):
    def refit_cuda_engine(self) -> bool: ...
    def get_missing_weights(self) -> list[str]: ...


class OnnxParserRefitter(Protocol):
    def refit_from_file(self, model: str) -> bool: ...


_Refitter = Refitter  # within TensorRt, the name is the function that makes one


class NetworkDefinitionCreationFlag(Protocol):
    STRONGLY_TYPED: Member


class BuilderFlag(Protocol):
    TF32: Member
    REFIT: Member
    STRIP_PLAN: Member
    REFIT_IDENTICAL: Member
    VERSION_COMPATIBLE: Member


class HardwareCompatibilityLevel(Protocol):
    AMPERE_PLUS: Member


class HardwareCompatibilityLevelSince1013(HardwareCompatibilityLevel, Protocol):
    SAME_COMPUTE_CAPABILITY: Member


class MemoryPoolType(Protocol):
    WORKSPACE: Member


class ProfilingVerbosity(Protocol):
    DETAILED: Member


class LayerInformationFormat(Protocol):
    JSON: Member


class TensorIOMode(Protocol):
    INPUT: Member


class ExecutionContextAllocationStrategy(Protocol):
    USER_MANAGED: Member


class CudaGraphStrategy(Protocol):
    """TensorRT for RTX alone."""

    WHOLE_GRAPH_CAPTURE: Member


class TensorRt(Protocol):
    """The module: ``tensorrt`` or ``tensorrt_rtx``."""

    __version__: str
    ILogger: Any
    IProgressMonitor: Any
    NetworkDefinitionCreationFlag: NetworkDefinitionCreationFlag
    BuilderFlag: BuilderFlag
    HardwareCompatibilityLevel: HardwareCompatibilityLevel
    MemoryPoolType: MemoryPoolType
    ProfilingVerbosity: ProfilingVerbosity
    LayerInformationFormat: LayerInformationFormat
    TensorIOMode: TensorIOMode
    ExecutionContextAllocationStrategy: ExecutionContextAllocationStrategy

    def Builder(self, logger: Any) -> Builder: ...
    def OnnxParser(self, network: INetworkDefinition, logger: Any) -> OnnxParser: ...
    def Runtime(self, logger: Any) -> Runtime: ...
    def Refitter(self, engine: ICudaEngine, logger: Any) -> Refitter: ...
    def OnnxParserRefitter(self, refitter: _Refitter, logger: Any) -> OnnxParserRefitter: ...


class TensorRtForRtx(TensorRt, Protocol):
    ComputeCapability: Any
    CudaGraphStrategy: CudaGraphStrategy
