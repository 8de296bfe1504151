"""What the counters say, read from a /proc and /sys of the test's own making."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from vitdeploy.benchmark import disturbances
from vitdeploy.benchmark.disturbances import CounterReader, Counters


def proc(root: Path, busy: int, steal: int, ours: dict[str, int]) -> CounterReader:
    """A machine whose processors each have so many ticks."""
    (root / "proc").mkdir(exist_ok=True)
    rows = [f"cpu{n} {busy} 0 0 900 0 0 0 {steal} 0 0" for n in os.sched_getaffinity(0)]
    rows += [f"cpu{10**6} 7777 0 0 0 0 0 0 7777 0 0", "intr 1 2 3"]
    (root / "proc/stat").write_text("\n".join(["cpu 1 2 3 4 5 6 7 8 9 10", *rows]) + "\n")
    for pid, ticks in ours.items():
        (root / "proc" / pid).mkdir(exist_ok=True)
        fields = ["S", *["0"] * 10, str(ticks), "0", *["0"] * 20]
        (root / "proc" / pid / "stat").write_text(f"{pid} (a) b) {' '.join(fields)}\n")
    return CounterReader(root)


def test_counters(tmp_path: Path) -> None:
    processors, tick = len(os.sched_getaffinity(0)), 1 / os.sysconf("SC_CLK_TCK")
    before = proc(tmp_path, 100, 0, {"self": 10, "42": 50}).read([42, 43])
    after = proc(tmp_path, 400, 30, {"self": 20, "42": 250}).read([42, 43])
    passed = after - before
    assert passed.busy == pytest.approx(300 * tick * processors)
    assert passed.stolen == pytest.approx(30 * tick * processors)
    assert passed.ours == pytest.approx(210 * tick)


def test_throttling(tmp_path: Path) -> None:
    folder = tmp_path / "sys/devices/system/cpu/cpu0/thermal_throttle"
    folder.mkdir(parents=True)
    (folder / "core_throttle_count").write_text("3\n")
    (folder / "package_throttle_count").write_text("4\n")
    assert CounterReader(tmp_path).read([]).throttled == 7


def test_a_system_without_counters_is_never_disturbed(tmp_path: Path) -> None:
    reader = CounterReader(tmp_path)
    passed = reader.read([1]) - reader.read([1])
    assert (passed.busy, passed.stolen, passed.ours, passed.throttled) == (0, 0, 0, 0)
    assert passed.disturbances(2) == []


@pytest.mark.parametrize(
    "passed, found",
    [
        (Counters(10, 20, 0, 19.5, 0), []),
        (Counters(10, 20, 0, 18, 0), ["other programs took 10% of the processors"]),
        (Counters(10, 20, 0.1, 20, 0), []),
        (Counters(10, 20, 1, 20, 0), ["the hypervisor took 5% of the processors"]),
        (Counters(10, 20, 0, 20, 2), ["the processor throttled 2 times"]),
        (Counters(0.02, 0.04, 0, 0, 0), []),  # two ticks are what the kernel rounds by
    ],
)
def test_disturbances(passed: Counters, found: list[str]) -> None:
    assert passed.disturbances(2) == found


def test_gpu_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(*arguments: object, **named: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 0, "41, 100\n42, 300\n42, 12\n", "")

    monkeypatch.setattr(disturbances.subprocess, "run", answers)
    assert disturbances.device_memory(42) == 312 * 2**20
    assert disturbances.device_memory(43) is None


def test_no_gpu() -> None:
    assert disturbances.device_memory(os.getpid()) is None
