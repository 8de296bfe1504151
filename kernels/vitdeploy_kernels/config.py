"""Launch configurations: JSON tables per GPU under ``configs/``, looked up by the nearest shape.

``kernels/tune.py`` writes the tables. Nothing here is global: a table is an argument.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal, get_args

import torch

Route = Literal["fused", "cublas", "pair"]
"""How a part is computed: by the fused kernel, by cuBLASLt with LayerNorm and residual addition apart, or,
for ``layernorm_attention``, by the pair of ``layernorm_linear`` and ``attention``."""

MANY_ROWS = 2**14
"""About what 64 images of 197 or 257 tokens have together."""


@dataclass(frozen=True)
class Config:
    """Tile sizes and launch parameters; a kernel that has no use for a field ignores it.

    Attributes:
        block_m: rows of a tile (queries, in attention).
        block_n: columns of a tile (keys, in attention).
        block_k: depth of one step of a matrix product.
        group: rows of tiles that are walked together, so that their weights stay in the L2 cache.
        warps: per program.
        stages: of the software pipeline.
    """

    block_m: int = 128
    block_n: int = 128
    block_k: int = 64
    group: int = 8
    warps: int = 8
    stages: int = 3

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            power = field.name in ("block_m", "block_n", "block_k", "warps")
            if type(value) is not int or value < 1 or (power and value & (value - 1)):
                kind = "a power of two" if power else "a positive integer"
                raise ValueError(f"{field.name} must be {kind}, not {value!r}")

    def as_list(self) -> list[int]:
        """For a custom operator, whose arguments cannot be a dataclass."""
        return list(astuple(self))


@dataclass(frozen=True)
class Entry:
    """One tuned shape.

    Attributes:
        shape: the kernel's own numbers (rows, columns, depth for a GEMM).
        config: the best configuration found for it.
        route: the way that was fastest.
        microseconds: what was measured; None for a default that was not.
    """

    shape: tuple[int, ...]
    config: Config
    route: Route = "fused"
    microseconds: float | None = None


@dataclass(frozen=True)
class Table:
    """Configurations of all kernels for one GPU."""

    gpu: str
    measured: bool
    kernels: Mapping[str, tuple[Entry, ...]]
    versions: Mapping[str, str]

    def entry(self, kernel: str, shape: Sequence[int]) -> Entry:
        """The entry of the nearest shape: least sum of squared differences of the sizes' logarithms.

        Raises:
            KeyError: the table has no entry for this kernel.
            ValueError: a different number of sizes than the table's.
        """
        if not self.kernels.get(kernel):
            raise KeyError(f"the table of {self.gpu} has no configuration for {kernel}")

        def distance(entry: Entry) -> float:
            pairs = zip(entry.shape, shape, strict=True)
            return sum(math.log2(have / max(want, 1)) ** 2 for have, want in pairs)

        return min(self.kernels[kernel], key=distance)

    def config(self, kernel: str, shape: Sequence[int]) -> Config:
        """The configuration for the nearest shape; see :meth:`entry`."""
        return self.entry(kernel, shape).config


def parse_table(text: str, source: str) -> Table:
    """Read a table.

    Raises:
        ValueError: it is not one; names the source and what is wrong.
    """
    try:
        document = json.loads(text)
        kernels = {name: tuple(map(_entry, rows)) for name, rows in document["kernels"].items()}
        return Table(str(document["gpu"]), bool(document["measured"]), kernels, dict(document["versions"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{source} is not a table of kernel configurations: {error}") from error


def _entry(row: Mapping[str, Any]) -> Entry:
    shape = tuple(row["shape"])
    if not shape or any(type(size) is not int or size < 1 for size in shape):
        raise ValueError(f"shape must be positive integers, not {row['shape']!r}")
    route = row.get("route", "fused")
    if route not in get_args(Route):
        raise ValueError(f"route must be one of {', '.join(get_args(Route))}, not {route!r}")
    return Entry(shape, Config(**row["config"]), route, row.get("microseconds"))


def format_table(table: Table) -> str:
    """The table as JSON, one entry a line."""
    lines = []
    for name, entries in sorted(table.kernels.items()):
        rows = [json.dumps(_row(entry)) for entry in sorted(entries, key=lambda entry: entry.shape)]
        lines.append(f"    {json.dumps(name)}: [\n      " + ",\n      ".join(rows) + "\n    ]")
    head = {"gpu": table.gpu, "measured": table.measured, "versions": dict(table.versions)}
    start = json.dumps(head, indent=2)[:-2]
    return f'{start},\n  "kernels": {{\n' + ",\n".join(lines) + "\n  }\n}\n"


def _row(entry: Entry) -> dict[str, Any]:
    config = {field.name: getattr(entry.config, field.name) for field in fields(Config)}
    row: dict[str, Any] = {"shape": list(entry.shape), "config": config}
    if entry.route != "fused":
        row["route"] = entry.route
    if entry.microseconds is not None:
        row["microseconds"] = entry.microseconds
    return row


def load_table(path: str | Path) -> Table:
    """Read a table from a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a table.
    """
    return parse_table(Path(path).read_text(encoding="utf-8"), str(path))


def shipped_table(capability: tuple[int, int], gpu: str | None = None) -> Table:
    """The table of this GPU by name, else of the nearest older compute capability.

    Args:
        capability: major and minor, (9, 0).
        gpu: the name that the driver gives it, ``NVIDIA H200``.

    Raises:
        ValueError: older than every table.
    """
    shipped = [path.name for path in _folder().iterdir()]
    if gpu is not None and table_name(gpu) in shipped:
        return _read(table_name(gpu))
    wanted = 10 * capability[0] + capability[1]
    numbers = [int(name[3:-5]) for name in shipped if name.startswith("sm_")]
    older = [number for number in numbers if number <= wanted]
    if not older:
        raise ValueError(f"no kernel configurations for compute capability {capability[0]}.{capability[1]}")
    return _read(f"sm_{max(older)}.json")


def _folder() -> Traversable:
    return resources.files("vitdeploy_kernels") / "configs"


@functools.cache
def _read(name: str) -> Table:
    return parse_table((_folder() / name).read_text(encoding="utf-8"), name)


def table_name(gpu: str) -> str:
    """The file name of a GPU's table."""
    return "".join(c if c.isalnum() else "_" for c in gpu) + ".json"


