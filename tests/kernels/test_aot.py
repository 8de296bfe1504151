"""Launches become cubins without a GPU; what Triton makes of them is read back and compared."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vitdeploy_kernels
from kernel_tools import sass
from tests.helpers.kernel_launches import LAUNCHES, layernorm_linear_launch
from vitdeploy_kernels import aot
from vitdeploy_kernels.aot import AotError, Compiled, launch_key, signature
from vitdeploy_kernels.compile_pool import compile_all
from vitdeploy_kernels.occupancy import LIMITS, programs_per_multiprocessor

WITHOUT_PRODUCTS = {
    "absorbed_attention_kernel",
    "add_layernorm_kernel",
    "norm_quantise_kernel",
    "quantise_kernel",
}
PTX = {"fp32": "f32", "i32": "u32"}


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, str], Compiled]:
    """Every kernel for one architecture, and one kernel for every architecture."""
    jobs = [("sm_90", make()) for make in LAUNCHES.values()]
    return compile_all(jobs + [(arch, layernorm_linear_launch()) for arch in aot.ARCHITECTURES])


def test_signature_names_every_parameter_in_the_kernels_order() -> None:
    launch = layernorm_linear_launch()
    told = signature(launch)
    assert [*told.types] == [*launch.arguments, *launch.constants]
    assert told.parameters == ("*fp16", "*fp32", "*fp16", "*fp32", "*fp32", "*fp16", "i32", "fp32")
    assert told.constants["WIDTH"] == 128
    assert [*told.attributes] == [(place,) for place in range(6)]


def test_signature_wants_exactly_the_kernels_parameters() -> None:
    launch = layernorm_linear_launch()
    without = {name: value for name, value in launch.arguments.items() if name != "eps"}
    with pytest.raises(AotError, match=r"not given: \['eps'\]"):
        signature(dataclasses.replace(launch, arguments=without))
    with pytest.raises(AotError, match=r"not a parameter, or given twice: \['more'\]"):
        signature(dataclasses.replace(launch, arguments={**launch.arguments, "more": 1}))


@pytest.mark.parametrize(
    "value, kind", [(2**31 - 1, "i32"), (2**31, "i64"), (-(2**31), "i32"), (1, "i32"), (1.0, "fp32")]
)
def test_type_of_a_number(value: float, kind: str) -> None:
    launch = layernorm_linear_launch()
    told = signature(dataclasses.replace(launch, arguments={**launch.arguments, "rows": value}))
    assert told.types["rows"] == kind


@pytest.mark.parametrize("value", [True, "16", 2**63, torch.empty(1, dtype=torch.float64, device="meta")])
def test_what_cannot_be_passed_is_refused(value: object) -> None:
    launch = layernorm_linear_launch()
    arguments = {**launch.arguments, "rows": value}
    with pytest.raises(AotError, match="rows"):
        signature(dataclasses.replace(launch, arguments=arguments))  # type: ignore[arg-type]


def test_key_is_of_the_binary_not_of_the_run() -> None:
    launch = layernorm_linear_launch()
    key = launch_key(launch)
    assert re.fullmatch("[0-9a-f]{64}", key)
    assert key == launch_key(layernorm_linear_launch(rows=4096))
    other = [
        dataclasses.replace(launch, warps=8),
        dataclasses.replace(launch, stages=4),
        dataclasses.replace(launch, constants={**launch.constants, "GROUP": 2}),
        dataclasses.replace(launch, arguments={**launch.arguments, "rows": 2**40}),
        layernorm_linear_launch(dtype=torch.bfloat16),
    ]
    assert len({key, *map(launch_key, other)}) == 1 + len(other)


def test_every_kernel_is_compiled_here() -> None:
    here = Path(vitdeploy_kernels.__file__).parent.glob("*.py")
    defined = {
        name for path in here for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)
    }
    assert {make().name for make in LAUNCHES.values()} == defined


def test_keys_of_all_kernels_differ() -> None:
    assert len({launch_key(make()) for make in LAUNCHES.values()}) == len(LAUNCHES)


def test_key_covers_the_functions_a_kernel_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """
import triton, triton.language as tl
FACTOR = tl.constexpr({factor})
@triton.jit
def inner(x):
    return x * FACTOR {more}
@triton.jit
def kernel(x_ptr, N: tl.constexpr):
    tl.store(x_ptr, inner(N))
