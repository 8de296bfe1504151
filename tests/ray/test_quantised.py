"""The packaged application of a quantised artifact, without Ray: its parity, labels and scores."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.helpers.bundles import LABELS, SPEC
from tests.helpers.quantised_bundles import held_out_images, quantised_answer, write_quantised
from tests.helpers.ray_replicas import MAX_BATCH, MAX_DELAY_MS, gathering, post
from vitdeploy.errors import ParityError
from vitdeploy.images.preprocess import apply
from vitdeploy.packaging.target import PackageSettings
from vitdeploy.packaging.write import write_package
from vitdeploy.ray.serving import Replica
from vitdeploy.scores import softmax


def packaged(folder: Path, steps: int) -> tuple[str, dict[str, Any]]:
    """The bundle of a package, and what its configuration hands to a replica."""
    made = write_quantised(folder / "linear.bundle", steps=steps)
    settings = PackageSettings(max_batch=MAX_BATCH, max_delay_ms=MAX_DELAY_MS)
    write_package(made, "ray", folder / "package", name="m", artifact="int8", settings=settings)
    (app,) = yaml.safe_load((folder / "package/serve_config.yaml").read_text())["applications"]
    return str(folder / "package/model.bundle"), app["args"]


@pytest.mark.slow
def test_a_replica_answers_as_its_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray import serve

    monkeypatch.setattr(serve, "batch", gathering)
    images, bundle, args = held_out_images(), *packaged(tmp_path, steps=127)
    assert args["artifact"] == "onnx-int8"

    async def main() -> list[Any]:
        replica = Replica(bundle, args)
        files = [io.BytesIO() for _ in images]
        for image, file in zip(images, files, strict=True):
            image.save(file, "PNG")
        asked = [replica(post(file.getvalue())) for file in files]
        return [json.loads(bytes(answer.body)) for answer in await asyncio.gather(*asked)]

    rows = quantised_answer(np.stack([apply(image, SPEC) for image in images]), "int8")
    for answer, row in zip(asyncio.run(main()), rows, strict=True):
        found = {one["label"]: one["score"] for one in answer["predictions"][0]}
        assert found == pytest.approx(dict(zip(LABELS, softmax(row), strict=True)), rel=1e-4)


@pytest.mark.slow
def test_a_replica_that_loses_too_much_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray import serve

    monkeypatch.setattr(serve, "batch", gathering)
    bundle, args = packaged(tmp_path, steps=2)
    with pytest.raises(ParityError, match="onnx-int8 on onnxruntime gives wrong outputs"):
        Replica(bundle, args)
