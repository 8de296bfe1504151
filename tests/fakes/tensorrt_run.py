"""The double's runtime: its engines compute with ONNX Runtime, on host memory in the place of a GPU's."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, numpy_helper

from tests.fakes.tensorrt_build import IHostMemory, need_gpu
from tests.fakes.tensorrt_inspector import EngineInspector
from tests.fakes.tensorrt_names import Library, Played
from tests.fakes.tensorrt_network import Dims, INetworkDefinition, ITensor
from tests.fakes.tensorrt_plan import HEADER, BadPlan, Plan


class Runtime(Played):
    engine_header_size = HEADER.size

    def __init__(self, library: Library, logger: Any) -> None:
        super().__init__(library)
        self.logger = logger
        self.engine_host_code_allowed = False
        need_gpu(self)

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        try:
            plan = Plan.from_bytes(bytes(serialized_engine), rtx=self.library.rtx)
        except BadPlan as error:
            self.error(f"IRuntime::deserializeCudaEngine: Error Code 1: Serialization ({error})")
            return None
        if problem := self._problem(plan):
            self.error(f"IRuntime::deserializeCudaEngine: {problem}")
            return None
        return ICudaEngine(self.library, plan, self.logger)

    def get_engine_validity(self, buffer: Any) -> tuple[Any, int]:
        try:
            problem = self._problem(Plan.from_bytes(bytes(buffer), rtx=True))
        except BadPlan as error:
            problem = str(error)
        return self.member(f"EngineValidity.{'INVALID' if problem else 'VALID'}"), 0

    def _problem(self, plan: Plan) -> str | None:
        """Why an engine is not for this machine; the texts are those that users report of the real one."""
        gpu, version = self.library.gpu, self.library.version
        if gpu is None:
            return "Cuda Runtime (cudaError 35: CUDA driver version is insufficient for CUDA runtime version)"
        host_code = "VERSION_COMPATIBLE" in plan.flags and "EXCLUDE_LEAN_RUNTIME" not in plan.flags
        portable = "VERSION_COMPATIBLE" in plan.flags and plan.version < version
        if plan.version != version and not portable:
            ours, its = (".".join(map(str, numbers)) for numbers in (version, plan.version))
            what = "is not compatible with this version of TensorRT"
            return f"The engine plan file {what}, expecting library version {ours} got {its}, please rebuild."
        if host_code and not self.engine_host_code_allowed:
            return "Cannot deserialize engine with lean runtime: engine host code is not allowed."
        if plan.rtx:
            fits = gpu[0] * 10 + gpu[1] in plan.targets
        else:
            compatible = plan.compatibility == "AMPERE_PLUS" and gpu >= (8, 0)
            fits = plan.gpu == gpu or compatible
        if not fits:
            what = f"expecting compute {gpu[0]}.{gpu[1]} got compute {plan.gpu or plan.targets}"
            return f"The engine plan file is generated on an incompatible device, {what}, please rebuild."
        return None


class ICudaEngine(Played):
    """What does not depend on the shapes of one run."""

    num_aux_streams = 0
    name = "Unnamed Network 0"

    def __init__(self, library: Library, plan: Plan, logger: Any) -> None:
        super().__init__(library)
        self.plan, self.logger = plan, logger
        self.model = plan.model
        self.computes = not plan.stripped
        self.network = INetworkDefinition(library, strongly_typed=True)
        self.network.fill(onnx.load_from_string(plan.model))
        self.tensors = {tensor.name: tensor for tensor in (*self.network.inputs, *self.network.outputs)}
        self.refittable = bool({"REFIT", "STRIP_PLAN", "REFIT_IDENTICAL"}.intersection(plan.flags))
        self.num_io_tensors = len(self.tensors)
        self.num_optimization_profiles = max(1, len(plan.profiles))
        self.device_memory_size_v2 = 1 << 20
        self.hardware_compatibility_level = self.member(f"HardwareCompatibilityLevel.{plan.compatibility}")
        self.profiling_verbosity = self.member(f"ProfilingVerbosity.{plan.verbosity}")
        self._session: tuple[bytes, onnxruntime.InferenceSession] | None = None

    @property
    def num_layers(self) -> int:
        return len(EngineInspector(self.library, self).kernels)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        if name not in self.tensors:
            return self.member("TensorIOMode.NONE")
        return self.member(f"TensorIOMode.{'INPUT' if self.tensors[name].is_network_input else 'OUTPUT'}")

    def get_tensor_dtype(self, name: str) -> Any:
        return self.tensors[name].dtype

    def get_tensor_shape(self, name: str) -> Dims:
        return self.tensors[name].shape

    def get_tensor_location(self, name: str) -> Any:
        return self.member("TensorLocation.DEVICE")

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Dims]:
        return [Dims(self.library, shape) for shape in self.profile_shapes(name, profile_index)]

    def profile_shapes(self, name: str, index: int) -> list[list[int]]:
        if not self.plan.profiles:
            return [list(self.tensors[name].shape)] * 3
        return self.plan.profiles[index].get(name, [])

    def create_execution_context(self, strategy: Any = None, runtime_config: Any = None) -> IExecutionContext:
        given = strategy if isinstance(strategy, IRuntimeConfig) else runtime_config
        context = IExecutionContext(self.library, self, given)
        if strategy is self.member("ExecutionContextAllocationStrategy.USER_MANAGED"):
            context.memory = 0
        return context

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig(self.library)

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector(self.library, self)

    def serialize(self) -> IHostMemory:
        return IHostMemory(self.library, self.plan.to_bytes())

    def session(self) -> onnxruntime.InferenceSession:
        """What computes; made anew after a refit."""
        if self._session is None or self._session[0] != self.model:
            made = onnxruntime.InferenceSession(widen(self.model), providers=["CPUExecutionProvider"])
            self._session = (self.model, made)
        return self._session[1]


class IExecutionContext(Played):
    """One run at a time."""

    def __init__(self, library: Library, engine: ICudaEngine, config: IRuntimeConfig | None) -> None:
        super().__init__(library)
        self.engine, self.config, self.logger = engine, config, engine.logger
        self.active_optimization_profile = 0
        self._shapes: dict[str, list[int]] = {}
        self._addresses: dict[str, int] = {}
        self.memory = engine.device_memory_size_v2

    def set_device_memory(self, memory: int, size: int) -> None:
        if memory:
            self.memory = size

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if not 0 <= profile_index < self.engine.num_optimization_profiles:
            self.error(f"setOptimizationProfileAsync: there is no profile {profile_index}")
            return False
        self.active_optimization_profile = profile_index
        self._shapes.clear()
        return True

    def set_input_shape(self, name: str, shape: Any) -> bool:
        given = [int(size) for size in shape]
        low, _, high = self.engine.profile_shapes(name, self.active_optimization_profile)
        if len(given) != len(low) or not all(a <= x <= b for a, x, b in zip(low, given, high, strict=True)):
            self.error(
                f"setInputShape: {name} {given} does not satisfy any optimization profiles: {low} to {high}"
            )
            return False
        self._shapes[name] = given
        return True

    def infer_shapes(self) -> list[str]:
        return [tensor.name for tensor in self.engine.network.inputs if -1 in self._shape(tensor)]

    all_binding_shapes_specified = property(lambda self: not self.infer_shapes())

    def get_tensor_shape(self, name: str) -> Dims:
        return Dims(self.library, self._shape(self.engine.tensors[name]))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self.engine.tensors:
            self.error(f"setTensorAddress: there is no tensor {name}")
            return False
        self._addresses[name] = int(memory)
        return True

    def get_tensor_address(self, name: str) -> int:
        return self._addresses.get(name, 0)

    def execute_async_v3(self, stream_handle: int) -> bool:
        missing = [
            *self.infer_shapes(),
            *(name for name in self.engine.tensors if not self._addresses.get(name)),
        ]
        if self.memory < self.engine.device_memory_size_v2:
            missing.append("its working memory")
        if missing or not self.engine.computes:
            why = f"no shape or address of {', '.join(missing)}" if missing else "the engine has no weights"
            self.error(f"IExecutionContext::enqueueV3: API Usage Error ({why})")
            return False
        network = self.engine.network
        inputs = {tensor.name: self._memory(tensor).copy() for tensor in network.inputs}
        names = [tensor.name for tensor in network.outputs]
        answers = self.engine.session().run(names, inputs)
        for tensor, answer in zip(network.outputs, answers, strict=True):
            self._memory(tensor)[...] = answer
        if self.config is not None and self.config.cache is not None:
            self.config.cache.learn(inputs)
        return True

    def _shape(self, tensor: ITensor) -> list[int]:
        """Its shape as far as the inputs' shapes decide it."""
        known: dict[int | str, int] = {}
        for other in self.engine.network.inputs:
            known |= dict(zip(other.sizes, self._shapes.get(other.name, ()), strict=False))
        return [size if isinstance(size, int) else known.get(size, -1) for size in tensor.sizes]

    def _memory(self, tensor: ITensor) -> np.ndarray[Any, Any]:
        """What lies at a tensor's address."""
        names = {"FLOAT": "float32", "HALF": "float16", "BOOL": "bool"}
        dtype = np.dtype(names.get(tensor.dtype.name, tensor.dtype.name.lower()))
        shape = self._shape(tensor)
        size = int(np.prod(shape)) * dtype.itemsize
        raw = (ctypes.c_char * size).from_address(self._addresses[tensor.name])
        return np.frombuffer(raw, dtype).reshape(shape)


