"""Qwen2.5-VL's vision tower: our graph against that of the old exporter and transformers' own model.

    python -m benchmarks.qwen                       # a minute or two; writes results/qwen_cpu.json
    python -m benchmarks.qwen --rounds 5 --output /tmp/qwen.json
    python -m benchmarks.qwen --write               # the committed record into docs/performance.md

Four blocks of the published structure, half as wide, on 448 x 448 pixels: 32 x 32 patches, 16 windows, the
last block over the whole image. ``torch.onnx.export(dynamo=True)`` cannot trace transformers' tower; the old
exporter can, for one image of one grid. Both graphs have the same random weights and read the same patches,
as the image processor gives them. The rest is as in :mod:`benchmarks.families`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import vitdeploy
from benchmarks.documents import Part
from benchmarks.families import ROUNDS, THREADS, TITLES, TOLERANCE, graph_facts, said, taking_turns
from benchmarks.peers.common import RUNTIMES, Job
from benchmarks.peers.environments import ROOT
from vitdeploy.benchmark.environment import find_environment
from vitdeploy.benchmark.results import write_whole

if TYPE_CHECKING:
    import torch

WORK = ROOT / "build" / "qwen"
RESULTS = ROOT / "benchmarks" / "results" / "qwen_cpu.json"
PART = Part(ROOT / "docs" / "performance.md", "benchmarks/qwen.py")
LEAST = 1.1
"""How many times as fast as the old exporter's graph ours is at least."""
GRID = (32, 32)
PATCH = 14
VISION: Mapping[str, Any] = {
    "depth": 4,
    "hidden_size": 640,
    "intermediate_size": 1712,
    "num_heads": 8,
    "out_hidden_size": 1024,
    "fullatt_block_indexes": [3],
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or write the table; returns the exit code."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.qwen", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--write", action="store_true", help="the committed table into docs/performance.md")
    options = parser.parse_args(words)
    if options.write:
        record = json.loads(RESULTS.read_text(encoding="utf-8"))
        PART.publish(table(record), broken_claims(record), write=True)
        return 0
    ours, plain = prepare()
    record = {
        "command": shlex.join(["python", "-m", "benchmarks.qwen", *words]),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "threads": THREADS,
        "rounds": options.rounds,
        "environment": find_environment(ROOT, TITLES).model_dump(mode="json"),
        "graphs": {"ours": graph_facts(ours), "plain": graph_facts(plain)},
        "cells": [],
    }
    for cell in cells(ours, plain, options.rounds):
        record["cells"].append(cell)
        print(TITLES[cell["runtime"]], said(cell), flush=True)
    write_whole(options.output, json.dumps(record, indent=2) + "\n")
    PART.publish(table(record), broken_claims(record), write=False)
    return 0


def prepare() -> tuple[Path, Path]:
    """Our graph and the old exporter's, with the same weights; both are made anew."""
    import torch
    from transformers.models.qwen2_5_vl import configuration_qwen2_5_vl, modeling_qwen2_5_vl

    config = configuration_qwen2_5_vl.Qwen2_5_VLVisionConfig(**VISION)
    model: Any = modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1 if parameter.ndim == 1 and name.endswith("weight") else 0, 0.03)
    checkpoint, plain = WORK / "checkpoint", WORK / "plain.onnx"
    model.save_pretrained(checkpoint)
    _export_plain(model, plain)
    del model
    bundle, size = WORK / "ours.bundle", (GRID[0] * PATCH, GRID[1] * PATCH)
    vitdeploy.export(checkpoint, bundle, format="onnx", image_size=size, input="patches", batch=1, force=True)
    return bundle / "model.onnx", plain


def _export_plain(model: torch.nn.Module, path: Path) -> None:
    import torch

    class OneGrid(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.register_buffer("grid", torch.tensor([[1, *GRID]]))

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            features: torch.Tensor = self.model(pixel_values[0], grid_thw=self.grid).pooler_output
            return features[None]

    patches = torch.zeros(1, GRID[0] * GRID[1], 2 * 3 * PATCH**2)
    names: dict[str, Any] = {"input_names": ["pixel_values"], "output_names": ["image_features"]}
    torch.onnx.export(OneGrid().eval(), (patches,), str(path), dynamo=False, opset_version=17, **names)


def cells(ours: Path, plain: Path, rounds: int) -> Iterator[dict[str, Any]]:
    """What was measured on each runtime, with one image."""
    job: Job = {"threads": THREADS, "concurrency": 1, "precision": "fp32"}
    shape = (1, GRID[0] * GRID[1], 2 * 3 * PATCH**2)
    patches = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    for runtime, load in RUNTIMES.items():
        (first,), (second,) = load(job, ours), load(job, plain)
        here, there = first(patches)[0], second(patches)[0]
        error = float(np.abs(here - there).max() / np.abs(there).max())
        if error > TOLERANCE:
            raise SystemExit(f"on {runtime} the outputs differ by {error:.1e}")
        yield {"runtime": runtime, "batch": 1, "error": error} | taking_turns(first, second, patches, rounds)


def table(record: Mapping[str, Any]) -> str:
    """The record as it stands in the document."""
    ours, plain = (record["graphs"][name]["nodes"] for name in ("ours", "plain"))
    lines = [
        "Four blocks of Qwen2.5-VL's vision tower, half as wide, on 32 x 32 patches, fp32: our graph and",
        f"that of the old exporter, on {record['environment']['cpu']['name']}, {record['threads']} threads, "
        f"{record['rounds']} interleaved rounds of one image.",
        "`torch.onnx.export(dynamo=True)` cannot trace this tower. Columns as above.",
        "",
        "| runtime | batch 1 | nodes, plain and ours |",
        "|---|---|---|",
        *(f"| {TITLES[cell['runtime']]} | {said(cell)} | {plain}, {ours} |" for cell in record["cells"]),
        "",
        f"`{record['command']}`",
    ]
    return "\n".join(lines)


def broken_claims(record: Mapping[str, Any]) -> list[str]:
    """What of our claims a record does not bear out; one line each."""
    found = [
        f"{TITLES[cell['runtime']]}: {cell['ratio']['median']:.3f} × instead of {LEAST} ×"
        for cell in record["cells"]
        if cell["ratio"]["median"] < LEAST
    ]
    return found + [f"the graph has {kind}" for kind in record["graphs"]["ours"]["control"]]


if __name__ == "__main__":
    sys.exit(main())
