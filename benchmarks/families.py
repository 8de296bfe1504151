"""Other families of ViTs: our graph against the plain ``torch.onnx.export`` of transformers' own model.

    python -m benchmarks.families                   # some minutes; writes results/families_cpu.json
    python -m benchmarks.families --models CLIP-B/32 --rounds 5 --output /tmp/families.json
    python -m benchmarks.families --models Swin-T   # anew; the record keeps what it has of the others
    python -m benchmarks.families --write           # puts the committed table into docs/performance.md

Both graphs have the same random weights, a dynamic batch and opset 20; both runtimes the settings of
vitdeploy's backends. The outputs of the two are held against each other before they take turns in rounds; a
ratio is of their two times in one round. The processor's time, of all threads together, is measured beside:
other work on the machine changes it little, but it does not see how well the threads share the work.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import vitdeploy
from benchmarks.documents import Part
from benchmarks.peers.common import OPSET, RUNTIMES, Job
from benchmarks.peers.environments import ROOT
from benchmarks.spread import quartiles
from benchmarks.vits import PREPROCESSING
from vitdeploy.benchmark.environment import find_environment
from vitdeploy.benchmark.loop import Caller
from vitdeploy.benchmark.results import write_whole
from vitdeploy.bundle.onnx_graph import read_graph
from vitdeploy.config import Output

if TYPE_CHECKING:
    import torch

WORK = ROOT / "build" / "families"
RESULTS = ROOT / "benchmarks" / "results" / "families_cpu.json"
PART = Part(ROOT / "docs" / "performance.md", "benchmarks/families.py")
BATCHES = (1, 8)
THREADS = 2
ROUNDS = 12
"""An even number: in every other one, ours is the first."""
RUNS = 2
"""Of each graph in a round at batch 1, one after the other."""
TOLERANCE = 1e-4
"""Largest difference of the two graphs' outputs, relative to the largest output."""
CONTROL = frozenset({"Shape", "If", "Tile", "Loop", "Scan"})
"""Operators that no graph of ours has: what they compute is known at export."""
TITLES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


@dataclass(frozen=True)
class Family:
    """A model of transformers, what is read of it, and what is expected of our graph."""

    make: Callable[[], torch.nn.Module]
    read: Callable[[Any], torch.Tensor]
    """Its output, from what the model returns."""
    output: Output
    least: float
    """How many times as fast as the plain export ours is at least."""
    nodes: int = 28
    """The most of a block."""
    total: int | None = None
    """The most of the whole graph, where more than blocks repeat."""


def _clip() -> torch.nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection(CLIPVisionConfig())


def _siglip() -> torch.nn.Module:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    return SiglipVisionModel(SiglipVisionConfig())


def _dinov3() -> torch.nn.Module:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    return DINOv3ViTModel(DINOv3ViTConfig(num_register_tokens=4))


def _beit() -> torch.nn.Module:
    from transformers import BeitConfig, BeitForImageClassification

    config = BeitConfig(num_labels=1000, use_mask_token=False, use_relative_position_bias=True)
    # PyTorch 2.13 exports no scaled_dot_product_attention with a bias over a dynamic batch.
    model: Any = BeitForImageClassification._from_config(config, attn_implementation="eager")
    return model


def _swin() -> torch.nn.Module:
    from transformers import SwinConfig, SwinForImageClassification

    # As for BEiT.
    model: Any = SwinForImageClassification._from_config(
        SwinConfig(num_labels=1000), attn_implementation="eager"
    )
    return model


def _embedding(returned: Any) -> torch.Tensor:
    embeds: torch.Tensor = returned.image_embeds
    return embeds / embeds.norm(dim=-1, keepdim=True)


