"""``vitdeploy explain``: images looked at with a bundle, the figures written as a page and as pictures."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from vitdeploy._version import __version__
from vitdeploy.benchmark.report import require_libraries
from vitdeploy.benchmark.results import require_writable, write_whole
from vitdeploy.bundle.folder import Bundle
from vitdeploy.bundle.output_folder import GENERATOR, output_folder
from vitdeploy.bundle.staging import StagedFolder
from vitdeploy.config import Preprocess, size_name
from vitdeploy.errors import UsageError
from vitdeploy.explanation.figures import Explanation
from vitdeploy.explanation.looking import Looker, looker_of, preprocess_of
from vitdeploy.explanation.page import Drawn, draw, html_text
from vitdeploy.images.decode import ImageSource, load_image
from vitdeploy.images.fitting import fit
from vitdeploy.images.preprocess import shown_size
from vitdeploy.progress import Progress

MARKER = "explanation.json"
"""The figures as numbers; a folder without it is never replaced."""
PAGE = "index.html"
MOST_IMAGES = 64


def run_explain(
    bundle: str | Path | Bundle,
    images: Sequence[ImageSource],
    folder: Path | None = None,
    *,
    html: Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Explanation:
    """Look at images with a bundle; ``vitdeploy.explain`` documents the arguments and errors."""
    progress = progress or Progress()
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    spec = preprocess_of(opened)
    if not 1 <= len(images) <= MOST_IMAGES:
        raise UsageError(
            f"{len(images)} images: figures are drawn of 1 to {MOST_IMAGES}", hint="name some of them"
        )
    require_libraries("the page of figures")
    if folder is None and html is None:
        folder = Path(f"{opened.root.resolve().name.removesuffix('.bundle')}.explained")
    target = None
    if folder is not None:
        target = output_folder(folder, opened, marker=MARKER, kind="explanation", force=force)
        with _staged(target, folder):
            pass  # it can be written to: that is known before anything is computed
    if html is not None:
        require_writable([html])
    named = [
        (_name(source, number), load_image(source, heif=True)) for number, source in enumerate(images, 1)
    ]
    explanation = _look(opened, spec, named, progress)
    with progress.stage("draw") as stage:
        drawn = draw(explanation)
        stage.detail = f"{len(list(drawn.files()))} pictures"
    page = html_text(explanation, drawn)
    with progress.stage("write") as stage:
        if target is not None and folder is not None:
            explanation = _write(
                target, folder, opened, replace(explanation, folder=folder), drawn, page, force
            )
        if html is not None:
            write_whole(html, page)
            explanation = replace(explanation, html=html)
        stage.size = len(page.encode())
        stage.detail = f"{html or (folder or Path()) / PAGE}"
    return explanation


def _name(source: ImageSource, number: int) -> str:
    return os.fspath(source) if isinstance(source, str | os.PathLike) else f"image {number}"


def _look(
    bundle: Bundle, spec: Preprocess, images: Sequence[tuple[str, Image.Image]], progress: Progress
) -> Explanation:
    """All figures; of several image sizes, each image goes where it fits, and weights are of the first."""
    sizes, lookers = bundle.sizes, dict[object, Looker]()
    looked = []
    for name, image in images:
        size = fit(shown_size(image, spec), sizes) if len(sizes) > 1 else None
        if size not in lookers:
            with progress.stage("load") as stage:
                view = bundle if size is None else bundle.at_size(size)
                lookers[size] = looker_of(view, view.manifest.preprocess or spec)
                stage.detail = bundle.manifest.name + ("" if size is None else f", {size_name(size)}")
        with progress.stage("look") as stage:
            looked.append(lookers[size].look(name, image))
            best = looked[-1].predictions
            stage.detail = f"{name}: {best[0].label}" if best else name
    first = next(iter(lookers.values()))
    with progress.stage("weights") as stage:
        weights = first.weights()
        stage.detail = first.bundle.manifest.model.summary if first.bundle.manifest.model else "of the module"
    with progress.stage("precisions") as stage:
        errors = first.errors(images[0][1])
        said = (f"{e.precision} {e.output:.1e}" for e in errors if e.output is not None)
        stage.detail = ", ".join(said) or "of blocks that are not known"
    for looker in lookers.values():
        looker.close()
    manifest = bundle.manifest
    return Explanation(
        bundle.root,
        manifest.name,
        manifest.model.summary if manifest.model else "a module of your own",
        tuple(looked),
        weights,
        errors,
        _parity(bundle),
        first.left_out(),
    )


def _parity(bundle: Bundle) -> tuple[tuple[str, float], ...]:
    """Of each artifact, the worst relative error on record."""
    worst: dict[str, float] = {}
    for record in bundle.manifest.parity:
        if record.metrics.relative is not None:
            worst[record.artifact] = max(worst.get(record.artifact, 0.0), record.metrics.relative)
    return tuple(worst.items())


def _write(
    target: Path,
    folder: Path,
    bundle: Bundle,
    explanation: Explanation,
    drawn: Drawn,
    page: str,
    force: bool,
) -> Explanation:
    """The page, the pictures and the numbers as a folder, all at once.

    Raises:
        UsageError: the disk refuses.
    """
    pictures = dict(drawn.files())
    explanation = replace(explanation, files=(PAGE, *pictures, MARKER))
    numbers = {
        key: value for key, value in explanation.as_dict().items() if key not in ("ok", "folder", "html")
    }
    made = {"name": bundle.manifest.name, "digest": bundle.manifest.digest}
    document = {"generator": f"{GENERATOR} {__version__}", **numbers, "bundle": made}
    with _staged(target, folder) as staged:
        for name, data in pictures.items():
            path = staged.path / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
        (staged.path / PAGE).write_text(page, encoding="utf-8")
        text = json.dumps(document, indent=1, allow_nan=False)
        (staged.path / MARKER).write_text(f"{text}\n", encoding="utf-8")
        staged.commit(replace=force)
    return explanation


@contextlib.contextmanager
def _staged(target: Path, folder: Path) -> Iterator[StagedFolder]:
    """A folder that appears all at once.

    Args:
        folder: what the user calls it.

    Raises:
        UsageError: the disk refuses.
    """
    try:
        with StagedFolder(target) as staged:
            yield staged
    except OSError as error:
        there = isinstance(error, FileExistsError)
        hint = "--force replaces it" if there else "choose a folder you may write to, on a disk with space"
        raise UsageError(f"{folder}: cannot be written: {error.strerror or error}", hint=hint) from error
