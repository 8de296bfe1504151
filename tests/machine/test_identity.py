"""The machine is described from files and programs that a test can stand in for."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.paths import ROOT
from vitdeploy.machine.identity import LIBRARIES, find_cpu

CPUINFO = """\
processor\t: 0
model name\t: Example CPU @ 3.00GHz
flags\t\t: fpu sse2 avx2 avx512f avx512_bf16 amx_tile

processor\t: 1
model name\t: Another
flags\t\t: fpu
"""


def fake_root(tmp_path: Path, memory: str) -> Path:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(CPUINFO)
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text(memory)
    return tmp_path


def test_cpu(tmp_path: Path) -> None:
    cpu = find_cpu(fake_root(tmp_path, "1048576\n"))
    assert cpu.name == "Example CPU @ 3.00GHz"
    assert cpu.flags == ("avx2", "avx512f", "avx512_bf16", "amx_tile")
    assert cpu.memory == 1048576  # the container's, less than the machine's
    assert cpu.threads >= 1


def test_memory_without_a_limit(tmp_path: Path) -> None:
    memory = find_cpu(fake_root(tmp_path, "max\n")).memory
    assert memory is not None
    assert memory > 2**20


def test_cpu_where_nothing_says_what_it_is(tmp_path: Path) -> None:
    cpu = find_cpu(tmp_path)
    assert cpu.name
    assert cpu.flags == ()


def test_extras_exist() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = project["optional-dependencies"]
    for library, extra in LIBRARIES.items():
        wanted = known[extra] if extra else project["dependencies"]
        assert any(requirement.partition("[")[0].startswith(library) for requirement in wanted), library
