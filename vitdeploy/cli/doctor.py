"""``vitdeploy doctor``: this machine, and what of vitdeploy runs on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from vitdeploy.cli import output
from vitdeploy.errors import MissingDependency

if TYPE_CHECKING:
    from vitdeploy.cli.diagnosis import Diagnosis

SUMMARY = "Show this machine and what runs on it."
EXAMPLES = ("vitdeploy doctor", "vitdeploy doctor --json > machine.json")


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> int:
    """Show this machine, the libraries, and which backends run here; why not, and what would help.

    The exit code is 3 if no backend runs, or if no folder for temporary files can be written to.
    """
    from vitdeploy.cli.diagnosis import diagnose

    with output.stdout_is_ours():
        machine = diagnose()
    ok = any(backend.available for backend in machine.backends) and machine.temporary_folder is not None
    if as_json:
        output.json_document({"ok": ok, **machine.as_dict()})
    else:
        _print(machine)
    return 0 if ok else MissingDependency.exit_code


def _print(machine: Diagnosis) -> None:
    from vitdeploy.backends.base import library_extras

    disk = "no folder for temporary files can be written to: set TMPDIR to one that can"
    if machine.free_disk is not None:
        disk = f"{output.size(machine.free_disk)} free in {machine.temporary_folder}"
    memory = "unknown" if machine.cpu.memory is None else output.size(machine.cpu.memory)
    rows = [
        ("vitdeploy", machine.vitdeploy),
        ("python", machine.python),
        ("platform", machine.platform),
        ("cpu", f"{machine.cpu.name}, {machine.cpu.threads} threads"),
        ("cpu flags", " ".join(machine.cpu.flags) or "none that matter"),
        *([] if machine.int8 is None else [("int8", machine.int8)]),
        ("memory", memory),
        *(("gpu", ", ".join(gpu.values())) for gpu in machine.gpus),
        *([] if machine.gpus else [("gpu", machine.gpu_reason)]),
        ("disk", disk),
        ("providers", ", ".join(machine.providers) or "none: ONNX Runtime is not installed"),
    ]
    output.facts(rows)
    output.heading("backends")
    for backend in machine.backends:
        output.line(f"  {'yes' if backend.available else 'no ':<4} {backend.name:<14} {backend.summary}")
        if not backend.available:
            output.line(f"{'':<22}{backend.reason}" + (f"; {backend.hint}" if backend.hint else ""))
    output.heading("libraries")
    extras = library_extras()
    for name, version in machine.libraries.items():
        extra = extras[name]
        missing = f'not installed; pip install "vitdeploy[{extra}]"' if extra else "not installed"
        output.line(f"  {name:<18} {version or missing}")
