"""Bundles of the linear classifier with engines that the double has built."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fakes.machines import NEW, RTX, Machine
from tests.helpers.bundles import SIZE, write_bundle
from vitdeploy.bundle.folder import Bundle
from vitdeploy.exporter.request import EngineRequest
from vitdeploy.exporter.tensorrt import add_engines
from vitdeploy.tensorrt.records import BuildSettings

PLAN, RECORD = "engines/sm_89/model.fp32.plan", "engines/sm_89/model.fp32.json"
each = pytest.mark.parametrize("version", ["10.16.1.11", NEW, RTX])


def name_of(version: str) -> str:
    return "tensorrt-rtx" if version == RTX else "tensorrt"


def engines(folder: Path, version: str = NEW, *arch: str, **settings: Any) -> Bundle:
    """A bundle of the linear classifier with its engines; its ONNX is fp32 and fp16."""
    made = write_bundle(folder, precisions=("fp32", "fp16"))
    request = EngineRequest((name_of(version),), arch, settings=BuildSettings.of(**settings))
    return add_engines(made, request)


def images(count: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(count).normal(size=(count, 3, SIZE, SIZE)).astype(np.float32)


def loads(here: Machine) -> int:
    return len(here.calls("deserialize_cuda_engine"))


def reseal(bundle: Bundle, change: Callable[[Path], None]) -> Bundle:
    """Change files of a bundle and seal it anew, as whoever gives it away could."""
    with bundle.edit() as writer:
        for name in (PLAN, RECORD):
            data = (writer.directory / name).read_bytes()
            writer.file(name).write_bytes(data)
        change(writer.directory)
        writer.seal(bundle.manifest)
        return writer.commit()
