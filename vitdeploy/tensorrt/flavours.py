"""The two TensorRTs: the full one, and TensorRT for RTX. What differs between them stands here.

They share one Python API. TensorRT builds for the GPU that is there; TensorRT for RTX builds on any machine
for the GPUs it is told, and compiles the kernels where the engine is first run.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

from vitdeploy.errors import MissingDependency, UsageError, VitdeployError, did_you_mean
from vitdeploy.tensorrt.api import TensorRt

FlavourName = Literal["tensorrt", "tensorrt-rtx"]


@dataclass(frozen=True)
class Flavour:
    """One of the two."""

    name: FlavourName
    """Of the format, of the backend, and of the extra that installs it."""
    module: str
    title: str
    majors: tuple[int, ...]
    """Major versions whose API we know."""
    magic: bytes
    """What its engines begin with."""
    targets: Mapping[str, str]
    """Architectures to build for without a GPU, by TensorRT's names; none: for the GPU that is here."""

    @property
    def portable(self) -> bool:
        """Whether it builds for GPUs that are not here."""
        return bool(self.targets)

    @property
    def is_installed(self) -> bool:
        """Whether its Python package can be imported; imports nothing."""
        return importlib.util.find_spec(self.module) is not None


_FP8_SINCE = 89
_RTX_TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121")
FLAVOURS: Mapping[str, Flavour] = {
    "tensorrt": Flavour("tensorrt", "tensorrt", "TensorRT", (10, 11), b"ftrt", {}),
    "tensorrt-rtx": Flavour(
        "tensorrt-rtx",
        "tensorrt_rtx",
        "TensorRT for RTX",
        (1,),
        b"vtrt",
        {arch: arch.replace("sm_", "SM") for arch in _RTX_TARGETS},
    ),
}
"""By the name of their format."""


def import_tensorrt(flavour: Flavour, purpose: str) -> TensorRt:
    """Import a flavour's library.

    Raises:
        MissingDependency: it, or the native library behind it, is not there.
        UsageError: a major version whose API vitdeploy does not know.
    """
    try:
        library = cast(TensorRt, importlib.import_module(flavour.module))
    except ImportError as error:
        missing = MissingDependency(flavour.module, extra=flavour.name, purpose=purpose)
        if flavour.is_installed:
            reason = " ".join(str(error).split())
            VitdeployError.__init__(
                missing,
                f"{purpose} needs {flavour.title}, whose Python package is there but does not load: {reason}",
                hint=f'pip install --force-reinstall "vitdeploy[{flavour.name}]"',
            )
        raise missing from error
    if parse_version(library.__version__)[0] not in flavour.majors:
        majors = " and ".join(str(major) for major in flavour.majors)
        raise UsageError(
            f"{flavour.title} {library.__version__} is installed, and vitdeploy knows version {majors}",
            hint=f'pip install "vitdeploy[{flavour.name}]"',
        )
    return library


def parse_version(text: str) -> tuple[int, ...]:
    """``"10.16.1.11"`` as numbers: major, minor, patch, build."""
    return tuple(int(part) for part in text.split(".")[:4] if part.isdecimal())


def lacks_fp8(arch: str) -> bool:
    """Whether GPUs of an architecture have no fp8: ``sm_86``; ``sm_80+`` is that one and all later ones."""
    return int(arch.removeprefix("sm_").removesuffix("+")) < _FP8_SINCE


def check_targets(flavour: Flavour, groups: tuple[tuple[str, ...], ...]) -> None:
    """Look at the architectures that a user names.

    Args:
        groups: one engine each, for all the architectures of the group.

    Raises:
        UsageError: one that it does not build for.
    """
    for arch in (arch for group in groups for arch in group):
        if arch not in flavour.targets:
            raise UsageError(
                f"{flavour.title} does not build for {arch!r}{did_you_mean(arch, flavour.targets)}",
                hint=f"it builds for {', '.join(flavour.targets)}",
            )
