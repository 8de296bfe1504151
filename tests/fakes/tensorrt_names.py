"""Classes that have the recorded names of one TensorRT version, and no other.

What a class does is written in a subclass of ``Played`` of the same name, whose methods and attributes carry
the recorded names as well; it never leaves the double. Outside stands a ``Limited`` object in front of it:
it takes the recorded parameters under their recorded names, refuses every other name, and keeps the journal.
"""

from __future__ import annotations

import enum
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from tests.helpers.paths import ORACLES

LISTS = ORACLES / "tensorrt"


class Call(NamedTuple):
    """One call, or one property that was set: its name is then ``builder_optimization_level=``."""

    name: str
    arguments: dict[str, Any]


class Library:
    """One version: its recorded names, the machine it is on, and what was called so far."""

    def __init__(self, version: str, gpu: tuple[int, int] | None, played: Mapping[str, type[Played]]) -> None:
        self.symbols = json.loads((LISTS / f"{version}.json").read_text())
        self.rtx = version.startswith("rtx-")
        self.version = tuple(int(part) for part in self.symbols["version"].split("."))
        self.gpu = gpu
        self.played = played
        self.journal: list[tuple[Played | None, Call]] = []
        self.enums = {name: make_enum(name, members) for name, members in self.symbols["enums"].items()}
        self.classes: dict[str, type[Limited]] = {}

    def class_of(self, name: str) -> type[Limited]:
        """The class that stands outside; made when somebody asks, for there are hundreds."""
        if name not in self.classes:
            self.classes[name] = make_class(self, name, self.symbols["classes"][name])
        return self.classes[name]

    def constant(self, text: str) -> Any:
        """``"DataType.HALF"`` as a member of its enum."""
        owner, _, member = text.rpartition(".")
        return self.enums[owner][member]

    def wrap(self, value: Any) -> Any:
        """What goes out: the limited object in front of a played one."""
        if isinstance(value, list):
            return [self.wrap(item) for item in value]
        if not isinstance(value, Played):
            return value
        if value.outside is None:
            value.outside = self.class_of(type(value).__name__).in_front_of(value)
        return value.outside


class Played:
    """What a recorded class does."""

    outside: Any = None
    """The limited object in front of it."""
    callback = False
    """Whether users write subclasses of it, which are called as they are."""

    def __init__(self, library: Library) -> None:
        self.library = library

    def member(self, text: str) -> Any:
        return self.library.constant(text)

    def error(self, message: str) -> None:
        """Tell the logger, as the real one does beside returning None or False."""
        self.logger.log(self.member("ILogger.Severity.ERROR"), message)

    logger: Any = None


class Limited:
    """Stands in front of a played object."""

    _played: Played

    @classmethod
    def in_front_of(cls, played: Played) -> Any:
        made = cls.__new__(cls)
        object.__setattr__(made, "_played", played)
        return made

    def __setattr__(self, name: str, value: Any) -> None:
        recorded = isinstance(getattr(type(self), name, None), property)
        if not recorded and "_recorded" in vars(type(self)):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        object.__setattr__(self, name, value)

    def __bool__(self) -> bool:
        return bool(getattr(self._played, "valid", True))


class LimitedMemory(Limited, bytes):
    """Bytes, since only those offer Python 3.11's buffers; of their own methods it shows none."""

    @classmethod
    def in_front_of(cls, played: Any) -> Any:
        made = bytes.__new__(cls, played.data)
        object.__setattr__(made, "_played", played)
        return made

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_") and name not in vars(type(self)):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return object.__getattribute__(self, name)

    def __len__(self) -> int:
        raise TypeError("object of type 'IHostMemory' has no len()")

    def __getitem__(self, key: Any) -> Any:
        raise TypeError("'IHostMemory' object is not subscriptable")

    def __iter__(self) -> Any:
        raise TypeError("'IHostMemory' object is not iterable")


