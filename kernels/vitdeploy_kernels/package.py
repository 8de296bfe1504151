"""A folder of cubins that were compiled ahead of time, so that a server's first request compiles nothing.

For each architecture there is a folder of its name with ``<key>.cubin`` for every distinct kernel
(:func:`vitdeploy_kernels.aot.launch_key`) and ``kernels.json``::

    {"schema": 1, "arch": "sm_90", "triton": "3.9.0",
     "kernels": {"<key>": {"name": "attention_kernel",          the function in the cubin
                           "parameters": ["*fp16", "i32", ...],  types in order, hidden ones too
                           "shared": 98304,                      bytes of dynamic shared memory
                           "warps": 8,                           per program
                           "size": 54968, "sha256": "<hex>"}}}   of the cubin

Architectures from sm_90 on run on exactly their compute capability, because Triton compiles for the
features of that one; sm_80 and sm_89 also run on later capabilities of major version 8.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vitdeploy_kernels.aot import ARCHITECTURES, POINTERS, SCRATCH, Compiled, capability_of, launch_key
from vitdeploy_kernels.compile_pool import Progress, compile_all
from vitdeploy_kernels.driver import Binary, CubinKernel, CudaDriver, aligned
from vitdeploy_kernels.launch import Launch
from vitdeploy_kernels.occupancy import LIMITS
from vitdeploy_kernels.support import Unsupported

SCHEMA = 1
INDEX = "kernels.json"
LARGEST_INDEX = 4 * 1024**2
LARGEST_CUBIN = 16 * 1024**2
MOST_KERNELS = 4096
MOST_PARAMETERS = 64
MOST_WARPS = 32

_KEY = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z_]\w{0,127}", re.ASCII)
_TYPES = {*POINTERS.values(), "i32", "i64", "fp32", SCRATCH}


class PackageError(ValueError):
    """A folder of cubins is damaged, or is none; the message names the file and what is wrong."""


def write_package(
    folder: str | Path,
    launches: Mapping[str, Sequence[Launch]],
    *,
    processes: int = 2,
    progress: Progress | None = None,
) -> list[Path]:
    """Compile launches and write a package.

    Args:
        folder: is created; may hold other architectures.
        launches: for each architecture; every distinct kernel is compiled once.
        processes: that compile at a time.
        progress: called after each kernel.

    Returns:
        The files that were written.

    Raises:
        AotError: a launch that cannot be compiled; nothing is written then.
        FileExistsError: an architecture is there already.
    """
    root = Path(folder)
    for arch in launches:
        capability_of(arch)
        if (root / arch).exists():
            raise FileExistsError(f"{root / arch} is there already")
    jobs = [(arch, launch) for arch, needed in launches.items() for launch in needed]
    compiled = compile_all(jobs, processes=processes, progress=progress)
    return [path for arch in launches for path in _write(root / arch, arch, compiled)]


def _write(folder: Path, arch: str, compiled: Mapping[tuple[str, str], Compiled]) -> list[Path]:
    folder.mkdir(parents=True)
    rows, written, versions = {}, [], set()
    for (of, key), kernel in sorted(compiled.items()):
        if of != arch:
            continue
        path = folder / f"{key}.cubin"
        path.write_bytes(kernel.cubin)
        written.append(path)
        versions.add(kernel.triton)
        rows[key] = {
            "name": kernel.name,
            "parameters": list(kernel.parameters),
            "shared": kernel.shared,
            "warps": kernel.warps,
            "size": len(kernel.cubin),
            "sha256": hashlib.sha256(kernel.cubin).hexdigest(),
        }
    index = {"schema": SCHEMA, "arch": arch, "triton": ", ".join(sorted(versions)), "kernels": rows}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return [*written, folder / INDEX]


class Package:
    """The cubins of one architecture, ready to be launched.

    Attributes:
        arch: that they were compiled for.
        triton: the version that compiled them.
        binaries: by key.
    """

    def __init__(self, arch: str, triton: str, binaries: Mapping[str, Binary], driver: CudaDriver) -> None:
        self.arch, self.triton, self.binaries = arch, triton, binaries
        self._driver = driver
        self._kernels: dict[tuple[str, int], CubinKernel] = {}
        self._lock = threading.Lock()

    def run(self, launch: Launch) -> bool:
        """Queue a launch with its cubin on the current stream; nothing is compiled.

        The first launch of a kernel loads it, which a CUDA graph cannot capture: launch once before.

        Returns:
            False if there is no cubin for it, a tensor is not aligned to 16 bytes, or they are not on a
            GPU: nothing was queued, and :meth:`Launch.run` compiles what is missing.

        Raises:
            DriverError: the driver refused the cubin or the launch.
        """
        key = launch_key(launch)
        device = next(value.device for value in launch.arguments.values() if isinstance(value, Tensor))
        ordinal = self._driver.ordinal(device)
        if key not in self.binaries or ordinal is None or not aligned(launch):
            return False
        with self._lock:
            if (key, ordinal) not in self._kernels:
                self._kernels[key, ordinal] = CubinKernel(self._driver, self.binaries[key], ordinal)
        self._kernels[key, ordinal].launch(launch)
        return True


def load_package(
    folder: str | Path, capability: tuple[int, int], *, driver: CudaDriver | None = None
) -> Package | Unsupported:
    """Open the cubins for a GPU. Sizes, hashes and names are checked before anything is used.

    Args:
        folder: what :func:`write_package` wrote; it need not be trusted to be undamaged, but a cubin is
            code, and who wrote the folder decides what the GPU runs.
        capability: of the GPU, (9, 0).
        driver: of CUDA; the system's when omitted.

    Returns:
        The package, or why there is none for this GPU.

    Raises:
        PackageError: the folder is damaged.
        DriverError: there is no CUDA driver.
    """
    root = Path(folder)
    fitting = [arch for arch in architectures_for(capability) if (root / arch).is_dir()]
    if not fitting:
        there = [arch for arch in ARCHITECTURES if (root / arch).is_dir()]
        has = ", ".join(there) or "none at all"
        return Unsupported(
            f"no cubins for compute capability {capability[0]}.{capability[1]} (there are {has})"
        )
    (arch, *_) = fitting
    index = _object(
        _parse(_read(root / arch / INDEX, LARGEST_INDEX), root / arch / INDEX), root / arch / INDEX
    )
    return _open(root / arch, arch, index, capability, driver or CudaDriver())


def architectures_for(capability: tuple[int, int]) -> list[str]:
    """Architectures whose cubins a GPU of this capability runs, the best first."""
    major, minor = capability
    exact = [arch for arch, has in ARCHITECTURES.items() if has == capability]
    older = [arch for arch, has in ARCHITECTURES.items() if has[0] == major == 8 and has[1] < minor]
    return exact + sorted(older, key=lambda arch: ARCHITECTURES[arch], reverse=True)


def _open(
    folder: Path, arch: str, index: Mapping[str, Any], capability: tuple[int, int], driver: CudaDriver
) -> Package:
    source = folder / INDEX
    if index.get("schema") != SCHEMA:
        raise PackageError(
            f"{source}: schema {index.get('schema')!r} is not known; this version reads {SCHEMA}"
        )
    if index.get("arch") != arch:
        raise PackageError(f"{source}: is for {index.get('arch')!r}, in the folder of {arch}")
    rows = _object(index.get("kernels"), source)
    if len(rows) > MOST_KERNELS:
        raise PackageError(f"{source}: {len(rows)} kernels, and {MOST_KERNELS} are the most")
    limits = LIMITS.get(capability, LIMITS[ARCHITECTURES[arch]])
    binaries = {}
    for key, row in rows.items():
        if not _KEY.fullmatch(key):
            raise PackageError(f"{source}: {key[:80]!r} is not a key of a kernel")
        binary = _binary(folder / f"{key}.cubin", _object(row, source), source)
        if binary.shared <= limits.shared_per_program:  # an 8.6 has less than the 8.0 it was compiled for
            binaries[key] = binary
    return Package(arch, str(index.get("triton"))[:80], binaries, driver)


def _binary(path: Path, row: Mapping[str, Any], source: Path) -> Binary:
    name, parameters = row.get("name"), row.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise PackageError(f"{source}: {str(name)[:80]!r} is not the name of a function")
    if not isinstance(parameters, list) or len(parameters) > MOST_PARAMETERS:
        raise PackageError(f"{source}: the parameters of {name} are not a list of at most {MOST_PARAMETERS}")
    if any(not isinstance(kind, str) or kind not in _TYPES for kind in parameters):
        raise PackageError(f"{source}: {name} has a parameter of an unknown type")
    shared = _number(row, "shared", 0, max(limit.shared for limit in LIMITS.values()), source)
    warps = _number(row, "warps", 1, MOST_WARPS, source)
    size = _number(row, "size", 1, LARGEST_CUBIN, source)
    cubin = _read(path, LARGEST_CUBIN)
    if len(cubin) != size or hashlib.sha256(cubin).hexdigest() != row.get("sha256"):
        raise PackageError(f"{path}: is not the file that {INDEX} describes (size or sha256 differ)")
    return Binary(name, cubin, tuple(parameters), shared, warps)


def _number(row: Mapping[str, Any], name: str, least: int, most: int, source: Path) -> int:
    value = row.get(name)
    if type(value) is not int or not least <= value <= most:
        raise PackageError(f"{source}: {name} must be from {least} to {most}, not {str(value)[:80]}")
    return value


def _object(value: Any, source: Path) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise PackageError(f"{source}: an object is wanted where {type(value).__name__} is")
    return value


def _parse(data: bytes, source: Path) -> Any:
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise PackageError(f"{source}: is not JSON: {error}") from error


def _read(path: Path, limit: int) -> bytes:
    """A regular file's contents; no link, no device, no more than the limit."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise PackageError(f"{path}: is not a regular file")
            data = file.read(limit + 1)
    except OSError as error:
        raise PackageError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > limit:
        raise PackageError(f"{path}: is larger than {limit} bytes")
    return data
