"""Record which names TensorRT's Python bindings have, for tests/fakes/tensorrt.py.

    python tests/oracles/record_tensorrt_symbols.py tensorrt_cu13_bindings-*.whl -o tests/oracles/tensorrt
    python tests/oracles/record_tensorrt_symbols.py --module tensorrt_rtx -o tests/oracles/tensorrt

The wheels of the bindings hold an extension module without the native libraries that it links to. To import
it, and only to look at it, empty libraries of the same names are enough: nothing is called. It needs ``cc``
and ``readelf``, and the Python that the wheel is for.

``<version>.json`` holds ``classes`` with their bases, constructors and methods (one text for each overload:
parameters without self, ``=`` behind those that have a default, ``arg0`` and so on for those that have no
name), properties (``r`` or ``rw``), and constants; ``enums`` with the value of each member; ``functions``
and ``constants`` of the module.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

STUBBED = ("libnvinfer", "libnvonnxparser")
SPECIAL = ("__init__", "__len__", "__getitem__", "__setitem__", "__call__", "__enter__", "__exit__")
_OVERLOAD = re.compile(r"^\d+\. ", re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("wheels", nargs="*", type=Path, metavar="WHEEL")
    parser.add_argument("--module", help="an installed module instead of a wheel")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    arguments = parser.parse_args()
    for wheel in arguments.wheels:
        record_wheel(wheel, arguments.output.resolve())
    if arguments.module:
        record_module(arguments.module, arguments.output)


def record_wheel(wheel: Path, output: Path) -> None:
    """Record the bindings of one wheel, in a process of its own."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(root)
        extension = next(root.glob("*_bindings/*.so"))
        write_stubs(extension, root / "lib")
        environment = os.environ | {"LD_LIBRARY_PATH": str(root / "lib"), "PYTHONPATH": str(root)}
        command = [sys.executable, __file__, "--module", extension.parent.name, "-o", output]
        subprocess.run(command, env=environment, check=True)


def write_stubs(extension: Path, folder: Path) -> None:
    """Libraries of the names that an extension module links to, with functions that do nothing."""
    folder.mkdir()
    dynamic = read_elf(extension, "-d")
    symbols = read_elf(extension, "--dyn-syms")
    functions = re.findall(r" UND (?!Py|_)(\w+)$", symbols, re.MULTILINE)
    source = "".join(f"void *{name}(void) {{ return 0; }}\n" for name in functions)
    for name in re.findall(r"NEEDED.*\[(.*)\]", dynamic):
        if name.startswith(STUBBED):
            command = ["cc", "-shared", "-fPIC", "-x", "c", "-", f"-Wl,-soname,{name}", "-o", folder / name]
            subprocess.run(command, input=source, text=True, check=True)


def read_elf(path: Path, table: str) -> str:
    return subprocess.run(["readelf", "-W", table, path], capture_output=True, text=True, check=True).stdout


def record_module(name: str, output: Path) -> None:
    """Write the symbols of one module."""
    module = importlib.import_module(name)
    symbols = symbols_of(module)
    prefix = "rtx-" if "rtx" in name else ""
    path = output / f"{prefix}{module.__version__}.json"
    path.write_text(json.dumps(symbols, indent=1, sort_keys=True) + "\n")
    print(f"{path}: {len(symbols['classes'])} classes, {len(symbols['enums'])} enums")


def symbols_of(module: ModuleType) -> dict[str, Any]:
    """All that one module offers."""
    symbols: dict[str, Any] = {"classes": {}, "enums": {}, "functions": {}, "constants": {}}
    for name, value in public(vars(module)):
        if isinstance(value, type):
            add_class(name, value, symbols)
        elif inspect.isroutine(value):
            symbols["functions"][name] = signatures(value, bound=False)
    for name, value in public(vars(module)):
        if (owner := type(value).__name__) in symbols["enums"]:
            symbols["constants"][name] = f"{owner}.{value.name}"
    symbols["version"] = module.__version__
    return symbols


def add_class(name: str, cls: type, symbols: dict[str, Any]) -> None:
    """Enter a class, and the classes inside it, under its full name."""
    if members := getattr(cls, "__members__", None):
        symbols["enums"][name] = {member: int(value.value) for member, value in members.items()}
        return
    own = {
        key: value
        for key, value in vars(cls).items()
        if not key.startswith("_") or (key in SPECIAL and type(value) is not type(object.__init__))
    }
    entry: dict[str, Any] = {
        "bases": [base.__name__ for base in cls.__bases__ if base.__module__ == cls.__module__],
        "methods": {key: signatures(value) for key, value in own.items() if is_method(value)},
        "properties": {
            key: "r" if value.fset is None else "rw"
            for key, value in own.items()
            if isinstance(value, property)
        },
        "constants": {},
    }
    for key, value in own.items():
        if isinstance(value, type):
            add_class(f"{name}.{key}", value, symbols)
        elif not is_method(value) and not isinstance(value, property):
            entry["constants"][key] = f"{type(value).__qualname__}.{value.name}"
    symbols["classes"][name] = {key: value for key, value in entry.items() if value}


def is_method(value: Any) -> bool:
    return callable(value) and not isinstance(value, type)


def signatures(function: Any, bound: bool = True) -> list[str]:
    """The parameters of each overload, without self."""
    doc = inspect.getdoc(function) or ""
    if inspect.isfunction(function):
        return [format_signature(inspect.signature(function), bound)]
    heads = _OVERLOAD.split(doc)[1:] if "Overloaded function." in doc else [doc]
    return [", ".join(parameters(head.partition("\n")[0], bound)) for head in heads]


def format_signature(signature: inspect.Signature, bound: bool) -> str:
    """The parameters of a Python function."""
    names = [
        ("*" * (value.kind is value.VAR_POSITIONAL) + "**" * (value.kind is value.VAR_KEYWORD))
        + value.name
        + ("" if value.default is value.empty else "=")
        for value in signature.parameters.values()
    ]
    return ", ".join(names[1:] if bound else names)


def parameters(head: str, bound: bool) -> Iterator[str]:
    """The parameters in the first line of what pybind11 writes about a function."""
    for index, text in enumerate(split(head[head.index("(") + 1 :])):
        name, _, rest = text.partition(":")
        if index or not bound or name != "self":
            yield name.strip() + ("=" if " = " in rest else "")


def split(text: str) -> Sequence[str]:
    """Split what stands before the closing bracket at the commas that stand in no other bracket."""
    parts, depth, begin = [], 0, 0
    for index, character in enumerate(text.replace("->", "--")):
        if depth == 0 and character in ",)":
            parts.append(text[begin:index].strip())
            begin = index + 1
            if character == ")":
                break
        depth += (character in "([{<") - (character in ")]}>")
    return [part for part in parts if part]


def public(names: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name, value in sorted(names.items()) if not name.startswith("_"))


if __name__ == "__main__":
    main()
