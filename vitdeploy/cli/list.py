"""``vitdeploy list``: the families of checkpoints that are read, and the named variants."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitdeploy.cli import output

if TYPE_CHECKING:
    from vitdeploy.variants import Variant

SUMMARY = "List the families of checkpoints that are read, and the named variants."
EXAMPLES = ("vitdeploy list", "vitdeploy list --json | jq '.variants[].name'")


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> int:
    """List the families of checkpoints that are read, and the named variants that --model takes.

    A variant has seeded random weights, or those of --checkpoint.
    """
    families, variants = _families(), _variants()
    if as_json:
        output.json_document({"ok": True, "families": families, "variants": variants})
    else:
        _print(families, variants)
    return 0


def _families() -> list[dict[str, Any]]:
    from vitdeploy.checkpoint.catalogue import CATALOGUE

    return [
        {
            "name": name,
            "models": list(entry.models),
            "library": entry.library,
            "on_disk": list(entry.on_disk),
            "reads": entry.reads.replace("`", ""),
            "outputs": list(entry.outputs),
        }
        for name, entry in CATALOGUE.items()
    ]


def _variants() -> list[dict[str, Any]]:
    from vitdeploy.exporter import exporting
    from vitdeploy.variants import find_variant, variant_names

    with exporting("counting parameters"):
        from vitdeploy.model.registry import parameter_count

    names: dict[Variant, list[str]] = {}
    for name in variant_names():
        names.setdefault(find_variant(name), []).append(name)
    return [
        {
            "name": shortest,
            "also": others,
            "parameters": parameter_count(variant.config),
            "image_size": list(variant.config.image_size),
            "preprocess": variant.preset,
            "outputs": list(variant.config.outputs),
        }
        for variant, called in names.items()
        for shortest, *others in [sorted(called, key=len)]
    ]


def _print(families: list[dict[str, Any]], variants: list[dict[str, Any]]) -> None:
    output.table(
        ("models", "library", "on disk", "read", "outputs"),
        [
            (
                ", ".join(family["models"]),
                family["library"],
                ", ".join(family["on_disk"]),
                family["reads"],
                ", ".join(family["outputs"]),
            )
            for family in families
        ],
    )
    output.line()
    output.table(
        ("variant", "the same", ">parameters", ">pixels", "outputs"),
        [
            (
                variant["name"],
                ", ".join(variant["also"]),
                f"{variant['parameters'] / 1e6:.1f} M",
                "x".join(map(str, variant["image_size"])),
                ", ".join(variant["outputs"]),
            )
            for variant in variants
        ],
    )