"""
    monkeypatch.syspath_prepend(tmp_path)
    keys = []
    for index, values in enumerate(
        [{"factor": 2, "more": ""}, {"factor": 3, "more": ""}, {"factor": 2, "more": "+ 1"}]
    ):
        (tmp_path / f"keyed{index}.py").write_text(text.format(**values))
        kernel = __import__(f"keyed{index}").kernel
        for function in (kernel.fn, kernel.fn.__globals__["inner"].fn):
            function.__module__ = "keyed"
        keys.append(aot.kernel_source(kernel))
    assert len({*keys}) == 3
    assert keys == [aot.kernel_source(__import__(f"keyed{index}").kernel) for index in range(3)]


def test_parameters_are_those_of_the_ptx(compiled: dict[tuple[str, str], Compiled]) -> None:
    for result in compiled.values():
        entry = re.search(rf"\.visible \.entry {result.name}\((.*?)\n\)", result.ptx, re.DOTALL)
        assert entry is not None
        listed = re.findall(r"\.param \.(\w+)(?: \.ptr)?", entry[1])
        assert listed == [PTX.get(kind, "u64") for kind in result.parameters], result.name
        assert result.parameters[-2:] == ("scratch", "scratch")
        assert result.global_scratch == result.profile_scratch == 0


def test_cubins_are_for_their_architecture(compiled: dict[tuple[str, str], Compiled]) -> None:
    for (arch, _), result in compiled.items():
        assert result.arch == arch
        assert result.cubin.startswith(b"\x7fELF")
        assert f".target {arch}" in result.ptx
        assert b"vitdeploy" not in result.cubin, "a cubin names no path"


def test_resources(compiled: dict[tuple[str, str], Compiled]) -> None:
    for (arch, _), result in compiled.items():
        used = sass.resources(result)
        assert 16 <= used.registers <= 255
        assert used.stack == used.spill_loads == used.spill_stores == 0
        assert used.total > sum(used.instructions.values()) > 0
        assert used.programs > 0
        if result.name not in WITHOUT_PRODUCTS:
            tensor = {"sm_90": "HGMMA", "sm_100": "UTCMMA"}.get(arch, "HMMA")
            assert used.instructions[tensor] > 0, (result.name, arch)


def test_instructions_are_counted_by_name() -> None:
    counted = sass.count_instructions(
        """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                      /* 0x00000a00ff017b82 */
        /*0010*/              @!P1 LDGSTS.E.BYPASS.128 [R3], desc[UR4][R2.64] ;
        /*0020*/             @!UPT LDG.E.64 R2, desc[UR4][R2.64] ;
        /*0030*/                   UTCHMMA tmem[UR14], gdesc[UR20], tmem[UR6], !UPT ;
        /*0040*/               @P0 UTCQMMA.2CTA tmem[UR14], gdesc[UR20] ;
        /*0050*/                   UTCBAR [UR4], URZ ;
        /*10060*/                  STL.64 [R1], R2 ;
        """
    )
    expected = {
        "LDC": 1,
        "LDGSTS": 1,
        "LDG": 1,
        "UTCHMMA": 1,
        "UTCQMMA": 1,
        "UTCBAR": 1,
        "STL": 1,
        "UTCMMA": 2,
    }
    assert counted == expected


def test_compiling_twice_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cubins = []
    for name in ("a", "b"):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / name))
        (result,) = compile_all([("sm_90", layernorm_linear_launch())]).values()
        cubins.append(result.cubin)
    assert cubins[0] == cubins[1]


def test_unknown_architecture() -> None:
    with pytest.raises(AotError, match=r"unknown architecture 'sm90': did you mean sm_90\? known are sm_80"):
        compile_all([("sm90", layernorm_linear_launch())])


def test_interpreted_kernel_is_not_compiled() -> None:
    if not os.environ.get("TRITON_INTERPRET") and hasattr(layernorm_linear_launch().kernel, "cache_key"):
        pytest.skip("a GPU is here: kernels are not interpreted")
    with pytest.raises(AotError, match="compile it in a process without TRITON_INTERPRET"):
        aot.compile_launch(layernorm_linear_launch(), "sm_80")


def test_missing_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = layernorm_linear_launch()
    for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(AotError, match="needs Triton"):
        aot.compile_launch(launch, "sm_80")


def test_too_much_shared_memory_is_refused() -> None:
    launch = layernorm_linear_launch()
    tiles = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}
    large = dataclasses.replace(
        launch, constants={**launch.constants, **tiles, "WIDTH": 1024}, warps=8, stages=5
    )
    with pytest.raises(AotError, match=r"sm_89 has 101376 for a program"):
        compile_all([("sm_89", large)])


def test_a_kernel_that_does_not_compile_says_so() -> None:
    launch = layernorm_linear_launch()
    broken = dataclasses.replace(launch, constants={**launch.constants, "BLOCK_K": 48})
    with pytest.raises(AotError, match=r"layernorm_linear_kernel for sm_90: .*power of 2"):
        compile_all([("sm_90", broken)])


def test_a_process_that_dies_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/true")
    with pytest.raises(AotError, match="the compiling process ended with exit status 0"):
        compile_all([("sm_90", layernorm_linear_launch())])


def test_progress_and_one_compilation_for_many_batches() -> None:
    told: list[tuple[int, int, str]] = []
    launches = [layernorm_linear_launch(rows=rows) for rows in (197, 394, 788)]
    compile_all([("sm_90", launch) for launch in launches], progress=lambda *line: told.append(line))
    assert told == [(1, 1, "layernorm_linear_kernel for sm_90")]


def test_no_warning_about_fusion(tmp_path: Path) -> None:
    code = (
        "from tests.helpers.kernel_launches import layernorm_linear_launch as make;"
        "from vitdeploy_kernels import aot;"
        "print(aot.compile_launch(make(), 'sm_90').warps)"
    )
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "4\n", "")


@pytest.mark.parametrize(
    "capability, used, programs",
    [
        ((8, 0), {"registers": 128, "shared": 0, "warps": 8}, 2),
        ((8, 0), {"registers": 32, "shared": 0, "warps": 1}, 16),
        ((9, 0), {"registers": 168, "shared": 98304, "warps": 8}, 1),
        ((9, 0), {"registers": 168, "shared": 98304, "warps": 4}, 2),
        ((9, 0), {"registers": 64, "shared": 114 * 1024 - 1024, "warps": 4}, 2),
        ((9, 0), {"registers": 64, "shared": 114 * 1024, "warps": 4}, 1),
        ((9, 0), {"registers": 64, "shared": 227 * 1024 + 1, "warps": 4}, 0),
        ((10, 0), {"registers": 64, "shared": 1024, "warps": 4, "tensor_columns": 256}, 2),
        ((12, 0), {"registers": 40, "shared": 0, "warps": 4}, 12),
    ],
)
def test_occupancy(capability: tuple[int, int], used: dict[str, int], programs: int) -> None:
    assert programs_per_multiprocessor(capability, **used) == programs


def test_every_architecture_has_limits() -> None:
    assert {*aot.ARCHITECTURES.values()} <= LIMITS.keys()
