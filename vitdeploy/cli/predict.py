"""``vitdeploy predict``: images in, labels or vectors out; here, or as a job on Ray."""

from __future__ import annotations

import csv
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from vitdeploy.cli import output
from vitdeploy.errors import ImageError, UsageError, did_you_mean

if TYPE_CHECKING:
    from vitdeploy.bundle.manifest import Manifest
    from vitdeploy.config import Size
    from vitdeploy.predictor import Answer, AnyImage, Prediction, Predictor
    from vitdeploy.ray.job import JobRequest, Summary

SUMMARY = "Classify images, or embed them."
EXAMPLES = (
    "vitdeploy predict vit.bundle cat.jpg",
    "vitdeploy predict vit.bundle photos/ --top-k 1 --csv > labels.csv",
    "vitdeploy predict vit.bundle cat.jpg --artifact fp16 --json",
    "vitdeploy predict vit.bundle https://example.org/cat.jpg - < dog.jpg",
    "vitdeploy predict vit.bundle photos/ --fit 384x384",
    "vitdeploy predict clip.bundle photos/ -o vectors.npy",
    "vitdeploy predict vit.bundle photos/ --engine ray -o labels/",
)
_T = TypeVar("_T")
_TOP_K = 5
ENGINES = ("local", "ray")
_DEEP = (".png", ".tif", ".tiff", ".pgm", ".pnm")
"""Files that may have 16-bit grey."""

Engine = Annotated[
    str,
    typer.Option(
        metavar="E", help="Where to run: local, or ray, a job that writes Parquet and can be resumed."
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE|DIR",
        help="File for vectors: .npy (names beside it), .parquet or .jsonl. Folder for a job on Ray.",
    ),
]
Fit = Annotated[
    str | None,
    typer.Option(
        metavar="aspect|area|HxW",
        help="Where each image goes, of a bundle of several image sizes: to the nearest aspect ratio, and of "
        "several such the nearest area; to the nearest area; or to one size.  [default: aspect]",
    ),
]
Dimensions = Annotated[
    int | None,
    typer.Option(metavar="N", help="Shorten vectors, where the bundle says that its model allows it."),
]
Workers = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Sessions of a job on Ray.  [default: one per CPU, at most 8 per machine]"
    ),
]
Batch = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Images that each session of a job on Ray takes at a time.  [default: the artifact's]",
    ),
]
Column = Annotated[
    str | None,
    typer.Option(
        metavar="C", help="Have a job on Ray read Parquet files, from their column of images or paths."
    ),
]


