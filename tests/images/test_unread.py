"""Whoever reads a folder of images says what of it was not read: verification, the benchmark, jobs on Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.bundles import LABELS, random_image, write_bundle
from vitdeploy.benchmark import run as benchmark
from vitdeploy.bundle.folder import Bundle
from vitdeploy.progress import Progress
from vitdeploy.ray.tables import find_inputs
from vitdeploy.verification.accuracy import find_labelled
from vitdeploy.verification.local import verify_bundle

LINE = "not read: 2 .jp2, 1 other file"


class Notes(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "linear.bundle")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One labelled image, and what is none."""
    path = tmp_path / "data" / LABELS[0]
    path.mkdir(parents=True)
    random_image(0).save(path / "a.png")
    for name in ("b.jp2", "c.JP2", "notes.txt", ".hidden.jp2"):
        (path / name).touch()
    return path.parent


def test_labelled_images(bundle: Bundle, folder: Path) -> None:
    found = find_labelled(folder, bundle.manifest)
    assert (len(found.images), found.unread) == (1, LINE)
    for path in folder.glob("*/*[!g]"):
        path.unlink()
    assert find_labelled(folder, bundle.manifest).unread == ""


def test_verification(bundle: Bundle, folder: Path) -> None:
    progress = Notes()
    verify_bundle(bundle, backends=["onnxruntime"], batches=[1], data=folder, progress=progress)
    assert progress.notes == [LINE]


def test_the_benchmark(bundle: Bundle, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(benchmark, "run_plan", lambda plan, progress: seen.append(plan))
    progress = Notes()
    another = write_bundle(bundle.root.with_name("another.bundle"))
    benchmark.run_bench([bundle, another], data=folder, progress=progress)
    assert len(seen) == 1
    assert progress.notes == [LINE]  # of one folder, once


def test_a_job_on_ray(folder: Path) -> None:
    inputs = find_inputs([str(folder)], None)
    assert (len(inputs.items), inputs.unread) == (1, LINE)
