"""Measured values as people read them, the same in every view."""

from __future__ import annotations

import math
import unicodedata

from vitdeploy.benchmark.results import Cell, Environment, Results

NONE = "–"
"""Shown where nothing was measured."""


def number(value: float | None) -> str:
    """Three significant digits, thousands separated, exponents only where they must be."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e7:
        return f"{value:.2e}"
    rounded = float(f"{value:.3g}")
    decimals = max(0, 2 - math.floor(math.log10(abs(rounded))))
    return f"{rounded if decimals else value:,.{decimals}f}"


def error(value: float | None) -> str:
    """An error as a power of ten."""
    return NONE if value is None else f"{value:.1e}"


def share(value: float | None, *, signed: bool = False) -> str:
    """A share between 0 and 1 in percent."""
    return NONE if value is None else f"{100 * value:{'+' if signed else ''}.2f} %".replace("-", "−")


def size(count: int | None) -> str:
    """Bytes in decimal units."""
    if count is None:
        return NONE
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{number(count / scale)} {unit}"
    return f"{count} B"


def times(factor: float | None) -> str:
    """A speed-up: ``1.62×``."""
    return NONE if factor is None else f"{factor:,.2f}×"


def plain(text: str) -> str:
    """One line without control characters: names come from strangers' files."""
    kept = (" " if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c for c in text)
    return " ".join("".join(kept).split())


def series(results: Results, cell: Cell) -> str:
    """A cell's name across batch sizes: its label, with threads and callers where they vary."""
    words = [cell.label]
    if len({c.threads for c in results.cells}) > 1:
        words.append(f"{cell.threads or 'default'} thread{'' if cell.threads == 1 else 's'}")
    if len({c.concurrency for c in results.cells}) > 1:
        words.append(f"{cell.concurrency} caller{'' if cell.concurrency == 1 else 's'}")
    return plain(", ".join(words))


def machine(environment: Environment) -> list[tuple[str, str]]:
    """Names and values of what was measured on, the most telling first."""
    cpu, git = environment.cpu, environment.git
    lines = [("CPU", f"{cpu.name}, {cpu.threads} thread{'' if cpu.threads == 1 else 's'}")]
    lines += [("GPU", ", ".join(gpu.values())) for gpu in environment.gpus]
    lines.append(("Memory", size(cpu.memory)))
    if cpu.governor:
        lines.append(("Governor", cpu.governor))
    if cpu.affinity:
        lines.append(("Affinity", ", ".join(map(str, cpu.affinity))))
    lines += [("Platform", environment.platform), ("Python", environment.python)]
    lines.append(("vitdeploy", environment.vitdeploy))
    if git:
        lines.append(("Revision", f"{git.revision[:12]}{' with local changes' if git.dirty else ''}"))
    lines.append(("CPU flags", " ".join(cpu.flags)))
    return [(name, plain(value)) for name, value in lines if value not in ("", NONE)]


def libraries(environment: Environment) -> list[tuple[str, str]]:
    """The installed libraries and their versions."""
    return [(plain(name), plain(version)) for name, version in environment.libraries.items() if version]


def machine_line(environment: Environment) -> str:
    """What was measured on, in one line."""
    cpu, git = environment.cpu, environment.git
    words = [f"{cpu.name}, {cpu.threads} thread{'' if cpu.threads == 1 else 's'}"]
    words += [", ".join(gpu.values()) for gpu in environment.gpus]
    words += [environment.platform, f"Python {environment.python}", f"vitdeploy {environment.vitdeploy}"]
    words += [f"{name} {version}" for name, version in libraries(environment)]
    if git:
        words.append(f"git {git.revision[:12]}{' with local changes' if git.dirty else ''}")
    return plain("; ".join(words))
