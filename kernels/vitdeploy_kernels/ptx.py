"""PTX in the form that a TensorRT plugin takes: pointers of inputs, integers, pointers of outputs, no more.

TensorRT launches the kernel itself and knows nothing of Triton. Parameters are read by name, so putting
them in TensorRT's order means putting their declarations in that order; the hidden pointers to scratch
memory that Triton appends may go where nothing reads them.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitdeploy_kernels.aot import SCRATCH, AotError, Compiled, parameter_names
from vitdeploy_kernels.launch import Launch

ISA_VERSIONS = ("7.0", "7.8", "8.0", "8.1", "8.3", "8.4", "8.5", "8.6", "8.7", "8.8", "9.0", "9.1", "9.2")
"""Versions of the PTX language that a kernel may be labelled with, oldest first: every driver since knows
it. Triton labels with the newest its assembler knows, which a driver of the same year may refuse."""

_ENTRY = re.compile(r"(\.entry\s+(\w+)\s*\()(.*?)(\n?\))", re.DOTALL)
_VERSION = re.compile(r"^\.version\s+(\d+\.\d+)\s*$", re.MULTILINE)
_TARGET = re.compile(r"^\.target\s+(\w+)", re.MULTILINE)
_MEMORY = ("ld.", "st.", "cp.async", "red.", "atom.", "ldmatrix", "stmatrix")
_INSTRUCTION = re.compile(r"^\s*(?:@!?%\w+\s+)?([a-z][\w.:]*)\s+([^;]+);", re.MULTILINE)
_THREADS = re.compile(r"^\.(?:reqntid|maxntid)\s+(\d+)", re.MULTILINE)


@dataclass(frozen=True)
class PluginPtx:
    """A kernel for one architecture, as TensorRT launches it.

    Attributes:
        name: of the entry.
        arch: ``sm_90``.
        text: the PTX.
        isa: the version of the PTX language it is labelled with.
        shared: bytes of dynamic shared memory.
        warps: of 32 threads, per program.
        parameters: the launch's arguments in the order of the entry's parameters.
    """

    name: str
    arch: str
    text: str
    isa: str
    shared: int
    warps: int
    parameters: tuple[str, ...]


def with_constant_floats(launch: Launch) -> Launch:
    """The same launch with its floats compiled in: a plugin passes integers only."""
    floats = {name: value for name, value in launch.arguments.items() if isinstance(value, float)}
    rest = {name: value for name, value in launch.arguments.items() if name not in floats}
    return dataclasses.replace(launch, arguments=rest, constants={**launch.constants, **floats})


def plugin_ptx(
    compiled: Compiled,
    launch: Launch,
    *,
    inputs: Sequence[str],
    integers: Sequence[str] = (),
    outputs: Sequence[str],
) -> PluginPtx:
    """Put a compiled kernel into the form that a plugin takes, and have ptxas read the result.

    Args:
        compiled: what ``launch`` was compiled to.
        inputs: names of the launch's arguments that are the plugin's inputs, in its order.
        integers: those that are computed from shapes, int32.
        outputs: those that are the plugin's outputs.

    Raises:
        AotError: the names are not the launch's arguments, an argument is no pointer or int32, the kernel
            wants scratch memory, the PTX is not as expected, or ptxas refuses it.
    """
    names = tuple(name for name in parameter_names(launch.kernel) if name in launch.arguments)
    wanted = (*inputs, *integers, *outputs)
    _check_arguments(compiled, names, wanted, set(integers))
    declared = _declarations(compiled)
    places = {name: declared[place] for place, name in enumerate(names)}
    for place in range(len(names), len(declared)):
        _check_unread(compiled, declared[place])
    _check_accesses(compiled, names, {*inputs}, {*outputs})
    text = _ENTRY.sub(
        lambda entry: entry[1] + ",".join(f"\n\t{places[name]}" for name in wanted) + "\n)",
        compiled.ptx,
        count=1,
    )
    threads = _THREADS.search(text)
    if threads is None or int(threads[1]) != 32 * compiled.warps:
        raise AotError(f"{compiled.name} does not say that it runs {compiled.warps} warps")
    text, isa = _oldest_isa(text, compiled)
    return PluginPtx(compiled.name, compiled.arch, text, isa, compiled.shared, compiled.warps, wanted)


def _check_arguments(
    compiled: Compiled, names: tuple[str, ...], wanted: tuple[str, ...], integers: set[str]
) -> None:
    name = compiled.name
    if sorted(names) != sorted(wanted):
        raise AotError(f"{name} takes {', '.join(names)}, and the plugin would pass {', '.join(wanted)}")
    if compiled.global_scratch or compiled.profile_scratch:
        sizes = f"{compiled.global_scratch} and {compiled.profile_scratch} bytes"
        raise AotError(f"{name} needs scratch memory ({sizes}), which a plugin does not have")
    types = compiled.parameters[: len(names)]
    if {*compiled.parameters[len(names) :]} - {SCRATCH} or len(types) != len(names):
        raise AotError(f"{name} was compiled with the parameters {', '.join(compiled.parameters)}")
    for argument, kind in zip(names, types, strict=True):
        if kind == "fp32":
            raise AotError(f"{name}: {argument} is a float, which a plugin cannot pass; compile it in")
        if kind == "i64":
            raise AotError(f"{name}: {argument} has 64 bits, and a plugin passes integers of 32")
        if (kind == "i32") != (argument in integers):
            raise AotError(f"{name}: {argument} is {kind}, and would be passed as something else")


def _declarations(compiled: Compiled) -> tuple[str, ...]:
    """The entry's parameters as they are declared, hidden ones included."""
    entries = _ENTRY.findall(compiled.ptx)
    if len(entries) != 1 or entries[0][1] != compiled.name:
        raise AotError(
            f"the PTX has the entries {[entry[1] for entry in entries]}, not {compiled.name} alone"
        )
    declared = tuple(part.strip() for part in entries[0][2].split(","))
    expected = tuple(f"{compiled.name}_param_{place}" for place in range(len(compiled.parameters)))
    if tuple(part.split()[-1] for part in declared) != expected:
        raise AotError(f"{compiled.name} does not have the parameters {', '.join(compiled.parameters)}")
    return declared


