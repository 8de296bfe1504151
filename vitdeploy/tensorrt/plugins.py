"""Our kernels as TensorRT plugins compiled ahead of time: the engine carries them, and needs no Python.

TensorRT has such plugins from 10.9 on. Two functions describe one, with prescribed parameters: its output's
shape and dtype, and its kernel with a launch that follows the batch. No attribute is registered: all a
kernel must know is compiled in, and TensorRT 10 cannot read a number with NumPy 2.4.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import GenericAlias
from typing import Any, Protocol

from vitdeploy.errors import DeviceUnavailable, ExportError, UsageError
from vitdeploy.tensorrt.plugin_kernels import PluginKernel

SINCE = "10.9"
_DTYPES = {"float16": "HALF", "bfloat16": "BF16"}
"""Of operators, as members of TensorRT's DataType."""


class PluginModule(Protocol):
    """What is used of ``tensorrt.plugin``, by TensorRT's own names."""

    TensorDesc: type
    KernelLaunchParams: Any
    SymIntExprs: Any

    def register(self, plugin_id: str) -> Callable[[Any], Any]: ...
    def aot_impl(self, plugin_id: str) -> Callable[[Any], Any]: ...
    def from_shape_expr(self, shape_expr: tuple[Any, ...], dtype: Any) -> Any: ...


def register_plugins(trt: Any, kernels: Sequence[PluginKernel]) -> None:
    """Make operators known to TensorRT's parser, for the rest of the process.

    Args:
        trt: the module ``tensorrt``.
        kernels: one for each operator of the graph, all for the GPU that the engine is built on.

    Raises:
        UsageError: ``trt`` is TensorRT for RTX, which has no such plugins.
        DeviceUnavailable: this TensorRT is too old for them.
        ExportError: an operator twice, or one that is registered already.
    """
    plugin = plugin_module(trt)
    names = [kernel.spec.plugin for kernel in kernels]
    if len({*names}) < len(names):
        raise ExportError(f"two kernels for one operator: {', '.join(names)}")
    for kernel in kernels:
        try:
            _register(trt, plugin, kernel)
        except ValueError as error:
            raise ExportError(f"TensorRT refuses the plugin {kernel.spec.plugin}: {error}") from error


def plugin_module(trt: Any) -> PluginModule:
    """``tensorrt.plugin``, if this TensorRT has plugins that are compiled ahead of time.

    Raises:
        UsageError: TensorRT for RTX.
        DeviceUnavailable: a TensorRT from before them.
    """
    name, version = trt.__name__, trt.__version__
    if name.startswith("tensorrt_rtx"):
        raise UsageError(
            "TensorRT for RTX takes no plugins that are compiled ahead of time",
            hint="build without --plugins, or with --format tensorrt",
        )
    if not hasattr(trt, "QuickPluginCreationRequest"):
        raise DeviceUnavailable(
            f"TensorRT {version} has no plugins that are compiled ahead of time",
            hint=f"they came with TensorRT {SINCE}: pip install -U tensorrt, or build without --plugins",
        )
    module: PluginModule = getattr(trt, "plugin", None) or importlib.import_module(f"{name}.plugin")
    return module


def _register(trt: Any, plugin: PluginModule, kernel: PluginKernel) -> None:
    spec = kernel.spec
    columns = spec.heads * spec.width
    dtype = getattr(trt.DataType, _DTYPES[spec.dtype])

    def describe(qkv: Any) -> Any:
        return plugin.from_shape_expr((qkv.shape_expr[0], spec.tokens, columns), qkv.dtype)

    def compiled(qkv: Any, outputs: Any, tactic: Any) -> Any:
        shape = tuple(qkv.shape)[1:]
        if qkv.dtype != dtype or shape != (spec.tokens, 3 * columns):
            raise ExportError(f"{spec.op} was compiled for {spec}, and is given {qkv.dtype} {shape}")
        launch = plugin.KernelLaunchParams()
        launch.grid_x = qkv.shape_expr[0] * kernel.programs
        launch.block_x = kernel.threads
        launch.shared_mem = kernel.shared
        return kernel.name, kernel.ptx, launch, plugin.SymIntExprs(0)

    # TensorRT reads the annotations as types, and these exist at run time only.
    tensor = plugin.TensorDesc
    describe.__annotations__ = {"qkv": tensor, "return": tensor}
    compiled.__annotations__ = {
        "qkv": tensor,
        "outputs": GenericAlias(tuple, (tensor,)),
        "tactic": int,
        "return": GenericAlias(tuple, (str, str, plugin.KernelLaunchParams, plugin.SymIntExprs)),
    }
    plugin.register(spec.plugin)(describe)
    plugin.aot_impl(spec.plugin)(compiled)
