"""A TensorRT without TensorRT: a module with the names of one recorded version, and no others.

It parses ONNX graphs with onnx, "builds" them into bytes behind a header like the real one, and runs them
with ONNX Runtime over host memory. It proves which calls are made, with which names and in which order,
and what happens when they fail; it proves nothing of TensorRT's own arithmetic or speed.

What a version does not have raises AttributeError, what it does not take TypeError; what it has and the
double does not play raises NotImplementedError. tests/oracles/tensorrt holds the lists of names.
"""

from __future__ import annotations

import types
from typing import Any

from tests.fakes import tensorrt_build as build
from tests.fakes import tensorrt_inspector as inspector
from tests.fakes import tensorrt_network as network
from tests.fakes import tensorrt_run as run
from tests.fakes.tensorrt_names import Call, Library, Played, bind, inside

VERSIONS = ("10.8.0.43", "10.16.1.11", "11.4.0.106", "rtx-1.7.1.116")


def make_tensorrt(version: str, gpu: tuple[int, int] | None = (8, 9)) -> types.ModuleType:
    """The module of one of ``VERSIONS``, on a machine with a GPU of this compute capability."""
    played = {
        name: value
        for part in (build, inspector, network, run)
        for name, value in vars(part).items()
        if isinstance(value, type) and issubclass(value, Played) and value is not Played
    }
    library = Library(version, gpu, played)
    module = types.ModuleType("tensorrt_rtx" if library.rtx else "tensorrt", __doc__)
    module.__dict__["_library"] = library
    module.__dict__["__version__"] = library.symbols["version"]
    for name, made in library.enums.items():
        if "." not in name:
            setattr(module, name, made)

    def made_when_asked(name: str) -> Any:
        if "." in name or name not in library.symbols["classes"]:
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
        return library.class_of(name)

    module.__dict__["__getattr__"] = made_when_asked
    for name, text in library.symbols["constants"].items():
        setattr(module, name, library.constant(text))
    for name, overloads in library.symbols["functions"].items():
        setattr(module, name, _function(name, overloads))
    return module


def calls_of(thing: Any) -> list[Call]:
    """What was called, in order: on one object, or, of a module, on all its objects."""
    if isinstance(thing, types.ModuleType):
        return [call for _, call in thing.__dict__["_library"].journal]
    played = inside(thing, always=True)
    return [call for owner, call in played.library.journal if owner is played]


def _function(name: str, overloads: list[str]) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        bind(name, overloads, args, kwargs)
        raise NotImplementedError(f"the double does not play {name}")

    return call