def _check_unread(compiled: Compiled, declaration: str) -> None:
    name = declaration.split()[-1]
    if len(re.findall(rf"\b{re.escape(name)}\b", compiled.ptx)) != 1:
        raise AotError(f"{compiled.name} reads its scratch memory ({name})")


def _check_accesses(compiled: Compiled, names: Sequence[str], inputs: set[str], outputs: set[str]) -> None:
    """Inputs are only read, and outputs are written: whoever confuses two pointers is found here."""
    read, written = accesses(compiled.ptx)
    place = {f"{compiled.name}_param_{i}": name for i, name in enumerate(names)}
    through = {place[parameter] for parameter in written} & (
        inputs | outputs
    )  # integers are in addresses, too
    if through != outputs:
        raise AotError(f"{compiled.name} writes to {sorted(through)}, and the outputs are {sorted(outputs)}")
    if unread := inputs - {place[parameter] for parameter in read}:
        raise AotError(f"{compiled.name} does not read its inputs {sorted(unread)}")


def accesses(text: str) -> tuple[set[str], set[str]]:
    """The parameters of PTX through which memory is read, and those through which it is written.

    An address belongs to every parameter that its registers were computed from, anywhere in the text;
    what was loaded from memory is no address.
    """
    instructions = [(found[1], found[2]) for found in _INSTRUCTION.finditer(text)]
    origins: dict[str, set[str]] = {}
    for opcode, operands in instructions:
        if opcode.startswith("ld.param"):
            register, parameter = re.findall(r"[\w%$.]+", operands)[:2]
            origins[register] = {parameter}
    before = -1
    while before != (before := sum(map(len, origins.values()))):
        for opcode, operands in instructions:
            if not opcode.startswith(_MEMORY):
                result, *sources = re.findall(r"%\w+", operands) or [""]
                found = set().union(*(origins.get(source, set()) for source in sources))
                if found:
                    origins.setdefault(result, set()).update(found)
    read: set[str] = set()
    written: set[str] = set()
    for opcode, operands in instructions:
        if "global" in opcode and opcode.startswith(_MEMORY):
            address = re.findall(r"\[([^]]*)\]", operands)[-1]
            at = set().union(*(origins.get(name, set()) for name in re.findall(r"%\w+", address)))
            (written if opcode.startswith(("st.", "red.", "atom.")) else read).update(at)
    return read, written


def _oldest_isa(text: str, compiled: Compiled) -> tuple[str, str]:
    """The PTX labelled with the oldest version of the language that has all it uses."""
    labelled = _VERSION.search(text)
    if labelled is None:
        raise AotError(f"the PTX of {compiled.name} has no version")
    for version in ISA_VERSIONS:
        if _number(version) < _number(labelled[1]):
            older = _VERSION.sub(f".version {version}", text)
            try:
                assemble(older, compiled.arch)
            except AotError:
                continue
            return older, version
    assemble(text, compiled.arch)
    return text, labelled[1]


def _number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def assemble(text: str, arch: str) -> bytes:
    """The cubin that Triton's ptxas makes of PTX.

    Raises:
        AotError: it is for another architecture, ptxas is missing, or refuses it; in its words.
    """
    target = _TARGET.search(text)
    if target is None or target[1].rstrip("af") != arch:
        raise AotError(f"the PTX is for {target[1] if target else 'no architecture'}, not for {arch}")
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(text, encoding="utf-8")
        command = [_ptxas(arch), f"--gpu-name={target[1]}", str(source), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            complaints = [line for line in done.stderr.splitlines() if "error" in line or "fatal" in line]
            reason = (complaints or [f"exit status {done.returncode}"])[0]
            raise AotError(f"ptxas refuses the kernel for {arch}: {reason.split('kernel.ptx, ')[-1].strip()}")
        return cubin.read_bytes()


def _ptxas(arch: str) -> str:
    try:
        from triton.backends.nvidia.compiler import get_ptxas
    except ImportError as error:
        raise AotError("ptxas comes with Triton: pip install 'vitdeploy[kernels]'") from error
    tool: Any = get_ptxas(int(arch.removeprefix("sm_")))
    return str(tool.path)