def command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle to run.", show_default=False)],
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE|DIR|URL|-...",
            help="Image files, folders to search for them, http(s) addresses; - is one image on stdin.",
            show_default=False,
        ),
    ],
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="B",
            help="The runtime; `doctor` lists them.  [default: what `bench --pick` chose, else onnxruntime]",
        ),
    ] = None,
    artifact: Annotated[
        str | None,
        typer.Option(
            metavar="A", help="Name or precision of the artifact to run.  [default: the most precise]"
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="K", help=f"How many classes to give for each image.  [default: {_TOP_K}]"
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="How many CPU threads the runtime uses.")
    ] = None,
    provider: Annotated[
        str | None,
        typer.Option(
            metavar="P", help="ONNX Runtime's execution provider: cpu, cuda, tensorrt or tensorrt-rtx."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print one line per image and class.")] = False,
    fit: Fit = None,
    dimensions: Dimensions = None,
    engine: Engine = "local",
    out: Out = None,
    workers: Workers = None,
    batch: Batch = None,
    parquet_column: Column = None,
) -> int:
    """Classify images; or embed them, where the bundle gives embeddings or features.

    An image that cannot be decoded is reported on stderr, the others are still done, and the
    exit code is 2. With --engine ray, images may be in Parquet files, and what an earlier start has
    done is left out.

    Where a bundle has several image sizes, the answer says which one an image was computed at.
    """
    if as_json and as_csv:
        raise UsageError("--json and --csv exclude each other")
    only_ray = {"--workers": workers, "--batch": batch, "--parquet-column": parquet_column}
    _check_engine(engine, only_ray, as_csv)
    from vitdeploy.bundle.folder import Bundle
    from vitdeploy.images.fitting import DEFAULT_RULE, parse_rule

    opened, rule = Bundle.open(bundle), parse_rule(fit) if fit else DEFAULT_RULE
    _check_output(opened.manifest, top_k, dimensions, as_csv)
    into_file = out is not None and engine == "local" and opened.manifest.vectors is not None
    classes = opened.manifest.classifies and not into_file
    what = "classified" if classes else "embedded"
    if engine == "ray":
        if out is None:
            raise UsageError("--engine ray writes its results into a folder", hint="-o DIR")
        _check_files(images)
        from vitdeploy.ray.job import JobRequest

        request = JobRequest(
            bundle=bundle,
            inputs=tuple(images),
            output=out,
            column=parquet_column,
            backend=backend,
            artifact=artifact,
            provider=provider,
            top_k=top_k or _TOP_K,
            threads=threads,
            workers=workers,
            batch=batch,
            fit=rule,
        )
        return _on_ray(request, what, as_json)
    from vitdeploy.backends.base import Options
    from vitdeploy.predictor import Predictor

    if out is not None:
        _check_file(opened.manifest, out)
    options = Options(threads=threads, provider=provider)
    with Predictor.open(opened, backend=backend, artifact=artifact, options=options, fit=rule) as predictor:
        several = len(opened.sizes) > 1
        sources, missing = _sources(images)
        if predictor.note:
            output.note(predictor.note)
        began = time.perf_counter()
        if classes:
            failed = _classify(predictor, sources, top_k or _TOP_K, as_json, as_csv, several)
        else:
            failed = _embed(predictor, sources, missing, out, as_json, several)
        seconds = time.perf_counter() - began
    if sources and any(Path(argument).is_dir() for argument in images):
        done, speed = output.count(len(sources) - failed, "image"), len(sources) / max(seconds, 1e-9)
        output.note(f"{done} {what}, {failed} failed, {speed:.1f} images/s")
    return ImageError.exit_code if missing + failed else 0


def _check_output(manifest: Manifest, top_k: int | None, dimensions: int | None, as_csv: bool) -> None:
    """Raise a UsageError for flags of what the bundle does not give."""
    if dimensions is not None:
        raise UsageError(
            f"--dimensions {dimensions}: the bundle does not say that its vectors can be shortened",
            hint="leave it out, and get the whole vectors",
        )
    if not manifest.classifies:
        for flag, given in (("--top-k", top_k is not None), ("--csv", as_csv)):
            if given:
                raise UsageError(
                    f"{flag} is for classes, and the bundle gives {manifest.gives}",
                    hint="-o FILE.npy, FILE.parquet or FILE.jsonl writes vectors",
                )


def _check_file(manifest: Manifest, out: Path) -> None:
    """Raise a UsageError where no file can be written: of classes, or of an unknown kind."""
    from vitdeploy.cli.vectors import FORMATS

    if manifest.vectors is None:
        raise UsageError(
            f"-o {out}: only --engine ray has it, and bundles of embeddings or features; this one gives "
            f"{manifest.gives}",
            hint="add --engine ray; or --csv or --json prints the classes",
        )
    if out.suffix not in FORMATS:
        raise UsageError(f"-o {out}: vectors are written as {', '.join(FORMATS)}")


def _check_engine(engine: str, only_ray: Mapping[str, object], as_csv: bool) -> None:
    """Raise a UsageError for what an engine does not have, or for one that there is not."""
    if engine not in ENGINES:
        hint = f"known: {', '.join(ENGINES)}"
        raise UsageError(f"unknown engine {engine!r}{did_you_mean(engine, ENGINES)}", hint=hint)
    if engine == "ray":
        if as_csv:
            raise UsageError("--engine ray writes Parquet, not CSV", hint="leave --csv out")
        return
    for name, value in only_ray.items():
        if value is not None:
            raise UsageError(f"{name} {value}: only --engine ray has it", hint="add --engine ray")


def _check_files(arguments: Sequence[str]) -> None:
    """Raise a UsageError for what other machines could not read."""
    from vitdeploy.images.remote import is_address

    for argument in arguments:
        if argument == "-" or is_address(argument):
            raise UsageError(f"{argument}: --engine ray reads files and folders", hint="leave --engine out")


def _sources(arguments: Sequence[str]) -> tuple[dict[str, AnyImage], int]:
    """The images that the arguments name, each once, by name; and how many arguments name none."""
    from vitdeploy.images.decode import find_images
    from vitdeploy.images.kinds import unread_line
    from vitdeploy.images.remote import RemoteImage, is_address

    sources: dict[str, AnyImage] = {}
    unread = Counter[str]()
    broken = 0
    for argument in arguments:
        try:
            if argument == "-":
                sources["-"] = _standard_input()
            elif is_address(argument):
                sources[argument] = RemoteImage(argument)
            else:
                sources |= {str(path): path for path in find_images([argument], unread)}
        except ImageError as error:
            broken += 1
            output.error(error.message, error.hint)
    if left_out := unread_line(unread):
        output.note(left_out)
    return sources, broken


def _standard_input() -> AnyImage:
    if sys.stdin is None:
        raise ImageError("- is standard input, which is closed", hint="vitdeploy predict BUNDLE - < IMAGE")
    return sys.stdin.buffer


def _classify(
    predictor: Predictor,
    sources: Mapping[str, AnyImage],
    top_k: int,
    as_json: bool,
    as_csv: bool,
    several: bool,
) -> int:
    """Print each image's classes; returns how many images could not be read.

    Args:
        several: whether the bundle has several image sizes, so that it is said which one was taken.
    """
    images: list[dict[str, Any]] = []
    write = images.append if as_json else _csv_writer(several) if as_csv else _print

    def answer(name: str, found: Answer) -> None:
        write(_as_dict(name, predictor.best(found.row, top_k), found.size if several else None))

    broken = _each(sources, predictor.logit_answers(sources.values()), answer)
    if as_json:
        output.json_document({"images": images})
    return broken


def _embed(
    predictor: Predictor,
    sources: Mapping[str, AnyImage],
    missing: int,
    out: Path | None,
    as_json: bool,
    several: bool,
) -> int:
    """Write each image's vector, or show it; returns how many images could not be read.

    Args:
        several: as of :func:`_classify`.
    """
    from vitdeploy.cli import vectors

    kind, columns = predictor.vectors.name, int(predictor.vectors.shape[1])
    results = predictor.vector_answers(sources.values())
    if out is None:
        rows: list[tuple[str, Answer]] = []
        broken = _each(sources, results, lambda name, found: rows.append((name, found)))
        if as_json:
            images = [
                _sized(vectors.as_dict(name, found.row), found.size if several else None)
                for name, found in rows
            ]
            output.json_document({"vectors": kind, "images": images})
        elif rows:
            places = [found.size for _, found in rows] if several else []
            vectors.table([(name, found.row) for name, found in rows], places)
        return broken
    taken = Counter[str]()
    with vectors.vector_file(out, list(sources), columns) as write:

        def keep(name: str, found: Answer) -> None:
            write(name, found.row)
            taken[_size_text(found.size)] += 1

        broken = _each(sources, results, keep)
    done, names = len(sources) - broken, vectors.names_file(out) if out.suffix == ".npy" else None
    if as_json:
        counts = {"images": done, "failed": broken, "missing": missing}
        where = {"output": str(out), "names": names and str(names)}
        ok = not (broken or missing)
        sizes = {"image_sizes": dict(taken)} if several else {}
        output.json_document({"ok": ok, **where, "vectors": kind, "columns": columns, **counts, **sizes})
    else:
        beside = f", names in {names}" if names else ""
        at = f" ({', '.join(f'{n} at {size}' for size, n in taken.items())})" if several else ""
        output.line(f"{kind} of {output.count(done, 'image')}{at}, {columns} columns: {out}{beside}")
    return broken


def _each(
    sources: Mapping[str, AnyImage],
    results: Iterator[_T | ImageError],
    write: Callable[[str, _T], None],
) -> int:
    """Write what became of each image; returns how many could not be read, each an error of its own."""
    from vitdeploy.images.decode import is_deep_grey

    broken, scaled = 0, False
    for name, result in zip(sources, results, strict=True):
        if isinstance(result, ImageError):
            broken += 1
            output.error(result.message, result.hint)
            continue
        write(name, result)
        if not scaled and name.lower().endswith(_DEEP) and is_deep_grey(name):
            scaled = True
            output.note(
                f"{name} has 16-bit grey, which is scaled to 8 bits; transformers and timm clip it at 255 "
                "instead, and so may score it otherwise"
            )
    return broken


def _on_ray(request: JobRequest, what: str, as_json: bool) -> int:
    from vitdeploy.ray.job import run_job

    with output.Stages() as stages, output.stdout_is_ours():
        summary = run_job(request, stages)
    bad = summary.failed + summary.missing
    for message in summary.errors:
        output.error(message)
    if bad > len(summary.errors):
        output.note(f"and {bad - len(summary.errors)} more: see the column `error`")
    if as_json:
        output.json_document(_summary(request, summary))
    else:
        earlier = f", {output.count(summary.earlier, 'image')} done earlier" if summary.earlier else ""
        speed = f" ({summary.images_per_s:.1f} images/s)" if summary.seconds else ""
        output.line(
            f"{output.count(summary.images, 'image')} {what}{speed}, {summary.failed} failed{earlier}: "
            f"{request.output}"
        )
    return ImageError.exit_code if bad else 0


def _summary(request: JobRequest, summary: Summary) -> dict[str, Any]:
    return {
        "ok": not (summary.failed or summary.missing),
        "output": str(request.output),
        "images": summary.images,
        "earlier": summary.earlier,
        "failed": summary.failed,
        "missing": summary.missing,
        "seconds": round(summary.seconds, 3),
        "images_per_s": round(summary.images_per_s, 2),
        "workers": summary.workers,
        "threads": summary.threads,
        "parts": summary.parts,
        "errors": summary.errors,
    }


def _as_dict(path: str, predictions: Sequence[Prediction], size: Size | None) -> dict[str, Any]:
    rows = [{"label": p.label, "index": p.index, "score": p.score} for p in predictions]
    return _sized({"path": path, "predictions": rows}, size)


def _sized(image: dict[str, Any], size: Size | None) -> dict[str, Any]:
    """What is said of an image, with the size that it was computed at."""
    return image if size is None else image | {"image_size": list(size)}


def _size_text(size: Sequence[int] | None) -> str:
    """``384x512``; nothing where it goes without saying."""
    return "x".join(map(str, size or ()))


def _print(image: dict[str, Any]) -> None:
    size = _size_text(image.get("image_size"))
    output.line(f"{image['path']}  ({size})" if size else image["path"])
    for row in image["predictions"]:
        output.line(f"  {row['score']:8.4f}  {row['index']:>5}  {row['label']}")


def _csv_writer(several: bool) -> Callable[[dict[str, Any]], None]:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(("path", "rank", "index", "label", "score", *(("image_size",) if several else ())))

    def write(image: dict[str, Any]) -> None:
        size = (_size_text(image["image_size"]),) if several else ()
        for rank, row in enumerate(image["predictions"], 1):
            writer.writerow((image["path"], rank, row["index"], row["label"], f"{row['score']:.6f}", *size))

    return write
