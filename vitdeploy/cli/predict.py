"""``vitdeploy predict``: images in, labels out."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitdeploy.cli import output
from vitdeploy.errors import ImageError, UsageError

if TYPE_CHECKING:
    from vitdeploy.predictor import Prediction

SUMMARY = "Classify images."
EXAMPLES = (
    "vitdeploy predict vit.bundle cat.jpg",
    "vitdeploy predict vit.bundle photos/ --top-k 1 --csv > labels.csv",
    "vitdeploy predict vit.bundle cat.jpg --artifact fp16 --json",
)


def command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle.", show_default=False)],
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE|DIR...", help="Image files; folders are walked.", show_default=False),
    ],
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="B",
            help="The runtime; `doctor` lists them.  [default: what `bench --pick` chose, else onnxruntime]",
        ),
    ] = None,
    artifact: Annotated[
        str | None, typer.Option(metavar="A", help="Its name or precision.  [default: the most precise]")
    ] = None,
    top_k: Annotated[int, typer.Option(metavar="K", help="Classes per image.")] = 5,
    threads: Annotated[int | None, typer.Option(metavar="N", help="CPU threads.")] = None,
    provider: Annotated[
        str | None, typer.Option(metavar="P", help="ONNX Runtime's: cpu, cuda, tensorrt, tensorrt-rtx.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="One line per image and class.")] = False,
) -> int:
    """Classify images.

    An image that cannot be decoded is reported on stderr, the others are still classified, and the
    exit code is 2.
    """
    if as_json and as_csv:
        raise UsageError("--json and --csv exclude each other")
    from vitdeploy.backends.base import Options
    from vitdeploy.images import find_images
    from vitdeploy.predictor import Predictor

    paths: dict[Path, None] = {}
    broken = 0
    for argument in images:
        try:
            paths.update(dict.fromkeys(find_images([argument])))
        except ImageError as error:
            broken += 1
            output.error(error.message, error.hint)
    options = Options(threads=threads, provider=provider)
    results: list[dict[str, Any]] = []
    write = results.append if as_json else _csv_writer() if as_csv else _print
    with Predictor.open(bundle, backend=backend, artifact=artifact, options=options) as predictor:
        if predictor.note:
            output.note(predictor.note)
        for path, result in zip(paths, predictor.stream(paths, top_k), strict=True):
            if isinstance(result, ImageError):
                broken += 1
                output.error(result.message, result.hint)
            else:
                write(_as_dict(path, result))
    if as_json:
        output.json_document({"images": results})
    return ImageError.exit_code if broken else 0


def _as_dict(path: Path, predictions: Sequence[Prediction]) -> dict[str, Any]:
    return {
        "path": str(path),
        "predictions": [{"label": p.label, "index": p.index, "score": p.score} for p in predictions],
    }


def _print(image: dict[str, Any]) -> None:
    output.line(image["path"])
    for row in image["predictions"]:
        output.line(f"  {row['score']:8.4f}  {row['index']:>5}  {row['label']}")


def _csv_writer() -> Callable[[dict[str, Any]], None]:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(("path", "rank", "index", "label", "score"))

    def write(image: dict[str, Any]) -> None:
        for rank, row in enumerate(image["predictions"], 1):
            writer.writerow((image["path"], rank, row["index"], row["label"], f"{row['score']:.6f}"))

    return write