FAMILIES: Mapping[str, Family] = {
    "CLIP-B/32": Family(_clip, _embedding, "embedding", 1.05),
    "DINOv3-S/16": Family(_dinov3, lambda returned: returned.pooler_output, "features", 1.05, nodes=32),
    "SigLIP-B/16": Family(_siglip, lambda returned: returned.pooler_output, "features", 1.0),
    "BEiT-B/16": Family(_beit, lambda returned: returned.logits, "logits", 1.0),
    "Swin-T": Family(_swin, lambda returned: returned.logits, "logits", 1.0, total=310),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or write the table; returns the exit code."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--models", default=",".join(FAMILIES), help="comma-separated")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--keep", action="store_true", help="measure the graphs of the last time")
    parser.add_argument("--write", action="store_true", help="the committed table into docs/performance.md")
    options = parser.parse_args(words)
    if options.write:
        record = json.loads(RESULTS.read_text(encoding="utf-8"))
        PART.publish(table(record), broken_claims(record), write=True)
        return 0
    names = options.models.split(",")
    record = {
        "command": "python -m benchmarks.families"
        + ("" if options.rounds == ROUNDS else f" --rounds {options.rounds}"),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "threads": THREADS,
        "rounds": options.rounds,
        "environment": find_environment(ROOT, TITLES).model_dump(mode="json"),
        **kept(options.output, names, options.rounds),
    }
    for name in names:
        ours, plain = files_of(name) if options.keep else prepare(name)
        record["graphs"][name] = {"ours": graph_facts(ours), "plain": graph_facts(plain)}
        for cell in cells(name, ours, plain, options.rounds):
            record["cells"].append(cell)
            print(name, cell["runtime"], cell["batch"], said(cell), flush=True)
        write_whole(options.output, json.dumps(record, indent=2) + "\n")
    PART.publish(table(record), broken_claims(record), write=False)
    return 0


# --- what is measured ------------------------------------------------------------------------------------


def kept(path: Path, names: Sequence[str], rounds: int) -> dict[str, Any]:
    """What an earlier record has of other models, measured with as many rounds; a ratio is of one model."""
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if earlier.get("rounds") != rounds:
        return {"graphs": {}, "cells": []}
    return {
        "graphs": {name: graphs for name, graphs in earlier["graphs"].items() if name not in names},
        "cells": [cell for cell in earlier["cells"] if cell["model"] not in names],
    }


def files_of(name: str) -> tuple[Path, Path]:
    """Where our graph of a family's model lies, and the plain one."""
    folder = WORK / name.replace("/", "-")
    return folder / "ours.bundle" / "model.onnx", folder / "plain.onnx"


def prepare(name: str) -> tuple[Path, Path]:
    """Our graph of a family's model and the plain one, with the same weights; both are made anew."""
    import torch

    family, (ours, plain) = FAMILIES[name], files_of(name)
    checkpoint = plain.with_name("checkpoint")
    torch.manual_seed(0)
    model: Any = family.make().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # some families begin with tables of zeros
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(checkpoint)
    text = json.dumps(dict(PREPROCESSING), indent=2)
    (checkpoint / "preprocessor_config.json").write_text(text, encoding="utf-8")
    _export_plain(model, family, plain)
    del model
    output: Any = family.output
    vitdeploy.export(checkpoint, ours.parent, format="onnx", output=output, force=True)
    return ours, plain


