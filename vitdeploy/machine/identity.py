"""What this machine is: processor, memory, GPUs, libraries, and a name that two runs can share."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from vitdeploy.machine.gpus import query_gpus
from vitdeploy.machine.memory import total_memory
from vitdeploy.machine.processors import processors

LIBRARIES: Mapping[str, str] = {
    "numpy": "",
    "onnx": "",
    "onnxruntime-gpu": "gpu",
    "pillow": "",
    "pydantic": "",
    "safetensors": "",
    "onnxscript": "export",
    "transformers": "hub",
    "huggingface-hub": "hub",
    "timm": "hub",
    "starlette": "serve",
    "tritonclient": "client",
    "ray": "ray",
    "pillow-heif": "heic",
}
"""Distributions that matter besides the backends' own, and the extra that installs each; none is the core."""

# Instructions that decide how fast a CPU runs each precision, by their names in /proc/cpuinfo.
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16")
_ARM_FLAGS = ("asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2")


@dataclass(frozen=True)
class Cpu:
    """The processor, as far as this process may use it."""

    name: str
    flags: tuple[str, ...]
    threads: int
    """Hardware threads that this process may use."""
    memory: int | None
    """Bytes, the container's limit where there is a lower one."""


def find_cpu(root: Path = Path("/")) -> Cpu:
    """Describe the processor; ``root`` is where /proc and /sys are."""
    info = cpu_info(root / "proc/cpuinfo")
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return Cpu(
        name=info.get("model name") or platform.processor() or platform.machine(),
        flags=tuple(flag for flag in (*_FLAGS, *_ARM_FLAGS) if flag in flags),
        threads=processors(root),
        memory=total_memory(root),
    )


def machine_name(cpu: str, threads: int, gpus: Sequence[Mapping[str, str]]) -> tuple[str, ...]:
    """What two machines must have in common for the speed of one to say anything about the other."""
    return (cpu, f"{threads} threads", *(gpu.get("name", "") for gpu in gpus))


def this_machine() -> tuple[str, ...]:
    """The name of the machine that this runs on."""
    cpu = find_cpu()
    return machine_name(cpu.name, cpu.threads, query_gpus()[0])


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution; None where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def cpu_info(path: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """What Linux says of the first processor: ``model name``, ``flags`` and so on; nothing elsewhere."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
