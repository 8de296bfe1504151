"""Against NVIDIA's real Triton Inference Server with a packaged repository: right, and wrong in one thing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.bundles import LABELS, write_bundle
from tests.helpers.triton_server import Triton, running_triton
from vitdeploy.bundle.folder import Bundle
from vitdeploy.packaging.write import write_package
from vitdeploy.verification.live.round import LiveRequest, verify_live

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Path]:
    """The linear classifier, and a model repository of it."""
    folder = tmp_path_factory.mktemp("packaged")
    made = write_bundle(folder / "linear.bundle")
    write_package(made, "triton-server", folder / "package")
    return made, folder / "package" / "models"


@pytest.fixture(scope="module")
def triton(packaged: tuple[Bundle, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    with running_triton(packaged[1], tmp_path_factory.mktemp("triton") / "scratch") as running:
        yield running


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_right_server(packaged: tuple[Bundle, Path], triton: Triton, protocol: str) -> None:
    url = f"{protocol}://{getattr(triton, protocol)}"
    report = verify_live(packaged[0], LiveRequest(url))
    assert report.passed, (report.failures, report.causes)
    assert report.server.name == "triton"
    assert (report.model, report.version, report.precision) == ("linear", "1", "fp32")
    assert len(report.parity) == (6 if protocol == "http" else 3)
    assert report.labels == len(LABELS)
    assert len(report.images) == 4


def test_the_ensemble_by_name(packaged: tuple[Bundle, Path], triton: Triton) -> None:
    report = verify_live(packaged[0], LiveRequest(triton.url, model="linear_image"))
    assert report.passed, (report.failures, report.causes)
    assert len(report.images) == 4


def test_an_unknown_model_and_version(packaged: tuple[Bundle, Path], triton: Triton) -> None:
    from vitdeploy.errors import UsageError

    for url in (triton.url, f"grpc://{triton.grpc}"):
        with pytest.raises(UsageError, match="has no model 'linaer'; did you mean 'linear'"):
            verify_live(packaged[0], LiveRequest(url, model="linaer"))
        with pytest.raises(UsageError, match="linear has no version '4'"):
            verify_live(packaged[0], LiveRequest(url, version="4"))


def test_wrong_preprocessing_and_labels(packaged: tuple[Bundle, Path], tmp_path: Path) -> None:
    repository = tmp_path / "models"
    shutil.copytree(packaged[1], repository)
    edit(
        repository / "linear_preprocess/1/preprocess.json",
        "preprocess",
        lambda p: {**p, "resample": "nearest"},
    )
    edit(repository / "linear_labels/1/labels.json", "labels", sorted)
    (repository / "linear/labels.txt").write_text("\n".join(LABELS[::-1]) + "\n")
    with running_triton(repository, tmp_path / "scratch") as running:
        report = verify_live(packaged[0], LiveRequest(running.url, batches=[1]))
    assert any("the nearest filter, not bilinear" in cause for cause in report.causes)
    assert any("labels are sorted by name" in cause for cause in report.causes)
    assert any("another order than the model's classes" in cause for cause in report.causes)
    assert all(record.passed for record in report.parity)


def edit(path: Path, key: str, change: object) -> None:
    """Change one value of a JSON file."""
    document = json.loads(path.read_text())
    document[key] = change(document[key])  # type: ignore[operator]
    path.write_text(json.dumps(document))