class IRuntimeConfig(Played):
    """How a context is made; that of TensorRT for RTX has a cache of the kernels it compiles."""

    def __init__(self, library: Library) -> None:
        super().__init__(library)
        self.cache: IRuntimeCache | None = None
        self._strategy = self.member("ExecutionContextAllocationStrategy.STATIC")
        if library.rtx:
            self.cuda_graph_strategy = self.member("CudaGraphStrategy.DISABLED")

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self._strategy = strategy

    def get_execution_context_allocation_strategy(self) -> Any:
        return self._strategy

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache(self.library)

    def set_runtime_cache(self, cache: IRuntimeCache | None = None) -> bool:
        self.cache = cache
        return True

    def get_runtime_cache(self) -> IRuntimeCache | None:
        return self.cache


class IRuntimeCache(Played):
    """Grows with each shape that is run for the first time."""

    MAGIC = b"runtime cache\n"

    def __init__(self, library: Library) -> None:
        super().__init__(library)
        self._entries: list[str] = []

    def learn(self, inputs: dict[str, np.ndarray[Any, Any]]) -> None:
        entry = str({name: array.shape for name, array in inputs.items()})
        if entry not in self._entries:
            self._entries.append(entry)

    def serialize(self) -> IHostMemory:
        return IHostMemory(self.library, self.MAGIC + "\n".join(self._entries).encode())

    def deserialize(self, blob: Any) -> bool:
        data = bytes(blob)
        if not data.startswith(self.MAGIC):
            return False
        self._entries = data.removeprefix(self.MAGIC).decode().split("\n")
        return True

    def reset(self) -> bool:
        self._entries.clear()
        return True


