"""``vitdeploy list``."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.helpers.commands import Run
from vitdeploy.checkpoint.catalogue import CATALOGUE
from vitdeploy.variants import variant_names


@pytest.mark.slow
def test_text(run: Run) -> None:
    result = run("list")
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert any(line.startswith("CLIP ") and "CLIPVisionModelWithProjection" in line for line in lines)
    assert next(line.split() for line in lines if line.startswith("CLIP-B/32")) == [
        *("CLIP-B/32", "87.8", "M", "224x224", "embedding,", "features,", "tokens")
    ]
    assert all(name in result.out for name in variant_names())
    assert "`" not in result.out


@pytest.mark.slow
def test_json(run: Run) -> None:
    document = run("list", "--json").document
    assert document["ok"] is True
    assert [family["name"] for family in document["families"]] == [*CATALOGUE]
    variants = {variant["name"]: variant for variant in document["variants"]}
    # Dosovitskiy et al. 2021, table 1: 86 million.
    assert variants["B/16"] == {
        "name": "B/16",
        "also": ["vit_base_patch16_224"],
        "parameters": 86_567_656,
        "image_size": [224, 224],
        "preprocess": "inception",
        "outputs": ["logits", "features", "embedding", "tokens"],
    }
    assert variants["SigLIP-L/16"]["image_size"] == [256, 256]
    named = [name for variant in variants.values() for name in (variant["name"], *variant["also"])]
    assert sorted(named) == sorted(variant_names())


@pytest.mark.slow
def test_without_pytorch_it_says_what_to_install() -> None:
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from vitdeploy.cli import main; sys.exit(main(['list', '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert json.loads(done.stdout)["error"] == {
        "kind": "MissingDependency",
        "message": "counting parameters needs the library 'torch', which is not installed",
        "hint": 'pip install "vitdeploy[export]"',
    }
