"""Quotas of containers, from trees of files as the kernel shows them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.bundles import write_bundle
from vitdeploy.backends import base
from vitdeploy.backends.base import Options
from vitdeploy.backends.onnxruntime import OnnxRuntime
from vitdeploy.backends.openvino import OpenVino
from vitdeploy.machine import processors as module
from vitdeploy.machine.cgroups import memory_limit, processor_quota
from vitdeploy.machine.processors import Share, default_threads, processors, shares

GROUP = "sys/fs/cgroup"
V2 = {"proc/self/cgroup": "0::/kubepods/pod1/box\n"}
V1 = {"proc/self/cgroup": "11:memory:/docker/1\n4:cpu,cpuacct:/docker/1\n1:name=systemd:/x\n"}


def tree(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    "files, quota",
    [
        ({}, None),
        ({f"{GROUP}/cpu.max": "max 100000\n"}, None),
        ({f"{GROUP}/cpu.max": "150000 100000\n"}, 1.5),
        (V2 | {f"{GROUP}/kubepods/pod1/box/cpu.max": "50000 100000\n"}, 0.5),
        (V2 | {f"{GROUP}/kubepods/cpu.max": "300000 100000\n"}, 3.0),
        (
            V2
            | {
                f"{GROUP}/kubepods/cpu.max": "300000 100000\n",
                f"{GROUP}/kubepods/pod1/box/cpu.max": "max 100000\n",
                f"{GROUP}/kubepods/pod1/cpu.max": "200000 100000\n",
            },
            2.0,
        ),
        ({f"{GROUP}/cpu/cpu.cfs_quota_us": "-1\n", f"{GROUP}/cpu/cpu.cfs_period_us": "100000\n"}, None),
        (
            V1
            | {
                f"{GROUP}/cpu/docker/1/cpu.cfs_quota_us": "250000\n",
                f"{GROUP}/cpu/docker/1/cpu.cfs_period_us": "100000\n",
            },
            2.5,
        ),
        ({"proc/self/cgroup": "0::/../../other\n", f"{GROUP}/other/cpu.max": "100000 100000\n"}, 1.0),
        ({f"{GROUP}/cpu.max": "rubbish\n", "proc/self/cgroup": "rubbish\n"}, None),
    ],
)
def test_quota(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    assert processor_quota(tree(tmp_path, files)) == quota


@pytest.mark.parametrize(
    "files, limit",
    [
        ({}, None),
        ({f"{GROUP}/memory.max": "max\n"}, None),
        (
            V2 | {f"{GROUP}/kubepods/pod1/memory.max": "4096\n", f"{GROUP}/kubepods/memory.max": "8192\n"},
            4096,
        ),
        (V1 | {f"{GROUP}/memory/docker/1/memory.limit_in_bytes": "1024\n"}, 1024),
    ],
)
def test_memory(tmp_path: Path, files: dict[str, str], limit: int | None) -> None:
    assert memory_limit(tree(tmp_path, files)) == limit


@pytest.mark.parametrize("quota, ours", [(None, 4), (0.5, 1), (1.5, 2), (3.0, 3), (64.0, 4)])
def test_ours_are_those_of_affinity_and_quota(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, ours: int
) -> None:
    monkeypatch.setattr(module, "visible_processors", lambda: 4)
    monkeypatch.setattr(module, "processor_quota", lambda root=None: quota)
    assert processors() == ours
    assert default_threads() == (ours if ours < 4 else None)


@pytest.mark.slow
def test_sessions_take_the_quota_s_threads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(base, "default_threads", lambda: 1)
    bundle = write_bundle(tmp_path / "linear.bundle")
    with OnnxRuntime().load(bundle, bundle.artifact("fp32"), Options()) as session:
        assert session._session.get_session_options().intra_op_num_threads == 1
    with OnnxRuntime().load(bundle, bundle.artifact("fp32"), Options(threads=2)) as session:
        assert session._session.get_session_options().intra_op_num_threads == 2
    with OpenVino().load(bundle, bundle.artifact("fp32"), Options()) as session:
        assert session._request.get_compiled_model().get_property("INFERENCE_NUM_THREADS") == 1


@given(st.integers(1, 256), st.integers(1, 256))
def test_shares_have_all_processors_or_all_cores_at_work(processors: int, cores: int) -> None:
    found = shares(processors, min(processors, cores))
    assert found[0] == Share(1, None), "what a runtime takes by itself"
    assert len(set(found)) == len(found)
    assert list(found) == sorted(found, key=lambda share: share.sessions)
    totals = {share.sessions * (share.threads or 0) for share in found[1:]}
    assert totals <= {processors, min(processors, cores)}
    assert processors == 1 or Share(processors, 1) in found


def test_hyperthreads_are_one_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    place = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    files = {place.format(n): f"{n % 2},{n % 2 + 2}\n" for n in range(4)}
    assert module.cores(tree(tmp_path, files)) == 2
    assert module.cores(tmp_path / "nothing is known") == 4
    assert module.cores(tree(tmp_path, {f"{GROUP}/cpu.max": "100000 100000\n"})) == 1
    assert shares(4, 2) == (Share(1, None), Share(2, 1), Share(2, 2), Share(4, 1))
