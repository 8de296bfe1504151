"""INT8 and FP8 of a real trained model: ours and other tools', what they cost and what they gain.

    python -m benchmarks.quantisation                    # 25 minutes; writes results/quantisation_cpu.json
    python -m benchmarks.quantisation --part accuracy    # the record keeps what it has of the speeds
    python -m benchmarks.quantisation --part speed --rounds 12
    python -m benchmarks.quantisation --part optimize
    python -m benchmarks.quantisation --write            # the committed tables into docs/quantisation.md

The model is DINOv2-small (``make real-model``) giving the CLS token and the mean of the patches, for 200
images of each of two tasks that nobody was calibrated with. All tools begin with our fp32 graph and the same
32 images. For speed all variants of a model are in one process and take turns in shuffled rounds; a ratio is
of two times of one round. ViT-B/16 is measured for its speed alone: its weights are random.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import vitdeploy
from benchmarks import optimised
from benchmarks.documents import Part
from benchmarks.peers.common import RUNTIMES, Job
from benchmarks.peers.environments import ROOT
from benchmarks.peers.quantisers import QUANTISERS, QuantiserFailure, quantised
from benchmarks.real_images import TASKS, labels, read_images
from benchmarks.real_model import REAL, Floats, build, normalised, pixel_values
from benchmarks.spread import quartiles
from vitdeploy.backends.base import one_line
from vitdeploy.benchmark.environment import find_environment
from vitdeploy.benchmark.loop import Caller
from vitdeploy.benchmark.results import write_whole
from vitdeploy.bundle.folder import Bundle

WORK = ROOT / "build" / "quantisation"
RESULTS = ROOT / "benchmarks" / "results" / "quantisation_cpu.json"
PART = Part(ROOT / "docs" / "quantisation.md", "benchmarks/quantisation.py")
SMALL, BASE = optimised.REAL_MODEL, "ViT-B/16"
BATCHES = (1, 8)
THREADS = 2
ROUNDS = 12
TITLES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
CLS = 384
"""The first so many features of the model are its CLS token, the rest the mean of the patches."""


@dataclass(frozen=True)
class Variant:
    """A file on a runtime.

    Attributes:
        made: ``fp32``, ``int8``, ``int8-8`` (8 bits of weights) or ``fp8`` of ours, or one of ``QUANTISERS``.
        precision: of what is not quantised.
        timed: whether its speed says anything: a CPU emulates fp8.
        base: whether it is measured with the larger model, too.
    """

    title: str
    made: str
    runtime: str
    precision: str = "fp32"
    timed: bool = True
    base: bool = True


def _variants() -> Mapping[str, Variant]:
    ours = {
        "fp32": Variant("fp32", "fp32", "onnxruntime"),
        "bf16": Variant("bf16", "fp32", "openvino", "bf16"),
        "int8": Variant("**int8**, 7-bit weights, bf16 rest", "int8", "openvino", "bf16"),
        "int8-ort": Variant("**int8**, 7-bit weights", "int8", "onnxruntime"),
        "int8-8": Variant("**int8**, 8-bit weights, bf16 rest", "int8-8", "openvino", "bf16", base=False),
        "int8-8-ort": Variant("**int8**, 8-bit weights", "int8-8", "onnxruntime", base=False),
        "fp8": Variant("**fp8**, emulated", "fp8", "openvino", timed=False, base=False),
    }
    theirs = {
        name: Variant(tool.title, name, tool.runtime, tool.precision, base=name != "nncf")
        for name, tool in QUANTISERS.items()
    }
    return ours | theirs


VARIANTS = _variants()
FIRST = "fp32"
"""What the others are held against."""
NNCF = tuple(name for name in VARIANTS if name.startswith("nncf"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or write the tables; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantisation", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--part", choices=("accuracy", "speed", "optimize", "all"), default="all")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of the speeds")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--write", action="store_true", help="the committed tables into docs/quantisation.md")
    options = parser.parse_args(arguments)
    if options.write:
        record = json.loads(RESULTS.read_text(encoding="utf-8"))
        PART.publish(tables(record), doubts(record), write=True)
        return 0
    record = json.loads(options.output.read_text(encoding="utf-8")) if options.output.is_file() else {}
    parts = ("accuracy", "speed", "optimize") if options.part == "all" else (options.part,)
    record["environment"] = find_environment(ROOT, TITLES).model_dump(mode="json")
    files: dict[str, Files] = {}
    record.setdefault("skipped", {})
    if parts != ("optimize",):
        record["skipped"] = {}
        files[SMALL] = small_files(record["skipped"])
    if "accuracy" in parts:
        record["accuracy"] = list(accuracy(files[SMALL]))
        write_whole(options.output, dumped(record))
    if "speed" in parts:
        files[BASE], record["quantising"] = base_files(record["skipped"])
        record["threads"], record["rounds"] = THREADS, options.rounds
        record["created"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        record["speed"] = [
            cell for model in files for cell in speeds(model, files[model], options.rounds, record["skipped"])
        ]
        write_whole(options.output, dumped(record))
    if "optimize" in parts:
        record["optimised"] = list(optimised.contests())
        write_whole(options.output, dumped(record))
    PART.publish(tables(record), doubts(record), write=False)
    return 0


def dumped(record: Mapping[str, Any]) -> str:
    """As JSON, with a line for each cell."""
    parts = {name: record.get(name, []) for name in ("accuracy", "speed")}
    text = json.dumps({**record, **{name: f"@{name}" for name in parts}}, indent=2)
    for name, cells in parts.items():
        text = text.replace(f'"@{name}"', "[\n" + ",\n".join(map(json.dumps, cells)) + "\n]")
    return text + "\n"


# --- the files -------------------------------------------------------------------------------------------

Files = Mapping[str, Path]
"""What was made, by the names that variants have for it."""


def small_files(skipped: dict[str, str]) -> Files:
    """All files of the real model; why some are not there goes into ``skipped``. Ours are made anew."""
    checkpoint, bundle = build() / "dinov2s-crops", WORK / "small.bundle"
    settings: dict[str, Any] = {"format": "onnx", "output": "features", "force": True}
    vitdeploy.export(
        checkpoint, bundle, precision=("int8", "fp8"), calibration=REAL / "calibration", **settings
    )
    eight = vitdeploy.export(
        checkpoint,
        WORK / "small-8.bundle",
        precision="int8",
        calibration=bundle,
        weight_bits=8,
        **settings,
    )
    files = _written(bundle, ("fp32", "int8", "fp8"), skipped)
    for file in _written(eight.root, ("int8",), skipped).values():
        files["int8-8"] = file
    return files | _others("small", bundle, list(QUANTISERS), skipped)


def base_files(skipped: dict[str, str]) -> tuple[Files, dict[str, float]]:
    """Files of ViT-B/16, and what its int8 export took: ``seconds``, and ``peak_gb`` of memory."""
    bundle, begin = WORK / "base.bundle", time.perf_counter()
    command = [sys.executable, "-m", "vitdeploy", "export", "-m", BASE.removeprefix("ViT-"), "--int8"]
    command += ["--format", "onnx", "--calibration", str(REAL / "calibration"), "-o", str(bundle), "--force"]
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"the export of {BASE} ended with {os.waitstatus_to_exitcode(status)}")
    cost = {"seconds": round(time.perf_counter() - begin, 1), "peak_gb": round(usage.ru_maxrss / 2**20, 2)}
    ours = _written(bundle, ("fp32", "int8"), skipped)
    wanted = [name for name in QUANTISERS if VARIANTS[name].base]
    return ours | _others("base", bundle, wanted, skipped), cost


def _written(bundle: Path, names: Sequence[str], skipped: dict[str, str]) -> dict[str, Path]:
    """The ONNX files of ours in a bundle; an export leaves out what costs too much of the answers."""
    artifacts = {artifact.precision: artifact.path for artifact in Bundle.open(bundle).manifest.artifacts}
    for name in names:
        if name not in artifacts:
            skipped[name] = f"the export of {bundle.name} left it out"
    return {name: bundle / artifacts[name] for name in names if name in artifacts}


def _others(kind: str, bundle: Path, names: Sequence[str], skipped: dict[str, str]) -> dict[str, Path]:
    """What other tools make of the bundle's fp32 graph and its calibration images; made once for these."""
    opened, source = Bundle.open(bundle), bundle / "model.onnx"
    spec = opened.manifest.preprocess
    images = WORK / f"{kind}-calibration.npy"
    np.save(images, normalised(opened.tensors("calibration.safetensors")["images"], spec.mean, spec.std))
    made_of = hashlib.sha256(source.read_bytes() + images.read_bytes()).hexdigest()[:8]
    found = {}
    for name in names:
        try:
            found[name] = quantised(name, source, images, WORK / f"{kind}-{name}-{made_of}")
        except QuantiserFailure as failure:
            skipped[name] = str(failure)
            print(f"skipped {failure}", file=sys.stderr, flush=True)
    return found


