"""Find the fastest kernel configurations for the GPU of this machine and write its table.

Every candidate is checked against float64 before it is timed. The table lies beside the defaults, under
the GPU's name, and is used from the next run on; what the time did not suffice for keeps its default.

    python kernels/tune.py                                  # ViT-B/16 and L/16, four minutes
    python kernels/tune.py --models B/16 --batches 1 8 --budget 60
    python kernels/tune.py --output .                       # write the table here instead
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

KERNELS = Path(__file__).parent
sys.path.insert(0, str(KERNELS))

import torch  # noqa: E402

from vitdeploy_kernels.config import shipped_table  # noqa: E402
from vitdeploy_kernels.support import UnsupportedError  # noqa: E402
from vitdeploy_kernels.tuner import (  # noqa: E402
    MODELS,
    contestants_of,
    random_problems,
    specs_of,
    this_gpu,
    tune,
    write_table,
)
from vitdeploy_kernels.warming import Warmer  # noqa: E402

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def arguments() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["B/16", "L/16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32, 64, 256])
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    parser.add_argument("--budget", type=float, default=240.0, help="seconds (default: 240)")
    parser.add_argument("--output", type=Path, default=KERNELS / "vitdeploy_kernels" / "configs")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="that compile ahead")
    return parser.parse_args()


def main() -> int:
    given = arguments()
    try:
        target = this_gpu()
        table = shipped_table(target.capability, target.name)
    except (UnsupportedError, ValueError) as error:
        print(f"tune: {error}", file=sys.stderr)
        return 3
    dtype = DTYPES[given.dtype]
    specs = specs_of([MODELS[name] for name in given.models], given.batches, dtype, table)
    print(f"{target.name}: {len(specs)} shapes, {given.budget:.0f} s")
    with Warmer(dtype, given.processes) as warmer:
        warmer.submit({spec: contestants_of(spec, target, table) for spec in specs})
        tuned, findings = tune(
            specs,
            target,
            table,
            build=random_problems(dtype, torch.device("cuda")),
            budget=given.budget,
            ready=warmer.ready,
            keep=lambda partial: write_table(partial, given.output),
            report=lambda line: print(line, flush=True),
        )
    print(f"wrote {write_table(tuned, given.output)} ({len(findings)} of {len(specs)} shapes)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
