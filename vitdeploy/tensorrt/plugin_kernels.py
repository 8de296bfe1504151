"""The compiled kernel behind each plugin of a graph: which launch it is, how its grid follows the batch."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vitdeploy.config import BatchRange
from vitdeploy.errors import DeviceUnavailable, ExportError, MissingDependency
from vitdeploy.tensorrt.plugin_graph import PluginSpec

if TYPE_CHECKING:
    from vitdeploy_kernels.config import Config, Table
    from vitdeploy_kernels.launch import Launch

_PROBES = (1, 2, 3, 64)
"""Batch sizes at which the grid is held against the rule."""


@dataclass(frozen=True)
class PluginKernel:
    """What TensorRT launches for one operator on one architecture.

    Attributes:
        spec: the operator.
        arch: of the GPU that the kernel was compiled for.
        name: of the entry in the PTX.
        ptx: pointers of the inputs first, of the outputs last.
        threads: per program.
        shared: bytes of dynamic shared memory per program.
        programs: per image; N images are N times as many, all along the first axis of the grid.
    """

    spec: PluginSpec
    arch: str
    name: str
    ptx: str
    threads: int
    shared: int
    programs: int


def refusal(spec: PluginSpec) -> str | None:
    """Why the kernel does not compute an operator, in its own words; None if it does."""
    attention, support = _library("attention"), _library("support")
    answer = attention.supports(_meta(spec, 1, 3), spec.heads, 1.0)
    return str(answer.reason) if isinstance(answer, support.Unsupported) else None


def compile_plugins(
    specs: Sequence[PluginSpec], arch: str, batch: BatchRange, *, table: Table | None = None
) -> tuple[PluginKernel, ...]:
    """Compile the kernel of each operator; needs no GPU.

    Args:
        specs: of a marked graph (:func:`vitdeploy.tensorrt.plugin_graph.plugin_specs`).
        arch: of the GPU the engine is for, ``sm_86``.
        batch: the engine's profile; the configuration is the best for ``opt``.
        table: of configurations; the one that is shipped for the architecture when omitted.

    Raises:
        DeviceUnavailable: the kernels are not for this architecture.
        ExportError: a kernel cannot be compiled into a plugin.
        MissingDependency: Triton is not installed.
    """
    aot, tables = _library("aot"), _library("config")
    target = target_of(arch)
    chosen = table or tables.shipped_table(aot.ARCHITECTURES[target])
    try:
        return tuple(_kernel(spec, target, batch.opt, chosen) for spec in specs)
    except aot.AotError as error:
        raise ExportError(f"plugins for {arch}: {error}", hint="build without --plugins") from error


def target_of(arch: str) -> str:
    """What is compiled for a GPU. Kernels for sm_80 and sm_89 run on all later 8.x, the others on their own.

    Raises:
        DeviceUnavailable: the kernels run on no GPU of this architecture.
    """
    known = _library("aot").ARCHITECTURES
    if arch in known:
        return arch
    older = [name for name in known if arch.startswith("sm_8") and len(arch) == 5 and name < arch]
    if not older:
        raise DeviceUnavailable(
            f"there are no plugins for {arch}", hint=f"known: {', '.join(known)}; or build without --plugins"
        )
    return str(max(older))


def attention_launch(spec: PluginSpec, config: Config, batch: int) -> Launch:
    """The launch of an operator for ``batch`` images, as the plugin makes it: over tensors without memory."""
    launch: Launch = _library("attention").launch(
        _meta(spec, batch, 3), _meta(spec, batch, 1), heads=spec.heads, scale=1.0, config=config
    )
    constant: Launch = _library("ptx").with_constant_floats(launch)
    return constant


def programs_per_image(launch_of: Callable[[int], Launch]) -> int:
    """How many programs an image takes, where the batch does nothing but multiply them.

    Args:
        launch_of: the launch for a number of images.

    Raises:
        AotError: the grid depends on the batch in another way, which no plugin would be told.
    """
    programs = launch_of(1).grid[0]
    for batch in _PROBES:
        launch = launch_of(batch)
        if launch.grid != (batch * programs,):
            raise _library("aot").AotError(
                f"{launch.name} has {programs} programs for one image, but {launch.grid} for {batch}"
            )
    return programs


def _kernel(spec: PluginSpec, arch: str, batch: int, table: Table) -> PluginKernel:
    aot, ptx, pool = _library("aot"), _library("ptx"), _library("compile_pool")
    # For more, whoever launches must ask the driver first, and nothing says that TensorRT does.
    most = _library("driver").LARGE_SHARED
    config = table.config("attention", (batch * spec.heads, spec.tokens, spec.width))
    needed = 0
    for smaller in _configs(config):
        launch = attention_launch(spec, smaller, batch)
        # In a process of its own: the kernels of this one may be the interpreter's.
        compiled = pool.compile_all([(arch, launch)])[arch, aot.launch_key(launch)]
        if compiled.shared <= most:
            made = ptx.plugin_ptx(compiled, launch, inputs=("qkv_ptr",), outputs=("out_ptr",))
            programs = programs_per_image(functools.partial(attention_launch, spec, smaller))
            return PluginKernel(spec, arch, made.name, made.text, 32 * made.warps, made.shared, programs)
        needed = compiled.shared
    raise aot.AotError(f"{spec.op} needs {needed} bytes of shared memory, and a plugin has {most}")


def _configs(config: Config) -> Iterator[Config]:
    """The configuration, and after it some that need less shared memory."""
    yield config
    if config.stages > 1:
        config = dataclasses.replace(config, stages=1)
        yield config
    while config.block_n > 16:
        config = dataclasses.replace(config, block_n=config.block_n // 2)
        yield config


def _meta(spec: PluginSpec, batch: int, parts: int) -> Any:
    """An operator's input (three parts) or output (one)."""
    import torch

    size = (batch, spec.tokens, parts * spec.heads * spec.width)
    return torch.empty(size, dtype=getattr(torch, spec.dtype), device="meta")


def _library(name: str) -> Any:
    """A module of the kernels' package."""
    try:
        return importlib.import_module(f"vitdeploy_kernels.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("torch", "triton"):
            raise
        missing = str(error.name).partition(".")[0]
        raise MissingDependency(missing, extra="kernels", purpose="--plugins") from error