class LimitedDims(Limited):
    """Compares with tuples and lists only, as the real one does."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, tuple | list):
            raise TypeError("__eq__(): incompatible function arguments")
        return tuple(self._played) == tuple(other)  # type: ignore[call-overload]

    def __repr__(self) -> str:
        return repr(tuple(self._played))  # type: ignore[call-overload]


_FRONTS: Mapping[str, type[Limited]] = {"IHostMemory": LimitedMemory, "Dims": LimitedDims}


def make_enum(name: str, members: Mapping[str, int]) -> type[enum.Enum]:
    """An enum of pybind11: its members are no integers, and turn into them."""
    made = enum.Enum(name.rpartition(".")[2], dict(members))  # type: ignore[misc]
    made.__int__ = made.__index__ = lambda self: self.value  # type: ignore[attr-defined]
    return made  # type: ignore[return-value]


def make_class(library: Library, name: str, entry: Mapping[str, Any]) -> type[Limited]:
    """The class in front of ``name``."""
    body: dict[str, Any] = {"_recorded": True, "__init__": make_constructor(library, name, entry)}
    for method, overloads in entry.get("methods", {}).items():
        if method != "__init__":
            body[method] = make_method(library, name, method, overloads)
    for key, access in entry.get("properties", {}).items():
        body[key] = make_property(library, name, key, writable=access == "rw")
    for key, text in entry.get("constants", {}).items():
        body[key] = library.constant(text)
    for full, made in library.enums.items():
        if full.rpartition(".")[0] == name:
            body[full.rpartition(".")[2]] = made
    bases = tuple(library.class_of(base) for base in entry.get("bases", ())) or (_FRONTS.get(name, Limited),)
    return type(name, bases, body)


def make_constructor(library: Library, name: str, entry: Mapping[str, Any]) -> Callable[..., None]:
    overloads = entry.get("methods", {}).get("__init__")

    def construct(self: Limited, *args: Any, **kwargs: Any) -> None:
        if overloads is None:
            raise TypeError(f"{name}: No constructor defined!")
        if name not in library.played:
            raise NotImplementedError(f"the double does not play {name}")
        arguments = bind(f"{name}.__init__", overloads, args, kwargs)
        played = library.played[name](library, **{key: inside(value) for key, value in arguments.items()})
        played.outside = self
        object.__setattr__(self, "_played", played)
        library.journal.append((played, Call("__init__", arguments)))

    return construct


def make_method(library: Library, owner: str, name: str, overloads: Sequence[str]) -> Callable[..., Any]:
    def call(self: Limited, *args: Any, **kwargs: Any) -> Any:
        arguments = bind(f"{owner}.{name}", overloads, args, kwargs)
        played = inside(self, always=True)
        library.journal.append((played, Call(name, arguments)))
        if name in ("__enter__", "__exit__"):
            return self if name == "__enter__" else None
        method = getattr(played, name, None)
        if method is None:
            raise NotImplementedError(f"the double does not play {owner}.{name}")
        return library.wrap(method(**{key: inside(value) for key, value in arguments.items()}))

    return call


def make_property(library: Library, owner: str, name: str, *, writable: bool) -> property:
    def read(self: Limited) -> Any:
        played = inside(self, always=True)
        if not hasattr(played, name):
            raise NotImplementedError(f"the double does not play {owner}.{name}")
        return library.wrap(getattr(played, name))

    def write(self: Limited, value: Any) -> None:
        before = read(self)
        if isinstance(before, enum.Enum) and type(value) is not type(before):
            raise TypeError(f"{owner}.{name} takes a {type(before).__name__}, not {value!r}")
        played = inside(self, always=True)
        library.journal.append((played, Call(f"{name}=", {"value": value})))
        setattr(played, name, inside(value))

    return property(read, write if writable else None)


def inside(value: Any, *, always: bool = False) -> Any:
    """What comes in: the played object behind a limited one; a user's subclass stays what it is."""
    if not isinstance(value, Limited):
        return value
    played = vars(value).get("_played")
    if played is None:
        raise TypeError(
            f"{type(value).__mro__[1].__name__}.__init__() must be called when overriding __init__"
        )
    return value if played.callback and not always else played


def bind(
    name: str, overloads: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments by parameter, of the first overload that takes them; those left out are left out."""
    for overload in overloads:
        try:
            return dict(signature(overload).bind(*args, **kwargs).arguments)
        except TypeError:
            continue
    known = "; ".join(f"({overload})" for overload in overloads)
    raise TypeError(f"{name}(): incompatible function arguments {args} {dict(kwargs)}; it takes {known}")


@cache
def signature(text: str) -> inspect.Signature:
    """The recorded parameters; those without a name cannot be given by name."""
    parameters = []
    for part in filter(None, text.split(", ")):
        name = part.rstrip("=")
        nameless = re.fullmatch(r"arg\d+", name)
        kind = inspect.Parameter.POSITIONAL_ONLY if nameless else inspect.Parameter.POSITIONAL_OR_KEYWORD
        default = None if part.endswith("=") else inspect.Parameter.empty
        parameters.append(inspect.Parameter(name, kind, default=default))
    return inspect.Signature(parameters)
