"""Machines that are not here, each with one version of TensorRT's double, and jobs for its builder."""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.fakes.gpu import FakeGpu
from tests.fakes.tensorrt import calls_of, make_tensorrt
from tests.fakes.tensorrt_builds import attention
from vitdeploy.bundle.manifest import TensorSpec
from vitdeploy.config import BatchRange
from vitdeploy.machine.gpus import Gpu
from vitdeploy.tensorrt import builder
from vitdeploy.tensorrt.records import BuildJob, BuildResult, BuildSettings

OLD, NEW = "10.8.0.43", "11.4.0.106"
FULL = (OLD, "10.16.1.11", NEW)
RTX = "rtx-1.7.1.116"
L4 = Gpu("NVIDIA L4", (8, 9))
MakeJob = Callable[..., BuildJob]
MakeMachine = Callable[..., "Machine"]
every_version = pytest.mark.parametrize("version", FULL)
_ASKED = ("vitdeploy.tensorrt.builder", "vitdeploy.exporter.request", "vitdeploy.backends.tensorrt")


@dataclass(frozen=True)
class Machine:
    """One version of TensorRT beside one GPU, or beside none."""

    library: ModuleType
    gpu: FakeGpu

    def calls(self, name: str) -> list[dict[str, Any]]:
        """The arguments of every call of one name, or, with ``=`` behind it, of every assignment."""
        return [call.arguments for call in calls_of(self.library) if call.name == name]

    def assigned(self, name: str) -> list[Any]:
        """What was assigned to an attribute; of members of enums, their names."""
        return [getattr(call["value"], "name", call["value"]) for call in self.calls(f"{name}=")]


def go_to(monkeypatch: pytest.MonkeyPatch, version: str, gpu: Gpu | None) -> Machine:
    """Be on a machine from here on. Builds run in this process, which is where the double is."""
    library = make_tensorrt(version, gpu.capability if gpu else None)
    library.__spec__ = importlib.machinery.ModuleSpec(library.__name__, None)
    monkeypatch.setitem(sys.modules, library.__name__, library)
    device = FakeGpu(library)
    for module in _ASKED:
        monkeypatch.setattr(importlib.import_module(module), "find_gpus", lambda: [gpu] if gpu else [])
    monkeypatch.setattr("vitdeploy.tensorrt.cuda.CudaDevice", lambda index: device)
    monkeypatch.setattr(
        importlib.import_module("vitdeploy.exporter.tensorrt"), "build_engines", builder.run_build_job
    )
    return Machine(library, device)


def make_job(
    folder: Path,
    model: bytes | None = None,
    *,
    precision: str = "fp16",
    profiles: tuple[BatchRange, ...] = (BatchRange(1, 2, 8),),
    islands: tuple[str, ...] = (),
    engines: int = 1,
    **settings: Any,
) -> BuildJob:
    """Engines of one graph for the GPU that is here."""
    path = folder / "model.onnx"
    path.write_bytes(attention() if model is None else model)
    dtype = {"fp16": "float16", "fp32": "float32"}[precision]
    return BuildJob.model_validate(
        {
            "flavour": "tensorrt",
            "onnx": str(path),
            "input": TensorSpec.model_validate({"name": "x", "dtype": dtype, "shape": ("N", 3, 4)}),
            "precision": precision,
            "islands": islands,
            "profiles": profiles,
            "targets": ((),) * engines,
            "outputs": tuple(str(folder / f"model{index}.plan") for index in range(engines)),
            "settings": BuildSettings.of(**settings),
        }
    )


def build(job: BuildJob) -> BuildResult:
    """Build in this process."""
    return builder.run_build_job(job, lambda phase, fraction: None)
