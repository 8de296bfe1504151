"""The measurements in docs/serving.md, made from the committed records.

python -m benchmarks.serving.table            # print them, and what does not hold of what we claim
python -m benchmarks.serving.table --write    # put them into docs/serving.md
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.documents import Part
from benchmarks.peers.environments import ROOT
from benchmarks.serving.record import RESULTS, Record, broken_claims, read, table
from benchmarks.serving.subjects import SCOPES

PART = Part(ROOT / "docs" / "serving.md", "benchmarks/serving/table.py")


def committed() -> list[Record]:
    """The record of every model.

    Raises:
        FileNotFoundError: one is missing.
    """
    return [read(RESULTS / f"serve-{model}.json") for model in SCOPES]


def text(records: Sequence[Record]) -> str:
    """The part of the document."""
    return "\n\n".join(map(table, records))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print or write; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.table", description=__doc__)
    parser.add_argument("--write", action="store_true", help="into docs/serving.md")
    options = parser.parse_args(arguments)
    try:
        records = committed()
    except FileNotFoundError as error:
        print(f"error: {error.filename} is not there: make bench-serve", file=sys.stderr)
        return 2
    broken = (claim for one in records for claim in broken_claims(one))
    PART.publish(text(records), broken, write=options.write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
