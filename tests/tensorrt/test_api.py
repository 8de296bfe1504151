"""What vitdeploy takes of TensorRT's API, held against the recorded names of each version."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import pytest

from tests.fakes.tensorrt import VERSIONS
from tests.fakes.tensorrt_names import LISTS, signature
from vitdeploy.tensorrt import api

RTX = VERSIONS[3:]
SINCE_1013 = VERSIONS[1:]
ONLY: Mapping[str, tuple[str, ...]] = {
    "CudaGraphStrategy": RTX,
    "IRuntimeCache": RTX,
    "IRuntimeConfig": SINCE_1013,
    "RtxBuilderConfig": RTX,
    "RtxCudaEngine": SINCE_1013,  # but what it makes there takes no cache: RtxRuntimeConfig
    "RtxRuntimeConfig": RTX,
    "TensorRtForRtx": RTX,
    "HardwareCompatibilityLevelSince1013": SINCE_1013,
}
"""Protocols of what not every version has."""
CLASSES = {
    name: value
    for name, value in vars(api).items()
    if inspect.isclass(value) and getattr(value, "_is_protocol", False) and value is not Protocol
}
SYMBOLS = {version: json.loads((LISTS / f"{version}.json").read_text()) for version in VERSIONS}


def real_name(cls: type) -> str:
    """A protocol is named after its class, and one that adds to another after who has the additions."""
    base = cls.__mro__[1]
    return cls.__name__ if base is Protocol else real_name(base)


def members(cls: type) -> Iterator[tuple[str, inspect.Signature | None]]:
    """Its own: attributes, and methods with their parameters."""
    for name in vars(cls).get("__annotations__", {}):
        if name != "__version__":
            yield name, None
    for name, value in vars(cls).items():
        if inspect.isfunction(value) and not name.startswith("_"):
            yield name, inspect.signature(value)


def problems(cls: type, symbols: Mapping[str, Any]) -> list[str]:
    """Members of a protocol that this version does not have, or takes otherwise."""
    name = real_name(cls)
    if name in symbols["enums"]:
        return [f"{name}.{member}" for member, _ in members(cls) if member not in symbols["enums"][name]]
    if name != "TensorRt" and name not in symbols["classes"]:
        return [name]
    found = []
    for member, parameters in members(cls):
        known = (
            module_member(symbols, member, called=parameters is not None)
            if name == "TensorRt"
            else class_member(symbols, name, member)
        )
        if known is None or not takes(known, parameters):
            found.append(f"{name}.{member}")
    return found


def module_member(symbols: Mapping[str, Any], name: str, *, called: bool) -> list[str] | str | None:
    """What the module has under a name: an enum, a class, or, if it is to be called, its constructors."""
    if called:
        return class_member(symbols, name, "__init__")
    return "there" if name in symbols["enums"] or name in symbols["classes"] else None


def class_member(symbols: Mapping[str, Any], name: str, member: str) -> list[str] | str | None:
    """A method's overloads or a property's access, the class's own or inherited."""
    entry = symbols["classes"].get(name, {})
    for kind in ("methods", "properties"):
        if member in entry.get(kind, {}):
            return entry[kind][member]  # type: ignore[no-any-return]
    inherited = (class_member(symbols, base, member) for base in entry.get("bases", ()))
    return next((found for found in inherited if found is not None), None)


def takes(known: list[str] | str, ours: inspect.Signature | None) -> bool:
    """Whether what is there may be used as ours: an attribute, or a method with these parameters."""
    if ours is None or isinstance(known, str):
        return ours is None and isinstance(known, str)
    return any(same_call(signature(overload), ours) for overload in known)


def same_call(theirs: inspect.Signature, ours: inspect.Signature) -> bool:
    """Parameters in the same order and of the same names; those we leave out have defaults."""
    wanted = list(ours.parameters.values())[1:]
    given = list(theirs.parameters.values())
    if any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in wanted):
        return all(parameter.default is not inspect.Parameter.empty for parameter in given)
    nameless = inspect.Parameter.POSITIONAL_ONLY
    named = all(
        their.kind is nameless or their.name == our.name for their, our in zip(given, wanted, strict=False)
    )
    left_out = given[len(wanted) :]
    return len(wanted) <= len(given) and named and all(p.default is not p.empty for p in left_out)


def test_every_protocol_is_looked_at() -> None:
    assert {"Builder", "ICudaEngine", "IExecutionContext", "TensorRt", "BuilderFlag", *ONLY} <= set(CLASSES)
    assert len(list(members(api.IBuilderConfig))) > 8
    assert real_name(api.RtxBuilderConfig) == "IBuilderConfig"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", CLASSES)
def test_a_protocol_has_what_the_version_has(name: str, version: str) -> None:
    found = problems(CLASSES[name], SYMBOLS[version])
    if version in ONLY.get(name, VERSIONS):
        assert not found
    else:
        assert found  # else it need not stand apart


class Invented(api.IBuilderConfig, Protocol):
    """A method, an attribute and parameters that are nowhere, and an attribute that is a method."""

    turbo: bool
    get_flag: bool

    def make_fast(self) -> None: ...
    def set_flag(self, flag: Any, value: bool) -> None: ...
    def clear_flag(self, other: Any) -> None: ...
    def create_timing_cache(self) -> None: ...
    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool: ...


class InventedFlags(api.BuilderFlag, Protocol):
    TF32: Any
    FASTER: Any


class InventedModule(api.TensorRt, Protocol):
    ITurbo: Any

    def Runtime(self, logger: Any, speed: int) -> Any: ...


class Turbo(Protocol):
    def go(self) -> None: ...


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_invented_is_found(version: str) -> None:
    symbols = SYMBOLS[version]
    wrong = ("turbo", "get_flag", "make_fast", "set_flag", "clear_flag", "create_timing_cache")
    assert problems(Invented, symbols) == [f"IBuilderConfig.{name}" for name in wrong]
    assert problems(InventedFlags, symbols) == ["BuilderFlag.FASTER"]
    assert problems(InventedModule, symbols) == ["TensorRt.ITurbo", "TensorRt.Runtime"]
    assert problems(Turbo, symbols) == ["Turbo"]


@pytest.mark.parametrize(
    "name, versions",
    [("FP16", VERSIONS[:1]), ("OBEY_PRECISION_CONSTRAINTS", VERSIONS[:1]), ("STRIP_PLAN", VERSIONS)],
)
def test_what_was_removed_is_in_no_later_list(name: str, versions: tuple[str, ...]) -> None:
    """The lists tell the versions apart: what 11 removed, no protocol may name."""
    having = {version for version in VERSIONS if name in SYMBOLS[version]["enums"]["BuilderFlag"]}
    assert having >= set(versions)
    assert ("11.4.0.106" in having) == (versions == VERSIONS)
