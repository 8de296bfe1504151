"""Bundles to package, and a short way to package them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.bundles import write_bundle
from tests.helpers.commands import in_a_process
from tests.helpers.exports import Exported, Exports
from tests.helpers.hub_folders import hub_folder
from vitdeploy.bundle.folder import Bundle
from vitdeploy.packaging.target import PackageSettings
from vitdeploy.packaging.write import Package, write_package

Make = Callable[..., Package]


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """The linear classifier, in fp32 and fp16."""
    return write_bundle(tmp_path / "linear.bundle", precisions=("fp32", "fp16"))


@pytest.fixture(scope="session")
def digits(digits: Exported) -> Bundle:
    return Bundle.open(digits.folder)


@pytest.fixture
def package(tmp_path: Path) -> Make:
    """``package(bundle, "docker", threads=2)`` writes ``out/``; takes ``name``, ``version``..., too."""

    def make(bundle: Bundle, target: str = "triton-server", folder: str = "out", **given: Any) -> Package:
        whole = {key: given.pop(key) for key in ("name", "version", "artifact", "force") if key in given}
        return write_package(bundle, target, tmp_path / folder, settings=PackageSettings(**given), **whole)

    return make


@pytest.fixture(scope="session")
def digits_hub(digits: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hub folder of the digits model, in fp32 and fp16."""
    return hub_folder(digits, tmp_path_factory.mktemp("hub") / "digits-hub").folder


@pytest.fixture(scope="session")
def clip_bundle(exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A zero-shot classifier of a small CLIP, in fp32 and fp16."""
    from tests.helpers.text_checkpoints import save_clip  # brings transformers

    words = ("--fp32", "--fp16", "--batch", "1,2,4")
    return zero_shot(
        exports, tmp_path_factory, save_clip, ("cat", "a dog", "Möwe", "the painting", "photo"), words
    )


def zero_shot(
    exports: Exports,
    tmp_path_factory: pytest.TempPathFactory,
    save: Callable[[Path], object],
    labels: Sequence[str],
    words: Sequence[str],
) -> Bundle:
    """What ``export`` with these words makes of a checkpoint that ``save`` writes; made once."""
    folder = tmp_path_factory.mktemp("zero-shot")
    save(folder / "model")
    (folder / "labels.txt").write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
    command = (
        "export",
        "-m",
        folder / "model",
        "--zero-shot",
        folder / "labels.txt",
        "--format",
        "onnx",
        *words,
    )
    made = exports.get(f"zero-shot of {save.__name__}", lambda to: in_a_process(*command, "-o", to))
    return Bundle.open(made.folder)


@pytest.fixture(scope="session")
def siglip_hub(exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zero-shot classifier of a small SigLIP, whose labels have a score each."""
    from tests.helpers.text_checkpoints import save_siglip  # brings transformers

    bundle = zero_shot(exports, tmp_path_factory, save_siglip, ("cat", "a dog", "photo"), ("--batch", "1"))
    return hub_folder(bundle, tmp_path_factory.mktemp("hub") / "siglip-hub").folder


@pytest.fixture(scope="session")
def clip_hub(clip_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub_folder(clip_bundle, tmp_path_factory.mktemp("hub") / "clip-hub").folder