def _export_plain(model: torch.nn.Module, family: Family, path: Path) -> None:
    import torch

    class Read(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return family.read(self.model(pixel_values=pixel_values))

    torch.onnx.export(
        Read(),
        (torch.zeros(2, 3, 224, 224),),
        path,
        dynamo=True,
        opset_version=OPSET,
        input_names=["pixel_values"],
        output_names=["output"],
        dynamic_shapes=({0: "N"},),
        external_data=False,
        verbose=False,
    )


def graph_facts(path: Path) -> dict[str, Any]:
    """How many nodes a graph has, those of one of our blocks, and the control operators among them."""
    nodes = list(read_graph(path).graph.node)
    return {
        "nodes": len(nodes),
        "block": sum(node.name.startswith("blocks.5.") for node in nodes),
        "control": sorted(CONTROL.intersection(node.op_type for node in nodes)),
    }


def cells(name: str, ours: Path, plain: Path, rounds: int) -> Iterator[dict[str, Any]]:
    """One cell for each runtime and batch size."""
    job: Job = {"threads": THREADS, "concurrency": 1, "precision": "fp32"}
    random = np.random.default_rng(0)
    for runtime, load in RUNTIMES.items():
        (first,), (second,) = load(job, ours), load(job, plain)
        for batch in BATCHES:
            pixels = random.standard_normal((batch, 3, 224, 224), dtype=np.float32)
            here, there = first(pixels)[0], second(pixels)[0]
            error = float(np.abs(here - there).max() / np.abs(there).max())
            if error > TOLERANCE:
                raise SystemExit(f"{name} on {runtime}: the outputs differ by {error:.1e}")
            yield {"model": name, "runtime": runtime, "batch": batch, "error": error} | taking_turns(
                first, second, pixels, rounds
            )


def taking_turns(first: Caller, second: Caller, pixels: Any, rounds: int) -> dict[str, Any]:
    """Medians of both in milliseconds, and of the second's time over the first's, round by round."""
    runs = 1 if len(pixels) > 1 else RUNS
    walls: dict[Caller, list[float]] = {first: [], second: []}
    processor: dict[Caller, list[float]] = {first: [], second: []}
    for number in range(rounds):
        for caller in (first, second) if number % 2 else (second, first):
            begin, used = time.perf_counter(), time.process_time()
            for _ in range(runs):
                caller(pixels)
            walls[caller].append((time.perf_counter() - begin) / runs)
            processor[caller].append((time.process_time() - used) / runs)
    ours, plain = (round(1e3 * float(np.median(walls[caller])), 2) for caller in (first, second))
    ratio, busy = (
        quartiles([b / a for a, b in zip(times[first], times[second], strict=True)])
        for times in (walls, processor)
    )
    return {"ours_ms": ours, "plain_ms": plain, "ratio": ratio, "processor_ratio": busy}


# --- what is said of it ----------------------------------------------------------------------------------


def table(record: Mapping[str, Any]) -> str:
    """The record as it stands in the document."""
    batches = sorted({cell["batch"] for cell in record["cells"]})
    titles = [f"batch {batch}" for batch in batches]
    heading = ["model", "runtime", *titles, "nodes, plain and ours", "a block"]
    lines = [
        "Other families, fp32: our graph and the plain `torch.onnx.export` of transformers' model with the",
        f"same weights, on {record['environment']['cpu']['name']}, {record['threads']} threads,",
        f"{record['rounds']} interleaved rounds. Median ms, ours first, then how many times as fast it is",
        "(quartiles over the rounds), and the same of the processor's time.",
        "",
        f"| {' | '.join(heading)} |",
        "|---" * len(heading) + "|",
    ]
    for name, graphs in record["graphs"].items():
        ours, plain = graphs["ours"], graphs["plain"]
        for runtime, title in TITLES.items():
            found = {c["batch"]: c for c in record["cells"] if (c["model"], c["runtime"]) == (name, runtime)}
            cells = " | ".join(said(found[batch]) for batch in batches)
            nodes = f"{plain['nodes']}, {ours['nodes']} | {ours['block']}"
            lines.append(f"| {name} | {title} | {cells} | {nodes} |")
    lines += ["", f"`{record['command']}`"]
    return "\n".join(lines)


def said(cell: Mapping[str, Any]) -> str:
    ratio, busy = cell["ratio"], cell["processor_ratio"]
    spread = f"{ratio['median']:.2f} × ({ratio['q1']:.2f} to {ratio['q3']:.2f})"
    return f"**{cell['ours_ms']:.0f}**, {cell['plain_ms']:.0f}, {spread}, {busy['median']:.2f} ×"


def broken_claims(record: Mapping[str, Any]) -> list[str]:
    """What of our claims a record does not bear out; one line each."""
    found = []
    for cell in record["cells"]:
        least, ratio = FAMILIES[cell["model"]].least, cell["ratio"]["median"]
        if ratio < least:
            where = f"{cell['model']} on {TITLES[cell['runtime']]}, batch {cell['batch']}"
            found.append(f"{where}: {ratio:.3f} × instead of {least} ×")
    for name, graphs in record["graphs"].items():
        ours, most = graphs["ours"], FAMILIES[name].nodes
        if ours["block"] > most:
            found.append(f"{name}: {ours['block']} nodes in a block instead of {most}")
        total = FAMILIES[name].total
        if total is not None and ours["nodes"] > total:
            found.append(f"{name}: {ours['nodes']} nodes instead of {total}")
        found += [f"{name}: the graph has {kind}" for kind in ours["control"]]
    return found


if __name__ == "__main__":
    sys.exit(main())
