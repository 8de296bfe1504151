"""The kernel behind an operator: which configuration, which target, and a grid that follows the batch."""

from __future__ import annotations

import dataclasses
import re
import sys
from typing import Any

import pytest

from tests.helpers import interpreter
from vitdeploy.config import BatchRange
from vitdeploy.errors import DeviceUnavailable, ExportError, MissingDependency
from vitdeploy.tensorrt.plugin_graph import ATTENTION, PluginSpec
from vitdeploy.tensorrt.plugin_kernels import (
    attention_launch,
    compile_plugins,
    programs_per_image,
    refusal,
    target_of,
)
from vitdeploy_kernels.aot import ARCHITECTURES, AotError
from vitdeploy_kernels.config import Config, shipped_table
from vitdeploy_kernels.driver import LARGE_SHARED
from vitdeploy_kernels.launch import Launch
from vitdeploy_kernels.ptx import accesses, assemble

assert interpreter  # imported before Triton is

BASE = PluginSpec(ATTENTION, "float16", tokens=197, heads=12, width=64)
DIGITS = PluginSpec(ATTENTION, "bfloat16", tokens=17, heads=3, width=32)
BATCH = BatchRange(1, 8, 32)


@pytest.mark.parametrize("spec", [BASE, DIGITS, dataclasses.replace(BASE, tokens=257, width=80)])
def test_the_kernel_takes_these(spec: PluginSpec) -> None:
    assert refusal(spec) is None


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"width": 8}, "heads are 16 to 128 wide, not 8"),
        ({"width": 160}, "heads are 16 to 128 wide, not 160"),
        ({"tokens": 1025}, "sequences have 1 to 1024 tokens, not 1025"),
        ({"dtype": "float32"}, "qkv must be float16 or bfloat16, not float32"),
    ],
)
def test_and_says_why_it_does_not_take_others(changes: dict[str, Any], reason: str) -> None:
    assert refusal(dataclasses.replace(BASE, **changes)) == reason


def test_what_is_compiled_for_which_gpu() -> None:
    assert {arch: target_of(arch) for arch in ARCHITECTURES} == {arch: arch for arch in ARCHITECTURES}
    # Code for 8.0 and 8.9 runs on what came later in the same family.
    assert (target_of("sm_86"), target_of("sm_87")) == ("sm_80", "sm_80")
    for arch in ("sm_75", "sm_103", "sm_121", "sm_8", "gtx"):
        with pytest.raises(DeviceUnavailable, match=f"no plugins for {arch}") as caught:
            target_of(arch)
        assert "sm_90" in str(caught.value.hint)


@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("spec", [BASE, DIGITS])
def test_the_grid_is_the_launchs(spec: PluginSpec, block: int) -> None:
    """Counted by hand: a program for each tile of queries of each head of each image."""
    config = Config(block_m=block, block_n=64)
    programs = programs_per_image(lambda batch: attention_launch(spec, config, batch))
    assert programs == spec.heads * len(range(0, spec.tokens, block))
    for batch in (1, 2, 3, 7, 8, 64, 1000):
        assert attention_launch(spec, config, batch).grid == (batch * programs,)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda batch: (batch * 48 + 1,),
        lambda batch: (-(-batch * 197 // 64) * 12,),  # tiles over all rows: right for one image alone
        lambda batch: (min(batch, 3) * 48,),
        lambda batch: (48, batch),
        lambda batch: (48, 1) if batch > 1 else (48,),
    ],
)
def test_another_grid_is_found(wrong: Any) -> None:
    def launch(batch: int) -> Launch:
        return dataclasses.replace(attention_launch(BASE, Config(64, 64), batch), grid=wrong(batch))

    with pytest.raises(AotError, match="attention_kernel"):
        programs_per_image(launch)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [BASE, DIGITS], ids=["base", "digits"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_every_target(arch: str, spec: PluginSpec) -> None:
    (kernel,) = compile_plugins([spec], arch, BATCH)
    assert kernel.spec == spec
    assert kernel.arch == target_of(arch)
    assert assemble(kernel.ptx, kernel.arch)[:4] == b"\x7fELF"
    entry = re.search(rf"\.entry {kernel.name}\(\s*(.*?)\s*\)", kernel.ptx, re.DOTALL)
    assert entry is not None
    qkv, out = (each.split()[-1] for each in entry[1].split(","))
    assert accesses(kernel.ptx) == ({qkv}, {out})
    assert re.findall(r"\.reqntid (\d+)", kernel.ptx) == [str(kernel.threads)]
    assert kernel.shared <= LARGE_SHARED
    config = shipped_table(ARCHITECTURES[kernel.arch]).config(
        "attention", (BATCH.opt * spec.heads, spec.tokens, spec.width)
    )
    for batch in (1, 8, 33):
        assert attention_launch(spec, config, batch).grid == (batch * kernel.programs,)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_wide_heads_get_tiles_that_fit(arch: str) -> None:
    spec = dataclasses.replace(BASE, heads=6, width=128)
    (kernel,) = compile_plugins([spec], arch, BATCH)
    assert 0 < kernel.shared <= LARGE_SHARED


@pytest.mark.slow
def test_what_cannot_be_a_plugin_is_an_export_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitdeploy_kernels.driver.LARGE_SHARED", 64)
    with pytest.raises(ExportError, match=r"plugins for sm_89: fused_attention needs \d+ bytes") as caught:
        compile_plugins([DIGITS], "sm_89", BATCH)
    assert caught.value.hint == "build without --plugins"


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("vitdeploy_kernels")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(MissingDependency, match="--plugins needs the library 'triton'") as caught:
        refusal(BASE)
    assert caught.value.hint == 'pip install "vitdeploy[kernels]"'