class Refitter(Played):
    """Gives an engine other weights of the same shapes."""

    def __init__(self, library: Library, engine: ICudaEngine, logger: Any) -> None:
        super().__init__(library)
        self.engine, self.logger = engine, logger
        self.model: bytes | None = None

    def get_all_weights(self) -> list[str]:
        return list(weights_of(onnx.load_from_string(self.engine.plan.model)))

    def get_missing_weights(self) -> list[str]:
        return [] if self.engine.computes or self.model is not None else self.get_all_weights()

    def refit_cuda_engine(self) -> bool:
        if not self.engine.refittable or self.get_missing_weights():
            self.error("IRefitter::refitCudaEngine: the engine is not refittable, or weights are missing")
            return False
        if self.model is not None:
            self.engine.model, self.engine.computes = self.model, True
        return True


class OnnxParserRefitter(Played):
    """Takes the weights from an ONNX file."""

    num_errors = 0

    def __init__(self, library: Library, refitter: Refitter, logger: Any) -> None:
        super().__init__(library)
        self.refitter, self.logger = refitter, logger

    def refit_from_file(self, model: str) -> bool:
        return self._take(onnx.load(model))

    def refit_from_bytes(self, model: Any, path: str | None = None) -> bool:
        return self._take(onnx.load_from_string(bytes(model)))

    def _take(self, model: onnx.ModelProto) -> bool:
        wanted = weights_of(onnx.load_from_string(self.refitter.engine.plan.model))
        if weights_of(model) != wanted:
            self.error("the weights of the ONNX model are not those of the engine")
            return False
        self.refitter.model = model.SerializeToString()
        return True


def weights_of(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """The weights of a model, with their types and shapes."""
    return {weight.name: (weight.data_type, *weight.dims) for weight in model.graph.initializer}


def widen(data: bytes) -> bytes:
    """The model with float32 for bfloat16, which ONNX Runtime has no kernels for on a CPU."""
    model, narrow, wide = onnx.load_from_string(data), TensorProto.BFLOAT16, TensorProto.FLOAT
    for weight in model.graph.initializer:
        if weight.data_type == narrow:
            values = numpy_helper.to_array(weight).astype(np.float32)
            weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == narrow:
                attribute.i = wide
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.type.tensor_type.elem_type == narrow:
            value.type.tensor_type.elem_type = wide
    return model.SerializeToString()
