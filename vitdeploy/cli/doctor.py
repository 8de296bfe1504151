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
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> int:
    """Show this machine, the libraries, and which backends run here; why not, and what would help.

    The exit code is 3 if no backend runs.
    """
    from vitdeploy.cli.diagnosis import diagnose

    with output.stdout_is_ours():
        found = diagnose()
    ok = any(backend.available for backend in found.backends)
    if as_json:
        output.json_document({"ok": ok, **found.as_dict()})
    else:
        _print(found)
    return 0 if ok else MissingDependency.exit_code


def _print(found: Diagnosis) -> None:
    from vitdeploy.machine.identity import LIBRARIES

    memory = "unknown" if found.cpu.memory is None else output.size(found.cpu.memory)
    rows = [
        ("vitdeploy", found.vitdeploy),
        ("python", found.python),
        ("platform", found.platform),
        ("cpu", f"{found.cpu.name}, {found.cpu.threads} threads"),
        ("cpu flags", " ".join(found.cpu.flags) or "none that matter"),
        ("memory", memory),
        *(("gpu", ", ".join(gpu.values())) for gpu in found.gpus),
        *([] if found.gpus else [("gpu", found.gpu_reason)]),
        ("disk", f"{output.size(found.free_disk)} free in {found.temporary_folder}"),
        ("providers", ", ".join(found.providers) or "none: ONNX Runtime is not installed"),
    ]
    output.facts(rows)
    output.heading("backends")
    for backend in found.backends:
        output.line(f"  {'yes' if backend.available else 'no ':<4} {backend.name:<14} {backend.summary}")
        if not backend.available:
            output.line(f"{'':<22}{backend.reason}" + (f"; {backend.hint}" if backend.hint else ""))
    output.heading("libraries")
    for name, version in found.libraries.items():
        extra = LIBRARIES[name]
        missing = f'not installed; pip install "vitdeploy[{extra}]"' if extra else "not installed"
        output.line(f"  {name:<18} {version or missing}")
