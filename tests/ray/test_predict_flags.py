"""``vitdeploy predict``: which flags belong to which engine, before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.bundles import random_image, write_bundle
from tests.helpers.commands import in_a_process
from tests.helpers.small_bundles import write_small
from vitdeploy.cli import main


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, message",
    [
        (["--engine", "rya"], "unknown engine 'rya'; did you mean 'ray'"),
        (["--engine", "ray"], "--engine ray writes its results into a folder"),
        (["--engine", "ray", "-o", "x", "--csv"], "writes Parquet, not CSV"),
        (["-o", "x"], "only --engine ray has it"),
        (["--workers", "2"], "--workers 2: only --engine ray"),
        (["--batch", "2"], "--batch 2: only --engine ray"),
        (["--parquet-column", "image"], "--parquet-column image: only --engine ray"),
        (["--engine", "ray", "-o", "x", "--workers", "0"], "workers must be at least 1"),
    ],
)
def test_flags(flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = write_bundle(tmp_path / "b")
    assert main(["predict", str(made.root), "none.jpg", *flags]) == 2
    assert message in capsys.readouterr().err
    assert not Path("x").exists()


@pytest.mark.slow
def test_no_images_start_no_ray(tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "b")
    result = in_a_process(
        "predict", made.root, tmp_path / "none.jpg", "--engine", "ray", "-o", tmp_path / "x", "--json"
    )
    assert result.code == 2
    assert result.document.items() >= {"ok": False, "images": 0, "missing": 1}.items()
    assert "none.jpg does not exist" in result.err
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_ray_is_not_there(tmp_path: Path) -> None:
    """Its absence is said with the extra that brings it; here by a folder in front that hides it."""
    (tmp_path / "hide" / "ray").mkdir(parents=True)
    (tmp_path / "hide" / "ray" / "__init__.py").write_text("raise ImportError('hidden')")
    made = write_bundle(tmp_path / "b")
    random_image(0).save(tmp_path / "a.png")
    result = in_a_process(
        *("predict", made.root, tmp_path / "a.png", "--engine", "ray", "-o", tmp_path / "x"),
        PYTHONPATH=str(tmp_path / "hide"),
    )
    assert result.code == 3
    assert 'pip install "vitdeploy[ray]"' in result.err
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_no_cluster_there(tmp_path: Path) -> None:
    """Is said at once; Ray itself tries for minutes."""
    made = write_bundle(tmp_path / "b")
    random_image(0).save(tmp_path / "a.png")
    result = in_a_process(
        *("predict", made.root, tmp_path / "a.png", "--engine", "ray", "-o", tmp_path / "x"),
        RAY_ADDRESS="127.0.0.1:1",
    )
    assert result.code == 3
    assert "no Ray cluster at RAY_ADDRESS=127.0.0.1:1" in result.err
    assert not (tmp_path / "x").exists()


def test_a_bundle_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = write_small(tmp_path / "tiny")
    assert main(["predict", str(made.root), "a.png", "--engine", "ray", "-o", str(tmp_path / "x")]) == 2
    assert "says nothing of preprocessing, so it cannot take images" in capsys.readouterr().err