def open_variants(files: Files, wanted: Mapping[str, Variant]) -> Iterator[tuple[str, Caller]]:
    """Those whose file is there, ready to run."""
    for name, variant in wanted.items():
        if variant.made in files:
            job: Job = {"threads": THREADS, "concurrency": 1, "precision": variant.precision}
            (caller,) = RUNTIMES[variant.runtime](job, files[variant.made])
            yield name, caller


# --- what is measured ------------------------------------------------------------------------------------


def accuracy(files: Files) -> Iterator[dict[str, Any]]:
    """One cell for each task and variant, against the fp32 graph, whose error against float64 is 1e-6."""
    exact: dict[str, Floats] = {}
    for name, caller in open_variants(files, VARIANTS):
        for task in TASKS:
            images, given = read_images(REAL / "images" / f"{task}-test")
            pixels = pixel_values(images)
            parts = (np.asarray(caller(pixels[i : i + 8])[0]) for i in range(0, len(pixels), 8))
            features = np.concatenate(list(parts))
            yield {"variant": name, "task": task} | judged(
                features, exact.setdefault(task, features), *_head(task), list(map(labels(task).index, given))
            )


def _head(task: str) -> tuple[Floats, Floats]:
    """Weight (classes, features) and bias of a task's probe."""
    from safetensors.numpy import load_file

    state = load_file(REAL / f"dinov2s-{task}" / "model.safetensors")
    return state["classifier.weight"], state["classifier.bias"]


