"""``vitdeploy explain``: what a model looks at, as a page of figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitdeploy.cli import output

if TYPE_CHECKING:
    from vitdeploy.explanation.figures import Explanation

SUMMARY = "Show what a model looks at: attention, relevance, and what its weights are."
EXAMPLES = (
    "vitdeploy explain vit.bundle cat.jpg",
    "vitdeploy explain vit.bundle cat.jpg dog.jpg -o figures",
    "vitdeploy explain clip.bundle photos/ --html figures.html",
    "vitdeploy explain vit.bundle cat.jpg --json | jq '.images[].predictions[0]'",
)


def command(
    bundle: Annotated[
        Path, typer.Argument(metavar="BUNDLE", help="The bundle whose model it is.", show_default=False)
    ],
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE|DIR...",
            help="Image files, or folders to search for them; at most 64.",
            show_default=False,
        ),
    ],
    folder: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Folder for the page, its pictures as PNG and the numbers.  "
            "[default: NAME.explained, unless --html is given]",
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the page there, one file that loads nothing.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier explanation in DIR.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Draw what a model looks at in images, computed from the bundle's weights by the reference model.

    Attention of every block and head, attention rollout, relevance for the likeliest classes, how far heads
    look, how long tokens are, what each precision costs behind each block, similarity of positions, and the
    filters of the patches. What does not apply to a model is said. Needs PyTorch and matplotlib.
    """
    from vitdeploy.exporter import exporting
    from vitdeploy.images.decode import find_images

    with exporting("explain"):
        from vitdeploy.explanation.run import run_explain

    with output.Stages() as stages, output.stdout_is_ours():
        found = run_explain(bundle, find_images(images), folder, html=html, force=force, progress=stages)
    if as_json:
        return output.json_document({**found.as_dict(), "stages": stages.as_list(), "notes": stages.notes})
    return _print(found)


def _print(found: Explanation) -> None:
    for image in found.images:
        output.line(image.path)
        for best in image.predictions:
            output.line(f"  {best.score:8.4f}  {best.index:>5}  {best.label}")
    for left in found.left_out:
        output.line(f"not shown: {left.figure}: {left.reason}")
    for path in (found.folder and found.folder / "index.html", found.html):
        if path is not None:
            output.line(f"page: {path}")
    if found.folder is not None:
        output.line(f"{len(found.files) - 2} pictures and explanation.json beside it")
