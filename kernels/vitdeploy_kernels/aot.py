"""Ahead-of-time compilation: a launch becomes a cubin for an architecture, on a machine without a GPU.

What is compiled is what :meth:`Launch.run` would compile on a GPU, but that pointers are assumed to be
aligned to 16 bytes; whoever runs the cubin checks that. One cubin serves every batch size.
"""

from __future__ import annotations

import ast
import difflib
import functools
import hashlib
import inspect
import json
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitdeploy_kernels.gemm import INTERPRETED
from vitdeploy_kernels.launch import Constant, Launch
from vitdeploy_kernels.occupancy import LIMITS, TENSOR_COLUMNS

ARCHITECTURES: Mapping[str, tuple[int, int]] = {
    "sm_80": (8, 0),
    "sm_89": (8, 9),
    "sm_90": (9, 0),
    "sm_100": (10, 0),
    "sm_120": (12, 0),
}
"""Architectures by name, with their compute capability."""

ALIGNMENT = 16
"""Bytes that every pointer of a compiled kernel is assumed to be a multiple of."""

SCRATCH = "scratch"
"""Type of the hidden pointers that Triton appends; they are null as long as their sizes are 0."""

POINTERS: Mapping[torch.dtype, str] = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}

_PTX_TYPES = {"i32": "u32", "i64": "u64", "fp32": "f32"}


class AotError(RuntimeError):
    """A launch cannot be compiled ahead of time; the message says what and why."""


@dataclass(frozen=True)
class Signature:
    """What Triton's compiler is told about a kernel's parameters.

    Attributes:
        types: of every parameter, in order; ``constexpr`` for a constant.
        constants: their values.
        attributes: by the parameter's place; the divisibility of pointers.
    """

    types: Mapping[str, str]
    constants: Mapping[str, Constant]
    attributes: Mapping[tuple[int, ...], list[list[Any]]]

    @property
    def parameters(self) -> tuple[str, ...]:
        """Types of what is passed at run time, in order."""
        return tuple(kind for kind in self.types.values() if kind != "constexpr")


@dataclass(frozen=True)
class Compiled:
    """A kernel for one architecture.

    Attributes:
        name: of the function in the cubin.
        arch: ``sm_90``.
        cubin: the binary; without line information, so that it names no path and is the same every time.
        ptx: what it was assembled from.
        shared: bytes of dynamic shared memory.
        warps: per program.
        parameters: types of the run-time parameters in order, hidden ones (``scratch``) included.
        global_scratch: bytes of scratch memory it would need; always 0, more is refused.
        profile_scratch: the same for Triton's profiler.
        tensor_columns: of tensor memory (sm_100).
        triton: the version that compiled it.
    """

    name: str
    arch: str
    cubin: bytes
    ptx: str
    shared: int
    warps: int
    parameters: tuple[str, ...]
    global_scratch: int
    profile_scratch: int
    tensor_columns: int
    triton: str


def capability_of(arch: str) -> tuple[int, int]:
    """The compute capability of an architecture by name.

    Raises:
        AotError: unknown; names the nearest known one.
    """
    if arch in ARCHITECTURES:
        return ARCHITECTURES[arch]
    near = difflib.get_close_matches(arch, ARCHITECTURES, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}? " if near else ""
    raise AotError(f"unknown architecture {arch!r}: {hint}known are {', '.join(ARCHITECTURES)}")


def signature(launch: Launch) -> Signature:
    """Types, constants and attributes of a launch's kernel.

    Raises:
        AotError: a parameter that the launch does not give, one that the kernel does not have, or a type
            that cannot be passed.
    """
    names = parameter_names(launch.kernel)
    given = [*launch.arguments, *launch.constants]
    if sorted(names) != sorted(given):
        missing, unknown = sorted({*names} - {*given}), sorted({*given} - {*names})
        raise AotError(f"{launch.name}: not given: {missing}; not a parameter, or given twice: {unknown}")
    types = {
        name: "constexpr" if name in launch.constants else type_of(name, launch.arguments[name])
        for name in names
    }
    attributes: dict[tuple[int, ...], list[list[Any]]] = {
        (place,): [["tt.divisibility", ALIGNMENT]]
        for place, kind in enumerate(types.values())
        if kind.startswith("*")
    }
    return Signature(types, dict(launch.constants), attributes)


@functools.cache
def parameter_names(kernel: Any) -> tuple[str, ...]:
    """All parameters of a kernel in order, constants included."""
    return tuple(inspect.signature(kernel.fn).parameters)


def type_of(name: str, value: Tensor | int | float) -> str:
    """Triton's name for the type of an argument.

    Raises:
        AotError: no kernel takes it.
    """
    if isinstance(value, Tensor):
        if value.dtype not in POINTERS:
            raise AotError(f"{name}: no kernel takes a tensor of {value.dtype}")
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if type(value) is not int:
        raise AotError(f"{name} must be a tensor, an integer or a float, not {value!r}")
    if not -(2**63) <= value < 2**63:
        raise AotError(f"{name} is out of range: {value}")
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def launch_key(launch: Launch) -> str:
    """What tells one cubin of an architecture from another, as 64 hexadecimal digits.

    It covers the kernel's source and that of every function it calls (Triton's own apart), constants,
    types, warps and stages; not the grid, and not the values that are passed at run time.
    """
    told = signature(launch)
    document = {
        "kernel": kernel_source(launch.kernel),
        "types": [*told.types.items()],
        "constants": told.constants,
        "options": launch.options,
    }
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


