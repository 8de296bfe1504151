"""Doubles of ONNX Runtime with GPU providers: they have what the real one has, and nothing else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import onnxruntime

from vitdeploy.backends import onnxruntime_providers as providers

# The option names that stand in libonnxruntime_providers_tensorrt.so of the wheels onnxruntime-gpu 1.23.2 and
# 1.31.1 (the same in both), which https://onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.html
# describes.
TENSORRT_OPTIONS = {
    *("device_id", "has_user_compute_stream", "trt_auxiliary_streams", "trt_bf16_enable"),
    *("trt_build_heuristics_enable", "trt_builder_optimization_level", "trt_context_memory_sharing_enable"),
    *("trt_cuda_graph_enable", "trt_detailed_build_log", "trt_dla_core", "trt_dla_enable"),
    *("trt_dump_ep_context_model", "trt_dump_subgraphs", "trt_engine_cache_enable", "trt_engine_cache_path"),
    *("trt_engine_cache_prefix", "trt_engine_decryption_enable", "trt_engine_decryption_lib_path"),
    *("trt_engine_hw_compatible", "trt_ep_context_embed_mode", "trt_ep_context_file_path"),
    *("trt_external_data_bytestream", "trt_external_data_bytestream_size", "trt_extra_plugin_lib_paths"),
    *("trt_force_sequential_engine_build", "trt_force_timing_cache", "trt_fp16_enable"),
    *("trt_int8_calibration_table_name", "trt_int8_enable", "trt_int8_use_native_calibration_table"),
    *("trt_layer_norm_fp32_fallback", "trt_load_user_initializer", "trt_max_partition_iterations"),
    *("trt_max_workspace_size", "trt_min_subgraph_size", "trt_onnx_bytestream", "trt_onnx_bytestream_size"),
    *("trt_onnx_model_folder_path", "trt_op_types_to_exclude", "trt_preview_features"),
    *("trt_profile_max_shapes", "trt_profile_min_shapes", "trt_profile_opt_shapes", "trt_sparsity_enable"),
    *("trt_tactic_sources", "trt_timing_cache_enable", "trt_timing_cache_path"),
    "trt_weight_stripped_engine_enable",
}
# Those of tensorrt_rtx_provider_options.h in the wheel onnxruntime-ep-nv-tensorrt-rtx-cu13 0.5.0.
RTX_OPTIONS = {
    *("has_user_compute_stream", "user_compute_stream", "user_aux_stream_array", "nv_max_workspace_size"),
    *("nv_max_shared_mem_size", "nv_length_aux_stream_array", "nv_dump_subgraphs", "nv_detailed_build_log"),
    *("nv_profile_min_shapes", "nv_profile_max_shapes", "nv_profile_opt_shapes", "enable_cuda_graph"),
    *("nv_multi_profile_enable", "nv_use_external_data_initializer", "nv_runtime_cache_path"),
    *("VkExternalComputeQueueDataParamsNV_data", "nv_weight_streaming_budget", "nv_op_types_to_exclude"),
    *("nv_enable_profiling", "nv_profiling_output_file", "nv_use_sync_gpu_allocator"),
    *("nv_persistent_context_memory", "nv_multi_rotary_cache_concat_offset", "nv_target_sm"),
    "nv_weight_stripped_engine_enable_experimental",
}
TENSORRT, RTX, CUDA, CPU = (providers.PROVIDERS[name] for name in ("tensorrt", "tensorrt-rtx", "cuda", "cpu"))


class Double:
    """ONNX Runtime with other providers; what a test does not replace is the real one's."""

    def __init__(self, *available: str, version: str = onnxruntime.__version__, **replaced: Any) -> None:
        self.__version__, self.available, self.devices = version, [*available, CPU], []
        self.registered: list[tuple[str, str]] = []
        for name, value in replaced.items():
            assert hasattr(onnxruntime, name), name
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(onnxruntime, name)

    def get_available_providers(self) -> list[str]:
        return self.available

    def get_ep_devices(self) -> list[Any]:
        return [*onnxruntime.get_ep_devices(), *self.devices]

    def register_execution_provider_library(self, name: str, path: str) -> None:
        self.registered.append((name, path))
        self.devices = [SimpleNamespace(ep_name=name)]
        self.available = [*self.available, name]


class Settings:
    """The real session settings, with providers that are only written down."""

    def __init__(self) -> None:
        self.__dict__["real"], self.__dict__["added"] = onnxruntime.SessionOptions(), []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.real, name, value)

    def add_provider_for_devices(self, devices: list[Any], options: dict[str, str]) -> None:
        assert hasattr(self.real, "add_provider_for_devices")
        self.added.append((devices, options))

    def add_provider(self, name: str, options: dict[str, str]) -> None:
        assert hasattr(self.real, "add_provider")
        self.added.append((name, options))
