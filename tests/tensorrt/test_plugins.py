"""Registration, against a double of ``tensorrt.plugin`` that has its names and is as strict as it is.

The double follows the Python sources of the bindings 10.13.2.6, 10.16.1.11 and 11.4.0.106: what a decorator
checks, in which order the callbacks come, and what they may return.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from vitdeploy.errors import DeviceUnavailable, ExportError, UsageError
from vitdeploy.tensorrt.plugin_graph import ATTENTION, PluginSpec
from vitdeploy.tensorrt.plugin_kernels import PluginKernel
from vitdeploy.tensorrt.plugins import plugin_module, register_plugins

SPEC = PluginSpec(ATTENTION, "float16", tokens=197, heads=12, width=64)
KERNEL = PluginKernel(SPEC, "sm_90", "attention_kernel", "// ptx", threads=128, shared=40960, programs=48)
HALF, BF16 = object(), object()


class SymInt32:
    """An expression in the batch size N: a number, or computed from others when N is known."""

    def __init__(self, value: int | SymInt32 | Callable[[int], int]) -> None:
        assert isinstance(value, int | SymInt32) or callable(value), (
            f"float expressions do not exist: {value}"
        )
        self.at: Callable[[int], int] = (
            value.at if isinstance(value, SymInt32) else value if callable(value) else lambda _: value
        )

    def __mul__(self, other: int | SymInt32) -> SymInt32:
        right = SymInt32(other)
        return SymInt32(lambda n: self.at(n) * right.at(n))

    __rmul__ = None  # type: ignore[assignment]  # int * expression is not defined


class ShapeExpr(SymInt32):
    pass


class TensorDesc:
    def __init__(self, shape_expr: tuple[SymInt32, ...], dtype: object, shape: Any = None) -> None:
        self.shape_expr, self.dtype, self._shape = shape_expr, dtype, shape

    @property
    def shape(self) -> Any:
        if self._shape is None:
            raise ValueError("no shape at this stage")
        return iter(self._shape)


class KernelLaunchParams:
    def __init__(self) -> None:
        for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z"):
            setattr(self, name, 1)
        self.shared_mem = 0

    def __setattr__(self, name: str, value: Any) -> None:
        names = ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_mem")
        assert name in names, f"no attribute {name!r}"
        self.__dict__[name] = SymInt32(value)


class SymIntExprs(list[Any]):
    def __init__(self, length: int) -> None:
        super().__init__([None] * length)


class Plugin:
    """``tensorrt.plugin``: what is registered, as TensorRT would take it."""

    TensorDesc, KernelLaunchParams, SymIntExprs = TensorDesc, KernelLaunchParams, SymIntExprs

    def __init__(self) -> None:
        self.described: dict[str, Callable[..., TensorDesc]] = {}
        self.compiled: dict[str, Callable[..., Any]] = {}

    @staticmethod
    def from_shape_expr(shape_expr: tuple[Any, ...], dtype: object) -> TensorDesc:
        return TensorDesc(tuple(map(ShapeExpr, shape_expr)), dtype)

    def register(self, plugin_id: str, lazy_register: bool = False) -> Callable[[Any], Any]:
        namespace, name = plugin_id.split("::")
        if "." in plugin_id or namespace in ("", "trt", "tensorrt", "std"):
            raise ValueError(f"reserved: {plugin_id}")
        if plugin_id in self.described:
            raise ValueError(f"'_Op' already has a defintion for '{name}'")

        def decorator(function: Any) -> Any:
            signature = inspect.signature(function)
            for parameter in signature.parameters.values():
                assert parameter.default is inspect.Parameter.empty
                # Anything else would be an attribute of the plugin, and these were not to be.
                assert issubclass(parameter.annotation, TensorDesc)
            assert issubclass(signature.return_annotation, TensorDesc)
            self.described[plugin_id] = function
            return function

        return decorator

    def aot_impl(self, plugin_id: str) -> Callable[[Any], Any]:
        if plugin_id not in self.described:
            raise ValueError(f"Plugin {plugin_id} is not registered")

        def decorator(function: Any) -> Any:
            signature = inspect.signature(function)
            inputs = [*inspect.signature(self.described[plugin_id]).parameters]
            assert [*signature.parameters] == [*inputs, "outputs", "tactic"]
            kinds = {name: parameter.annotation for name, parameter in signature.parameters.items()}
            assert typing.get_origin(kinds["outputs"]) is tuple
            assert issubclass(typing.get_args(kinds["outputs"])[0], TensorDesc)
            assert issubclass(kinds["tactic"], int)
            assert typing.get_origin(signature.return_annotation) is tuple
            name, code, launch, extra = typing.get_args(signature.return_annotation)
            assert {name, code} <= {str, bytes}
            assert issubclass(launch, KernelLaunchParams)
            assert issubclass(extra, SymIntExprs)
            self.compiled[plugin_id] = function
            return function

        return decorator


def tensorrt(version: str = "10.13.2.6", **without: Any) -> Any:
    """The module ``tensorrt``, as far as plugins need it."""
    module = SimpleNamespace(
        __name__="tensorrt",
        __version__=version,
        DataType=SimpleNamespace(HALF=HALF, BF16=BF16),
        QuickPluginCreationRequest=object(),
        plugin=Plugin(),
    )
    for name, value in without.items():
        if value is None:
            delattr(module, name)
        else:
            setattr(module, name, value)
    return module


def qkv(dtype: object = HALF, shape: tuple[int, ...] = (-1, 197, 2304)) -> TensorDesc:
    sizes = tuple(ShapeExpr((lambda n: n) if size == -1 else size) for size in shape)
    return TensorDesc(sizes, dtype, shape)


@pytest.mark.parametrize("version", ["10.13.2.6", "10.16.1.11", "11.4.0.106"])
def test_the_output_has_the_batch_of_the_input(version: str) -> None:
    trt = tensorrt(version)
    register_plugins(trt, [KERNEL])
    described = trt.plugin.described["vitdeploy::fused_attention"]
    # First TensorRT asks for the dtype, when no shape is known, and later for the shape.
    out = described(qkv=TensorDesc(qkv().shape_expr, HALF))
    assert out.dtype is HALF
    assert [[size.at(n) for size in out.shape_expr] for n in (1, 8)] == [[1, 197, 768], [8, 197, 768]]


def test_the_launch_follows_the_batch() -> None:
    trt = tensorrt()
    register_plugins(trt, [KERNEL])
    given = qkv()
    name, code, launch, extra = trt.plugin.compiled["vitdeploy::fused_attention"](given, (given,), 0)
    assert (name, code, [*extra]) == ("attention_kernel", "// ptx", [])
    for batch in (1, 3, 64):
        sizes = {key: value.at(batch) for key, value in vars(launch).items()}
        assert sizes == {
            "grid_x": 48 * batch, "grid_y": 1, "grid_z": 1,
            "block_x": 128, "block_y": 1, "block_z": 1, "shared_mem": 40960,
        }  # fmt: skip


@pytest.mark.parametrize("given", [qkv(BF16), qkv(shape=(-1, 257, 2304)), qkv(shape=(-1, 197, 768))])
def test_a_tensor_of_another_kind_is_refused(given: TensorDesc) -> None:
    trt = tensorrt()
    register_plugins(trt, [KERNEL])
    with pytest.raises(ExportError, match="fused_attention was compiled for PluginSpec"):
        trt.plugin.compiled["vitdeploy::fused_attention"](given, (given,), 0)


def test_bfloat16() -> None:
    trt = tensorrt()
    spec = PluginSpec(ATTENTION, "bfloat16", 197, 12, 64)
    register_plugins(trt, [PluginKernel(spec, "sm_90", "k", "", 128, 0, 48)])
    assert trt.plugin.compiled[spec.plugin](qkv(BF16), (), 0)[0] == "k"


def test_tensorrt_for_rtx_has_no_such_plugins() -> None:
    with pytest.raises(UsageError, match="TensorRT for RTX takes no plugins") as caught:
        register_plugins(tensorrt("1.7.1.116", __name__="tensorrt_rtx"), [KERNEL])
    assert "--format tensorrt" in str(caught.value.hint)


def test_an_older_tensorrt_says_what_to_install() -> None:
    trt = tensorrt("10.8.0.43", QuickPluginCreationRequest=None)
    with pytest.raises(DeviceUnavailable, match=r"TensorRT 10\.8\.0\.43 has no plugins") as caught:
        register_plugins(trt, [KERNEL])
    assert "TensorRT 10.9" in str(caught.value.hint)
    assert not trt.plugin.described


def test_twice_is_an_error() -> None:
    trt = tensorrt()
    with pytest.raises(ExportError, match="two kernels for one operator"):
        register_plugins(trt, [KERNEL, KERNEL])
    register_plugins(trt, [KERNEL])
    with pytest.raises(ExportError, match=r"refuses the plugin vitdeploy::fused_attention: .* already has"):
        register_plugins(trt, [KERNEL])


def test_the_submodule_is_imported_where_it_is_not_there_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    submodule = SimpleNamespace()
    monkeypatch.setitem(__import__("sys").modules, "tensorrt.plugin", submodule)
    assert plugin_module(tensorrt(plugin=None)) is submodule
