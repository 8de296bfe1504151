"""The whole way in one go: export, verify, predict and measure a trained model and a ViT-B/16.

    python examples/demo.py [--out DIR]

Everything it prints is computed here and now: the digits model is real (trained by
``examples/train_digits.py``), its images are scans of handwriting that training never saw, and the
photographs that ViT-B/16 looks at come with scikit-learn. ViT-B/16 has random weights, so its labels
mean nothing; its parity and its speed do.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from rich.console import Console

from vitdeploy.data import digits_heldout, digits_images

CONSOLE = Console(highlight=False)


def run(*command: str) -> None:
    """Run one vitdeploy command as a user would, and show it."""
    CONSOLE.print(f"\n[bold]$ vitdeploy {shlex.join(command)}[/bold]")
    finished = subprocess.run([sys.executable, "-m", "vitdeploy", *command], check=False)
    if finished.returncode:
        raise SystemExit(finished.returncode)


def write_heldout(folder: Path) -> None:
    """The held-out digits as PNG files, one folder per label."""
    images, labels = digits_heldout()
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / str(label) / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def photographs() -> list[Path]:
    """The two JPEG photographs that scikit-learn carries."""
    from sklearn import datasets

    return sorted(Path(datasets.__file__).parent.glob("images/*.jpg"))


def demo(out: Path) -> None:
    digits, large, heldout = out / "digits.bundle", out / "vit-b16.bundle", out / "heldout"
    write_heldout(heldout)
    run("export", "-m", "digits", "--fp32", "--fp16", "-o", str(digits))
    run("predict", str(digits), *(str(path) for path in digits_images()[:6]), "--top-k", "2")
    run("verify", str(digits), "--data", str(heldout))
    run("export", "-m", "B/16", "--fp32", "--fp16", "-o", str(large))
    run("verify", str(large), "--backend", "onnxruntime", "--batch", "1,8")
    run("predict", str(large), *(str(path) for path in photographs()), "--top-k", "3")
    report = out / "report.html"
    flags = ("--batch", "1,8", "--budget", "30s", "--html", str(report), "--pick", "latency")
    run("bench", str(large), "--backend", "onnxruntime,openvino", *flags)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="for bundles and report; thrown away when omitted")
    arguments = parser.parse_args()
    if arguments.out is None:
        with tempfile.TemporaryDirectory(prefix="vitdeploy-demo-") as folder:
            demo(Path(folder))
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    demo(arguments.out)


if __name__ == "__main__":
    main()