def table_for(device: torch.device) -> Table:
    """The shipped table for a device; the interpreter's, of large tiles, where there is no GPU."""
    if device.type != "cuda":
        return _read("interpreter.json")
    return shipped_table(torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device))


def choose(
    kernel: str,
    shape: Sequence[int],
    device: torch.device,
    given: Sequence[int] | None = None,
    *,
    tile: int | None = None,
) -> Config:
    """The configuration of an operator: the one given (:meth:`Config.as_list`), else the shipped table's.

    Args:
        kernel: by its name in the tables.
        shape: the kernel's own numbers.
        device: of its tensors.
        given: by the caller; nothing is looked up then.
        tile: the block_n that it must have, of :func:`statistics_tile`.
    """
    return _looked_up(kernel, tuple(shape), device, tile) if given is None else Config(*given)


@functools.lru_cache(maxsize=4096)
def _looked_up(kernel: str, shape: tuple[int, ...], device: torch.device, tile: int | None) -> Config:
    table = table_for(device)
    if tile is not None:
        fitting = tuple(entry for entry in table.kernels[kernel] if entry.config.block_n == tile)
        table = replace(table, kernels={kernel: fitting})
    return table.config(kernel, shape)


@functools.lru_cache(maxsize=4096)
def statistics_tile(
    kernel: str, columns: int, depth: int, device: torch.device, given: tuple[int, ...] | None = None
) -> int:
    """Columns of a tile of the row statistics that an operator leaves: the block_n of its configuration.

    One for all numbers of rows, because it decides the shape of the statistics, and the shape of an output
    must not depend on a batch size that is not known when a model is traced. It is what suits many rows.

    Args:
        kernel: by its name in the tables.
        columns: of its output.
        depth: of its product.
        device: of its tensors.
        given: the caller's configuration (:meth:`Config.as_list`).
    """
    if given is not None:
        return Config(*given).block_n
    return table_for(device).config(kernel, (MANY_ROWS, columns, depth)).block_n
