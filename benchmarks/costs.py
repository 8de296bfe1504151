"""What exporting and building cost: the table in docs/performance.md, made from the committed records.

    python -m benchmarks.costs            prints the table, and what does not hold of what we claim
    python -m benchmarks.costs --write    writes it into the document

The records are made by ``bench_export.py``, which says how in its first lines.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.documents import Part

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PART = Part(ROOT / "docs" / "performance.md", "benchmarks/costs.py")
SUITES = ("export_cpu", "engines_cpu", "sizes_cpu")
CLAIMS = {
    "test_export_vit_b16_fp32_and_fp16": 20.0,
    "test_export_digits_fp32_and_fp16": 4.0,
}
"""The most seconds of a whole export, by the benchmark that measures it."""
MOST_MEMORY = 3.0
"""Peak of an export of ViT-B/16 beyond the framework's own, over the size of its weights."""
_EXPORT = "test_export_vit_b16_fp32_and_fp16"

Records = Mapping[str, Mapping[str, Any]]


def records(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Every benchmark of the committed records, by its name."""
    files = [path for suite in SUITES if (path := folder / f"{suite}.json").exists()]
    return {row["name"]: row for path in files for row in json.loads(path.read_text("utf-8"))["benchmarks"]}


def table(found: Records) -> str:
    """The table; what has no record has no row."""
    lines = ["| what | measured | spread (quartiles) |", "|---|---|---|"]
    return "\n".join(
        [*lines, *(f"| {title} | {value} | {spread} |" for title, value, spread in _rows(found))]
    )


def broken(found: Records) -> Iterator[str]:
    """What does not hold of what we claim."""
    for name, most in CLAIMS.items():
        if name not in found:
            yield f"{name} has no record"
        elif (median := found[name]["stats"]["median"]) > most:
            yield f"{name} takes {median:.1f} s, more than {most:g} s"
    memory = found[_EXPORT]["extra_info"]["peak_beyond_framework_over_weights"]["median"]
    if memory > MOST_MEMORY:
        yield f"an export's peak is {memory:.2f} times the weights, more than {MOST_MEMORY:g}"


def _rows(found: Records) -> Iterator[tuple[str, str, str]]:
    for name, title, digits in (
        (_EXPORT, "export of ViT-B/16 to fp32 and fp16, with all proofs", 0),
        ("test_export_digits_fp32_and_fp16", "the same of the digits model, a whole process", 1),
        (
            "test_rtx_engine_vit_b16_fp16",
            "a TensorRT for RTX engine of the fp16 ViT-B/16, for one architecture",
            1,
        ),
    ):
        if name not in found:
            continue
        stats, extra = found[name]["stats"], found[name]["extra_info"]
        yield title, f"{stats['median']:.{digits}f} s", f"{stats['rounds']} runs"
        if name == _EXPORT:
            ratio = extra["peak_beyond_framework_over_weights"]
            yield (
                "its peak memory beyond the framework's own, over the weights' size",
                f"{ratio['median']:.1f} ×",
                f"{ratio['q1']:.1f} to {ratio['q3']:.1f}",
            )
        if "peak_beyond_framework_mb" in extra:
            memory, six = extra["peak_beyond_framework_mb"], extra["six_targets_over_one_seconds"]
            quartiles = f"{memory['q1']:.0f} to {memory['q3']:.0f}"
            yield "its peak memory beyond the library's own", f"{memory['median']:.0f} MB", quartiles
            yield "its size over the ONNX file's", f"{extra['engine_over_onnx_bytes']:.2f} ×", ""
            yield (
                "engines for six architectures from one parse, over the time for one",
                f"{six['median']:.1f} ×",
                f"{six['q1']:.1f} to {six['q3']:.1f}",
            )
    for name, record in found.items():
        if "further_over_first_seconds" in record["extra_info"]:
            share, size = record["extra_info"]["further_over_first_seconds"], name.split("[")[1].rstrip("]")
            yield (
                f"a further image size, {size if 'x' in size else f'{size}x{size}'}, over the export of "
                "224x224 to fp16",
                f"{share['median']:.2f} ×",
                f"{share['q1']:.2f} to {share['q3']:.2f}",
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table or write it; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.costs", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    options = parser.parse_args(arguments)
    found = records()
    PART.publish(table(found), broken(found), write=options.write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
