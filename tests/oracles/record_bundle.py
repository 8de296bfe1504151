"""Record a bundle as this version writes it, for tests/bundle/test_recorded.py: later ones have to open it.

    python -m tests.oracles.record_bundle 0.1.0

It goes to ``tests/oracles/bundles/<name>``: a tiny ViT with random weights, one fp32 ONNX file. A bundle that
is there already is never replaced.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.helpers.models import random_state
from vitdeploy.checkpoint.opening import Checkpoint, save_folder
from vitdeploy.config import Preprocess, ViTConfig

HERE = Path(__file__).parent
CONFIG = ViTConfig(image_size=(16, 16), patch_size=8, width=24, depth=2, heads=2, mlp_width=48, classes=3)


def main(name: str) -> None:
    target = HERE / "bundles" / name
    if target.exists():
        raise SystemExit(f"{target} is there already")
    with tempfile.TemporaryDirectory() as folder:
        labels = ("cat", "dog", "owl")
        checkpoint = Checkpoint(
            CONFIG, random_state(CONFIG), Preprocess(size=CONFIG.image_size), labels, "vitdeploy", "tiny"
        )
        save_folder(checkpoint, Path(folder) / "tiny")
        # In that folder and with relative names: the manifest keeps the command.
        export = [
            "export",
            "-m",
            "tiny",
            "--fp32",
            "--format",
            "onnx",
            "--batch",
            "1,2,4",
            "-o",
            "tiny.bundle",
        ]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        subprocess.run([sys.executable, "-m", "vitdeploy", *export], cwd=folder, env=environment, check=True)
        shutil.copytree(Path(folder) / "tiny.bundle", target)


if __name__ == "__main__":
    main(*sys.argv[1:])
