"""Rollouts on request: what the process answers, and what it says where there is nothing to answer."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers.models import CONFIGS
from tests.helpers.pictures import picture
from tests.helpers.swins import SWINS
from tests.helpers.weights_bundles import SPEC, write_weights
from vitdeploy.bundle.folder import Bundle
from vitdeploy.config import ModelConfig
from vitdeploy.errors import BundleError, ImageError, MissingDependency, UsageError
from vitdeploy.explanation.answering import COMMAND, Rollouts
from vitdeploy.explanation.looking import looker_of
from vitdeploy.machine.child import Worker, WorkerFailure, child_environment


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def request(bundle: Bundle, image: bytes, **changed: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "bundle": str(bundle.root),
        "digest": bundle.manifest.digest,
        "fit": "aspect",
        "max_pixels": 1_000_000,
        "image": base64.b64encode(image).decode(),
    }
    return fields | changed


def bundle_of(folder: Path, config: ModelConfig) -> Bundle:
    return write_weights(folder, config, preprocess=replace(SPEC, size=config.image_size))


def decoded(url: str) -> Image.Image:
    head, _, data = url.partition(",")
    assert head == "data:image/webp;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


@pytest.mark.parametrize("kind", ["vit", "distilled", "siglip", "no_head"])
def test_the_rollout_is_that_of_explain(tmp_path: Path, kind: str) -> None:
    bundle = bundle_of(tmp_path / "bundle", CONFIGS[kind])
    image = picture(0, (60, 80))
    answer = Rollouts().answer(request(bundle, png(image)))
    assert bundle.manifest.preprocess is not None
    expected = looker_of(bundle, bundle.manifest.preprocess).look("one", image).rollout
    np.testing.assert_allclose(answer["rollout"], expected, rtol=2e-5)
    height, width = CONFIGS[kind].image_size
    assert answer["size"] == f"{height}x{width}"
    shown = decoded(answer["picture"])
    assert (shown.format, max(shown.size)) == ("WEBP", 320)
    assert shown.width * height == pytest.approx(shown.height * width, rel=0.01)
    json.dumps(answer, allow_nan=False)


def test_where_there_is_nothing_to_show(tmp_path: Path) -> None:
    swin = bundle_of(tmp_path / "swin", SWINS["v1"])
    vit = bundle_of(tmp_path / "vit", CONFIGS["vit"])
    rollouts, image = Rollouts(), png(picture(0))
    with pytest.raises(UsageError, match="rollout and relevance cannot be shown: attention stays within"):
        rollouts.answer(request(swin, image))
    with pytest.raises(ImageError, match="not an image that can be read"):
        rollouts.answer(request(vit, b"text"))
    with pytest.raises(ImageError, match="pixels"):
        rollouts.answer(request(vit, image, max_pixels=10))
    with pytest.raises(BundleError, match="was replaced"):
        rollouts.answer(request(vit, image, digest="another"))
    with pytest.raises(BundleError):
        rollouts.answer({**request(vit, image), "bundle": str(tmp_path / "nowhere")})
    assert len(rollouts.answer(request(vit, image))["rollout"]) == CONFIGS["vit"].grid[0]


def test_one_model_is_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vitdeploy.explanation import looking

    loaded = []
    original = looking.looker_of
    monkeypatch.setattr(looking, "looker_of", lambda *a: loaded.append(a[0].root.name) or original(*a))
    bundles = {kind: bundle_of(tmp_path / kind, CONFIGS[kind]) for kind in ("vit", "mean")}
    rollouts, image = Rollouts(), png(picture(0))
    for kind in ("vit", "vit", "mean", "vit"):
        rollouts.answer(request(bundles[kind], image))
    assert loaded == ["vit", "mean", "vit"]


def asked(environment: Mapping[str, str], *requests: dict[str, Any]) -> list[Any]:
    """What the process itself answers: documents, or the errors that they hold."""
    found: list[Any] = []
    with Worker(COMMAND, {}, {**child_environment(), **environment}, 120) as worker:
        for one in requests:
            try:
                found.append(worker.ask("rollout", **one))
            except WorkerFailure as failure:
                if failure.fatal:
                    raise
                found.append(failure.__cause__)
    return found


@pytest.mark.slow
def test_the_process_answers_and_goes_on_after_an_error(tmp_path: Path) -> None:
    vit = bundle_of(tmp_path / "vit", CONFIGS["vit"])
    image = png(picture(0))
    wrong, right = asked({}, request(vit, b"nothing"), request(vit, image))
    assert isinstance(wrong, ImageError)
    np.testing.assert_allclose(right["rollout"], Rollouts().answer(request(vit, image))["rollout"], rtol=2e-5)


def test_without_torch_it_says_what_installs_it(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('no torch', name='torch')\n")
    environment = child_environment()
    path = f"{tmp_path}:{environment['PYTHONPATH']}"
    (error,) = asked({"PYTHONPATH": path}, {"bundle": "any"})
    assert isinstance(error, MissingDependency)
    assert error.message == "the attention rollout needs the library 'torch', which is not installed"
    assert error.hint == 'pip install "vitdeploy[export]"'
