"""Every kind of engine on this machine's GPU: built, proven, verified, measured; one record of all.

A step is a ``vitdeploy`` command in a process of its own. Its document, or its error, goes into the record as
soon as it ends; a step that fails or hangs costs the others nothing. Without a GPU it exits with status 3;
with --smoke it does what needs none.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import record

from vitdeploy.backends.base import get_backend
from vitdeploy.machine.gpus import Gpu, find_gpus
from vitdeploy.tensorrt.flavours import FLAVOURS, Flavour

ROOT = Path(__file__).parents[2]
PROBE = Path(__file__).with_name("rtx_probe.py")
SMOKE_GPU = Gpu("smoke", (8, 9))
VARIANTS: dict[str, tuple[str, ...]] = {
    "as it comes": (),
    "two profiles": ("--profile", "1,1,1", "--profile", "2,8,32"),
    "level 5": ("--opt-level", "5"),
    "refit": ("--weights", "refit"),
    "stripped": ("--weights", "stripped"),
    "hardware compatible": ("--hardware-compat", "ampere_plus"),
    "version compatible": ("--version-compatible",),
}
"""What is asked of an engine; those that a flavour does not have are recorded with its reason."""


@dataclass(frozen=True)
class Step:
    """A command, the seconds it may take, and whether its standard output is a document."""

    name: str
    command: tuple[str, ...]
    seconds: float = 300.0


Chain = tuple[Step, ...]
"""Steps of which the later ones mean nothing when the first fails."""


def vitdeploy(name: str, *arguments: object, seconds: float = 300.0) -> Step:
    words = [*map(str, arguments), "--json"]
    return Step(name, (sys.executable, "-m", "vitdeploy", *words), seconds)


def steps(bundles: dict[str, Path | None], gpu: Gpu, work: Path) -> Iterator[Chain]:
    """All steps; the small model goes through every variant, the others through the first few."""
    yield (vitdeploy("doctor", "doctor"),)
    for flavour in FLAVOURS.values():
        if flavour.is_installed and flavour.portable:
            yield (Step(f"does {flavour.title} run here", (sys.executable, str(PROBE)), 120),)
    for model, given in bundles.items():
        bundle = work / f"{model.replace('/', '')}.bundle"
        if given is None:
            flags = ("--fp32", "--fp16", "--bf16", "--format", "onnx", "-o", bundle)
            yield (vitdeploy(f"{model}: ONNX", "export", "-m", model, *flags, seconds=420),)
        else:
            yield (Step(f"{model}: copy", ("cp", "-r", str(given), str(bundle))),)
        thorough = len(bundles) == 1 or model == "digits"
        for name in list(VARIANTS)[: None if thorough else 3]:
            yield from variant(model, bundle, name, gpu)
        yield from through_onnx_runtime(model, bundle)


def variant(model: str, bundle: Path, name: str, gpu: Gpu) -> Iterator[Chain]:
    """One kind of engine of one model, of every flavour: built and proven, then measured beside its peers."""
    for flavour in FLAVOURS.values():
        label = f"{model}, {flavour.name}, {name}"
        if not flavour.is_installed:
            continue
        arch = ("--arch", gpu.arch) if flavour.portable else ()
        flags = ("--format", flavour.name, *arch, *VARIANTS[name], "--force")
        yield (
            vitdeploy(f"{label}: build", "engine", bundle, *flags, seconds=600),
            vitdeploy(f"{label}: verify", "verify", bundle, "--backend", flavour.name),
            vitdeploy(f"{label}: bench", "bench", bundle, *peers(flavour), "--budget", "40s"),
        )


def peers(flavour: Flavour) -> tuple[str, ...]:
    """Backends to measure an engine beside: those that run here."""
    others = [name for name in ("torch", "torch-compile", "triton") if get_backend(name).availability().ok]
    return ("--backend", ",".join((flavour.name, *others)), "--batch", "1,8,32")


def through_onnx_runtime(model: str, bundle: Path) -> Iterator[Chain]:
    for provider in ("cuda", "tensorrt", "tensorrt-rtx"):
        label = f"{model}, onnxruntime, {provider}"
        flags = ("--backend", "onnxruntime", "--provider", provider)
        yield (
            vitdeploy(f"{label}: verify", "verify", bundle, *flags),
            vitdeploy(f"{label}: bench", "bench", bundle, *flags, "--budget", "30s"),
        )


def smoke_steps(work: Path) -> Iterator[Chain]:
    """What needs no GPU: engines of the small model for one that is not here."""
    bundle = work / "digits.bundle"
    flags = ("--fp16", "--format", "onnx", "-o", bundle)
    yield (vitdeploy("doctor", "doctor"),)
    yield (Step("does TensorRT for RTX run here", (sys.executable, str(PROBE)), 120),)
    yield (vitdeploy("digits: ONNX", "export", "-m", "digits", *flags),)
    for name in ("as it comes", "two profiles", "hardware compatible"):
        label = f"digits, tensorrt-rtx, {name}"
        asked = ("--format", "tensorrt-rtx", "--arch", SMOKE_GPU.arch, *VARIANTS[name], "--force")
        yield (
            vitdeploy(f"{label}: build", "engine", bundle, *asked),
            vitdeploy(f"{label}: verify", "verify", bundle, "--backend", "tensorrt-rtx"),
        )


def run(step: Step) -> dict[str, Any]:
    """Run a step, and say how it ended."""
    begin = time.perf_counter()
    try:
        done = subprocess.run(step.command, capture_output=True, text=True, timeout=step.seconds, check=False)
        code, out, err = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired:
        code, out, err = 124, "", f"took longer than {step.seconds:.0f} s"
    facts: dict[str, Any] = {"name": step.name, "exit_code": code}
    facts["seconds"] = round(time.perf_counter() - begin, 2)
    facts["document"] = document_of(out)
    if code:
        facts["said"] = err.splitlines()[-4:]
    print(f"{step.name:<60} {facts['seconds']:7.1f} s  exit code {code}", file=sys.stderr, flush=True)
    return facts


def document_of(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--bundle", type=Path, help="take this bundle's ONNX instead of exporting models")
    parser.add_argument("--smoke", action="store_true", help="do what needs no GPU")
    options = parser.parse_args(arguments)
    gpus = [SMOKE_GPU] if options.smoke else find_gpus()
    if not gpus:
        print(
            "on_gpu_tensorrt: needs an NVIDIA GPU, and there is none (--smoke runs without)", file=sys.stderr
        )
        return 3
    gpu = gpus[0]
    options.output.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-")
    path = options.output / f"{name}-tensorrt.json"
    path.unlink(missing_ok=True)
    given = {options.bundle.stem: options.bundle} if options.bundle else {"digits": None, "B/16": None}
    done: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for chain in smoke_steps(work) if options.smoke else steps(given, gpu, work):
            for step in chain:
                done.append(run(step))
                record.update(path, schema_version=1, gpu=gpu.name, arch=gpu.arch, steps=done)
                if step is chain[0] and done[-1]["exit_code"]:
                    break
    print(path, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