@functools.cache
def kernel_source(kernel: Any) -> str:
    """A digest of the source of a kernel and of all it uses; the same for every version of Triton."""
    found: dict[str, str] = {}
    _collect(kernel.fn, found)
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def _collect(function: Callable[..., Any], found: dict[str, str]) -> None:
    name = f"{function.__module__}.{function.__qualname__}"
    if name in found:
        return
    found[name] = source = textwrap.dedent(inspect.getsource(function))
    scope = function.__globals__
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            value = scope.get(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            value = getattr(scope.get(node.value.id), node.attr, None)
        else:
            continue
        if value is INTERPRETED:  # false in all that is compiled
            continue
        called = getattr(value, "fn", None)
        if inspect.isfunction(called) and not called.__module__.startswith("triton."):
            _collect(called, found)
        elif type(value).__name__ == "constexpr" or type(value) in (bool, int, float, str):
            found[f"{name}: {ast.unparse(node)}"] = repr(getattr(value, "value", value))


def compile_launch(launch: Launch, arch: str) -> Compiled:
    """Compile the kernel of a launch; its tensors may be meta tensors, and no GPU is needed.

    Raises:
        AotError: an unknown architecture, no Triton, a kernel that the interpreter has taken, a compiler
            error, or a kernel that no GPU of the architecture could launch.
    """
    major, minor = capability_of(arch)
    told = signature(launch)
    triton = _compiler()
    if not isinstance(launch.kernel, triton.JITFunction):
        raise AotError(
            f"{launch.name} is the interpreter's: compile it in a process without TRITON_INTERPRET"
        )
    source = triton.compiler.ASTSource(
        launch.kernel, dict(told.types), dict(told.constants), dict(told.attributes)
    )
    target = triton.backends.compiler.GPUTarget("cuda", 10 * major + minor, 32)
    try:
        with triton.knobs.compilation.scope():
            triton.knobs.compilation.disable_line_info = True
            binary = triton.compile(source, target=target, options=launch.options)
    except Exception as error:
        raise AotError(f"{launch.name} for {arch}: {_reason(error)}") from error
    facts = binary.metadata
    compiled = Compiled(
        name=str(facts.name),
        arch=arch,
        cubin=bytes(binary.asm["cubin"]),
        ptx=str(binary.asm["ptx"]),
        shared=int(facts.shared),
        warps=int(facts.num_warps),
        parameters=_parameters(launch.name, told, str(binary.asm["ptx"])),
        global_scratch=int(facts.global_scratch_size),
        profile_scratch=int(facts.profile_scratch_size),
        tensor_columns=int(facts.tmem_size or 0),
        triton=str(triton.__version__),
    )
    _check_launchable(compiled)
    return compiled


def _compiler() -> Any:
    try:
        import triton
        import triton.backends.compiler
        import triton.compiler
    except ImportError as error:
        raise AotError("compiling kernels needs Triton: pip install 'vitdeploy[kernels]'") from error
    return triton


def _reason(error: BaseException) -> str:
    """The last line of the error at the bottom; those above it show code."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1].strip() if lines else 'no message'}"


def _parameters(name: str, told: Signature, ptx: str) -> tuple[str, ...]:
    """The kernel's parameters as the PTX has them: the signature's, and the hidden ones behind."""
    actual = ptx_parameters(ptx)
    hidden = len(actual) - len(told.parameters)
    parameters = told.parameters + (SCRATCH,) * hidden
    if actual != tuple(_PTX_TYPES.get(kind, "u64") for kind in parameters):
        raise AotError(f"{name}: Triton passes {actual}, and the launch {told.parameters}")
    return parameters


def ptx_parameters(ptx: str) -> tuple[str, ...]:
    """Types of the entry point's parameters, in order: u64 (a pointer, too), u32, f32."""
    entry = re.search(r"\.entry\s+\w+\s*\((.*?)\n\s*\)", ptx, re.DOTALL)
    return tuple(re.findall(r"\.param\s+\.(\w+)", entry[1])) if entry else ()


def _check_launchable(compiled: Compiled) -> None:
    limit = LIMITS[ARCHITECTURES[compiled.arch]].shared_per_program
    if compiled.global_scratch or compiled.profile_scratch:
        raise AotError(f"{compiled.name} needs scratch memory, which nothing here provides")
    if compiled.shared > limit:
        raise AotError(
            f"{compiled.name} needs {compiled.shared} bytes of shared memory, "
            f"and {compiled.arch} has {limit} for a program: fewer stages or smaller tiles"
        )
    if compiled.tensor_columns > TENSOR_COLUMNS:
        raise AotError(
            f"{compiled.name} needs {compiled.tensor_columns} columns of tensor memory of {TENSOR_COLUMNS}"
        )