def judged(
    features: Floats, exact: Floats, weight: Floats, bias: Floats, given: Sequence[int]
) -> dict[str, float]:
    """How far features (N, D) are from the exact ones, and what becomes of the answers.

    Returns:
        ``error`` and ``worst`` of an image's features relative to their norm, ``cls`` and ``cls_worst`` of
        the CLS token alone, ``top1`` and ``agreement`` in percent.
    """
    found = {}
    for mean, worst, part in (("error", "worst", slice(None)), ("cls", "cls_worst", slice(CLS))):
        errors = np.linalg.norm((features - exact)[:, part], axis=1) / np.linalg.norm(exact[:, part], axis=1)
        found |= {mean: round(float(errors.mean()), 5), worst: round(float(errors.max()), 5)}
    answers, expected = ((values @ weight.T + bias).argmax(axis=1) for values in (features, exact))
    top1, agreement = (100 * float(np.mean(answers == other)) for other in (np.array(given), expected))
    return found | {"top1": round(top1, 2), "agreement": round(agreement, 2)}


def speeds(model: str, files: Files, rounds: int, skipped: dict[str, str]) -> Iterator[dict[str, Any]]:
    """One cell for each batch size and variant: milliseconds, and the processor's, of every round.

    Why a tool's file does not run goes into ``skipped``.
    """
    wanted = {name: v for name, v in VARIANTS.items() if v.timed and (v.base or model == SMALL)}
    images = pixel_values(read_images(REAL / "images" / "crops-test")[0][:: 200 // max(BATCHES)])
    callers: dict[str, Caller] = {}
    for name, caller in open_variants(files, wanted):
        try:
            caller(images)
        except Exception as error:  # whatever the runtime raises
            if name not in QUANTISERS:
                raise
            skipped[name] = f"{model}: {one_line(error).partition(' Status Message')[0]}"
        else:
            callers[name] = caller
    for batch in BATCHES:
        pixels = np.ascontiguousarray(images[:batch])
        for name, times in taking_turns(callers, pixels, rounds).items():
            yield {"model": model, "variant": name, "batch": batch, **times}


def taking_turns(callers: Mapping[str, Caller], pixels: Floats, rounds: int) -> dict[str, dict[str, Any]]:
    """Times of all callers, one run after an untimed one in every round, in another order each time."""
    random, runs = np.random.default_rng(0), 3 if len(pixels) == 1 else 1
    found: dict[str, dict[str, Any]] = {name: {"ms": [], "processor_ms": []} for name in callers}
    for _ in range(rounds):
        for name in random.permutation(list(callers)):
            callers[name](pixels)
            begin, used = time.perf_counter(), time.process_time()
            for _ in range(runs):
                callers[name](pixels)
            for kind, passed in (
                ("ms", time.perf_counter() - begin),
                ("processor_ms", time.process_time() - used),
            ):
                found[name][kind].append(round(1e3 * passed / runs, 3))
    return found


# --- what is said of it ----------------------------------------------------------------------------------


def ratio(
    record: Mapping[str, Any], model: str, batch: int, name: str, other: str
) -> dict[str, float] | None:
    """How many times as fast a variant is as another one, with quartiles; None where one was not measured."""
    cells = {
        cell["variant"]: cell
        for cell in record.get("speed", ())
        if (cell["model"], cell["batch"]) == (model, batch)
    }
    if not {name, other} <= cells.keys():
        return None
    return quartiles([b / a for a, b in zip(cells[name]["ms"], cells[other]["ms"], strict=True)])


def _cells(record: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(cell["variant"], cell["task"]): cell for cell in record.get("accuracy", ())}


def tables(record: Mapping[str, Any]) -> str:
    """The record as it stands in the document."""
    lines = [
        "On 200 images of each task that nobody was calibrated with: error of the features (mean and worst"
    ]
    lines += ["image), top-1, and how many answers are those of the fp32 model, in percent.", ""]
    lines += ["| DINOv2-S/14 | on | crops: error, worst, top-1, agreement | digits |", "|---|---|---|---|"]
    found = _cells(record)
    for name, variant in VARIANTS.items():
        if (name, TASKS[0]) in found:
            both = " | ".join(_accuracy(found[name, task]) for task in TASKS)
            lines.append(f"| {variant.title} | {TITLES[variant.runtime]} | {both} |")
    if record.get("speed"):
        lines += ["", *_speed_table(record)]
    if record.get("optimised"):
        lines += ["", *optimised.table(record["optimised"])]
    skipped = "; ".join(f"{VARIANTS[name].title} ({why})" for name, why in record["skipped"].items())
    return "\n".join(lines + (["", f"Not measured: {skipped}."] if skipped else []))


def _accuracy(cell: Mapping[str, Any]) -> str:
    return f"{cell['error']:.3f}, {cell['worst']:.2f}, {cell['top1']:.1f}, {cell['agreement']:.1f}"


def _speed_table(record: Mapping[str, Any]) -> Iterator[str]:
    columns = [(model, batch) for model in (SMALL, BASE) for batch in BATCHES]
    yield f"On {record['environment']['cpu']['name']}, {record['threads']} threads, {record['rounds']}"
    yield "interleaved rounds: how many times as fast as fp32 on ONNX Runtime (quartiles over the rounds)."
    yield ""
    yield "| | on | " + " | ".join(f"{model}, batch {batch}" for model, batch in columns) + " |"
    yield "|---" * (2 + len(columns)) + "|"
    for name, variant in VARIANTS.items():
        found = [ratio(record, model, batch, name, FIRST) for model, batch in columns]
        if any(found) and name != FIRST:
            cells = (
                "" if one is None else f"{one['median']:.2f} × ({one['q1']:.2f} to {one['q3']:.2f})"
                for one in found
            )
            yield f"| {variant.title} | {TITLES[variant.runtime]} | {' | '.join(cells)} |"
    cost = record["quantising"]
    yield ""
    yield f"The export of {BASE} to fp32 and int8, with its proofs, took {cost['seconds']:.0f} s and"
    yield f"{cost['peak_gb']:.1f} GB of memory."


LEAST: Sequence[tuple[str, str, int, str, float]] = (
    (SMALL, "int8", 1, FIRST, 2.4),
    (SMALL, "int8", 8, FIRST, 3.2),
    (SMALL, "int8", 8, "bf16", 1.4),
    (BASE, "int8", 1, FIRST, 2.6),
    (BASE, "int8", 8, FIRST, 3.5),
    (SMALL, "int8-ort", 1, FIRST, 1.8),
    (SMALL, "int8-ort", 8, FIRST, 1.7),
    *((SMALL, "int8", batch, name, 1.0) for batch in BATCHES for name in NNCF),
)
"""How many times as fast a variant of a model is at least as another one at a batch size."""
MOST = {"int8": 0.04, "int8-ort": 0.04, "fp8": 0.06}
"""The largest mean errors."""
POINTS = 1.0
"""Of top-1 that int8 may lose."""
QUANTISING = {"seconds": 240, "peak_gb": 8}
"""What the export of the larger model may take."""


def broken_claims(record: Mapping[str, Any]) -> list[str]:
    """What of our claims a record does not bear out; one line each."""
    found = []
    for model, name, batch, other, least in LEAST:
        one = ratio(record, model, batch, name, other)
        if one is not None and one["median"] < least:
            times = f"{one['median']:.2f} × instead of {least} ×"
            found.append(f"{model}, batch {batch}: {name} over {other}: {times}")
    cells, fastest = _cells(record), _fastest(record)
    for task in TASKS:
        of_task = {name: cell for (name, other), cell in cells.items() if other == task}
        found += _broken_accuracy(task, of_task, fastest)
    for kind, most in QUANTISING.items():
        cost = record.get("quantising", {}).get(kind, 0)
        if cost > most:
            found.append(f"{BASE}, the export: {kind} {cost} instead of {most}")
    return found + list(optimised.broken(record.get("optimised", ())))


def doubts(record: Mapping[str, Any]) -> list[str]:
    """Both what a record does not bear out and what it says nothing about."""
    return broken_claims(record) + [f"{line}: not measured" for line in unmeasured(record)]


def _fastest(record: Mapping[str, Any]) -> str | None:
    """The fastest file of NNCF, where their speeds are known."""
    found = {name: ratio(record, SMALL, max(BATCHES), name, FIRST) for name in NNCF}
    return (
        max((one["median"], name) for name, one in found.items() if one)[1] if any(found.values()) else None
    )


def _broken_accuracy(task: str, cells: Mapping[str, Mapping[str, Any]], fastest: str | None) -> Iterator[str]:
    for name in (name for name in MOST if name in cells):
        if (error := cells[name]["error"]) > MOST[name]:
            yield f"{task}, {name}: error {error} instead of {MOST[name]}"
        lost = cells[FIRST]["top1"] - cells[name]["top1"]
        if lost > POINTS and name != "fp8":
            yield f"{task}, {name}: {lost:.1f} points of top-1 lost instead of {POINTS}"
    for name in NNCF if "int8" in cells else ():
        share = 0.5 if name == fastest else 1
        if name in cells and (error := cells["int8"]["error"]) > share * (other := cells[name]["error"]):
            yield f"{task}, int8: error {error} instead of {share} × {name}'s {other}"


def unmeasured(record: Mapping[str, Any]) -> list[str]:
    """What of our claims a record says nothing about; one line each."""
    found = [
        f"{model}, batch {batch}: {name} over {other}"
        for model, name, batch, other, _ in LEAST
        if ratio(record, model, batch, name, other) is None
    ]
    wanted = ((name, task) for name in (FIRST, *MOST, *NNCF) for task in TASKS)
    found += [f"{task}: {name}" for name, task in wanted if (name, task) not in _cells(record)]
    found += [] if "quantising" in record else [f"{BASE}, the export"]
    return found + optimised.unmeasured(record.get("optimised", ()))


if __name__ == "__main__":
    sys.exit(main())
