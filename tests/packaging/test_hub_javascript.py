"""transformers.js in Node loads a hub folder, and gives the bundle's labels and scores for photographs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vitdeploy
from tests.helpers.card_code import card_programs
from tests.helpers.hub_bundles import photograph_files
from tests.helpers.node import run_javascript
from vitdeploy.packaging.target import template

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
SCORE = 2e-3


def photographs_in(folder: Path) -> list[str]:
    return [shutil.copy(path, folder / path.name).name for path in photograph_files()]


def card_of(folder: Path) -> str:
    """Its program in JavaScript, up to where it looks at the image."""
    (program,) = card_programs((folder / "README.md").read_text(encoding="utf-8"), "js")
    assert program.count("console.log") == 1
    return program.partition("console.log")[0]


def classified(folder: Path, names: list[str], dtype: str, place: Path) -> list[list[dict[str, Any]]]:
    """What the card's program says of images, in a dtype."""
    loops = f"for (const name of {json.dumps(names)}) console.log(JSON.stringify(await classify(name)));"
    program = card_of(folder).replace("dtype: 'fp32'", f"dtype: '{dtype}'") + loops
    return [json.loads(line) for line in run_javascript(program, place).splitlines() if line.startswith("[")]


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("which", ["digits", "clip"])
def test_the_card_in_javascript(
    which: str, dtype: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder: Path = request.getfixturevalue(f"{which}_hub")
    shutil.copytree(folder, tmp_path / folder.name)
    names = photographs_in(tmp_path)
    found = classified(folder, names, dtype, tmp_path)
    assert len(found) == 3
    with vitdeploy.load(folder, artifact=dtype) as predictor:
        for name, answers in zip(names, found, strict=True):
            expected = predictor.predict(tmp_path / name, top_k=5)[0]
            assert answers[0]["label"] == expected[0].label
            scores = {answer["label"]: answer["score"] for answer in answers}
            for prediction in expected:
                assert scores[prediction.label] == pytest.approx(prediction.score, abs=SCORE)


def test_scores_that_are_no_shares(siglip_hub: Path, tmp_path: Path) -> None:
    shutil.copytree(siglip_hub, tmp_path / siglip_hub.name)
    shutil.copy(photograph_files()[0], tmp_path / "image.jpg")
    (program,) = card_programs((siglip_hub / "README.md").read_text(encoding="utf-8"), "js")
    program = program.replace("console.log(scored", "console.log(JSON.stringify(scored").replace(
        "5));", "5)));"
    )
    answers = json.loads(run_javascript(program, tmp_path).splitlines()[-1])
    with vitdeploy.load(siglip_hub) as predictor:
        expected = predictor.predict(tmp_path / "image.jpg", top_k=3)[0]
    assert [answer["label"] for answer in answers] == [prediction.label for prediction in expected]
    scores = [prediction.score for prediction in expected]
    assert [answer["score"] for answer in answers] == pytest.approx(scores, abs=SCORE)


def test_resizing_is_pillows(tmp_path: Path) -> None:
    """To the last bit where Pillow works on rows first, and to the rounding in between elsewhere."""
    with Image.open(photograph_files()[0]) as image:
        image.save(tmp_path / "image.png")
    (tmp_path / "resize.mjs").write_text(template("hub_resize.mjs"), encoding="utf-8")
    sizes = [(224, 224), (64, 43), (37, 500), (640, 200), (300, 427), (1000, 700)]
    program = f"""
import {{ RawImage }} from '@huggingface/transformers';
import {{ writeFileSync }} from 'node:fs';
import {{ resize }} from './resize.mjs';
for (const [width, height] of {json.dumps(sizes)}) for (const resample of [1, 2, 3, 4, 5]) {{
  const image = await RawImage.read('image.png');
  const processor = {{ size: {{}}, resample, get_resize_output_image_size: () => [width, height] }};
  const resized = await resize.call(processor, image.rgb());
  writeFileSync(`${{width}}-${{height}}-${{resample}}`, resized.data);
}}"""
    run_javascript(program, tmp_path)
    with Image.open(tmp_path / "image.png") as image:
        for width, height in sizes:
            for resample in range(1, 6):
                found = np.fromfile(tmp_path / f"{width}-{height}-{resample}", np.uint8)
                expected = np.asarray(image.resize((width, height), Image.Resampling(resample))).ravel()
                assert np.array_equal(found, expected), (width, height, resample)
