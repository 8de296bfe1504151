"""PTX as a plugin takes it: right order, nothing hidden, accepted by ptxas; and every way to get it wrong."""

from __future__ import annotations

import ctypes
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from tests.helpers.kernel_launches import LAUNCHES, attention_launch, layernorm_linear_launch
from vitdeploy_kernels import aot, ptx, reference
from vitdeploy_kernels import attention as attend
from vitdeploy_kernels.aot import AotError, Compiled, launch_key, parameter_names
from vitdeploy_kernels.compile_pool import compile_all
from vitdeploy_kernels.config import Config
from vitdeploy_kernels.driver import LARGE_SHARED, Binary, CubinKernel, CudaDriver
from vitdeploy_kernels.launch import Launch
from vitdeploy_kernels.ptx import PluginPtx, accesses, assemble, plugin_ptx, with_constant_floats

TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
OUTPUTS = {"out_ptr", "stats_ptr", "total_ptr", "normed_ptr"}
ATTENTION: dict[str, Any] = {"inputs": ("qkv_ptr",), "outputs": ("out_ptr",)}
LINEAR: dict[str, Any] = {
    "inputs": ("x_ptr", "stats_ptr", "weight_ptr", "colsum_ptr", "bias_ptr"),
    "integers": ("rows",),
    "outputs": ("out_ptr",),
}


def attention() -> Launch:
    return with_constant_floats(attention_launch())


def linear() -> Launch:
    return with_constant_floats(layernorm_linear_launch())


@pytest.fixture(scope="module")
def kernels() -> Mapping[tuple[str, str], Compiled]:
    """Every kernel for one architecture, and two of them for every one."""
    jobs = [("sm_90", with_constant_floats(make())) for make in LAUNCHES.values()]
    return compile_all(jobs + [(arch, make()) for arch in TARGETS for make in (attention, linear)])


def of(kernels: Mapping[tuple[str, str], Compiled], arch: str, launch: Launch) -> Compiled:
    return kernels[arch, launch_key(launch)]


def declared(text: str) -> list[str]:
    """The entry's parameters: type, and place in the order that Triton gave them."""
    entry = re.search(r"\.entry \w+\((.*?)\n\)", text, re.DOTALL)
    assert entry is not None
    return [
        f"{kind} {place}" for kind, place in re.findall(r"\.param \.(\w+).*?_param_(\d+)(?=,|$)", entry[1])
    ]


def test_floats_are_compiled_in() -> None:
    launch = layernorm_linear_launch()
    constant = with_constant_floats(launch)
    assert "eps" not in constant.arguments
    assert constant.constants["eps"] == launch.arguments["eps"]
    assert aot.signature(constant).parameters == ("*fp16", "*fp32", "*fp16", "*fp32", "*fp32", "*fp16", "i32")


@pytest.mark.parametrize("arch", TARGETS)
def test_inputs_integers_outputs(kernels: Any, arch: str) -> None:
    launch = linear()
    compiled = of(kernels, arch, launch)
    made = plugin_ptx(compiled, launch, **LINEAR)
    # The kernel's own order ends with out_ptr, rows and two pointers to scratch memory.
    assert declared(compiled.ptx) == [*(f"u64 {i}" for i in range(6)), "u32 6", "u64 7", "u64 8"]
    assert declared(made.text) == [*(f"u64 {i}" for i in range(5)), "u32 6", "u64 5"]
    assert made.parameters == (*LINEAR["inputs"], "rows", "out_ptr")
    assert (made.name, made.arch, made.warps) == ("layernorm_linear_kernel", arch, 4)
    assert made.shared == compiled.shared
    assert body(made.text) == body(compiled.ptx)
    assert assemble(made.text, arch)[:4] == b"\x7fELF"


def body(text: str) -> str:
    """All behind the parameters."""
    return text[text.index("\n)\n", text.index(".entry")) :]


@pytest.mark.parametrize("arch", TARGETS)
def test_the_label_is_the_oldest_that_ptxas_accepts(kernels: Any, arch: str) -> None:
    launch = attention()
    compiled = of(kernels, arch, launch)
    made = plugin_ptx(compiled, launch, **ATTENTION)
    label = f".version {made.isa}\n"
    assert made.text.count(label) == 1
    assert number(made.isa) <= number(re.findall(r"^\.version (.*)$", compiled.ptx, re.MULTILINE)[0])
    older = [version for version in ptx.ISA_VERSIONS if number(version) < number(made.isa)]
    if older:
        with pytest.raises(AotError, match=f"ptxas refuses the kernel for {arch}"):
            assemble(made.text.replace(label, f".version {older[-1]}\n"), arch)


def number(version: str) -> list[int]:
    return [*map(int, version.split("."))]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_the_label_does_not_change_the_binary(kernels: Any, arch: str) -> None:
    compiled = of(kernels, arch, attention())
    labels = [version for version in ptx.ISA_VERSIONS if [8, 0] <= number(version) <= [8, 7]]
    texts = [re.sub(r"\.version .*", f".version {version}", compiled.ptx) for version in labels]
    assert len({assemble(text, arch) for text in texts}) == 1


@pytest.mark.parametrize("name", LAUNCHES)
def test_what_a_kernel_reads_and_writes(kernels: Any, name: str) -> None:
    launch = with_constant_floats(LAUNCHES[name]())
    compiled = of(kernels, "sm_90", launch)
    names = [each for each in parameter_names(launch.kernel) if each in launch.arguments]
    pointers = {each for each in names if each.endswith("_ptr")}
    # As an input, stats are read; as an output, they are written.
    outputs = pointers & OUTPUTS - (
        {"stats_ptr"} if "colsum_ptr" in names or "queries_ptr" in names else set()
    )
    read, written = (
        {names[int(each.rpartition("_")[2])] for each in found} for found in accesses(compiled.ptx)
    )
    assert written & pointers == outputs
    assert read & pointers == pointers - outputs


def test_swapped_pointers_are_found(kernels: Any) -> None:
    launch = attention()
    with pytest.raises(AotError, match=r"writes to \['out_ptr'\], and the outputs are \['qkv_ptr'\]"):
        plugin_ptx(of(kernels, "sm_90", launch), launch, inputs=("out_ptr",), outputs=("qkv_ptr",))
    named = {**LINEAR, "inputs": LINEAR["inputs"][:-1], "outputs": ("out_ptr", "bias_ptr")}
    with pytest.raises(AotError, match=r"the outputs are \['bias_ptr', 'out_ptr'\]"):
        plugin_ptx(of(kernels, "sm_90", linear()), linear(), **named)


def test_an_input_that_is_not_read_is_found(kernels: Any) -> None:
    compiled = of(kernels, "sm_90", attention())
    deaf = dataclasses.replace(
        compiled, ptx=re.sub(r"\n\s*ld\.param\.\w+\s+%\w+, \[\w+_0\];", "", compiled.ptx)
    )
    with pytest.raises(AotError, match=r"does not read its inputs \['qkv_ptr'\]"):
        plugin_ptx(deaf, attention(), **ATTENTION)


@pytest.mark.parametrize(
    "named, message",
    [
        (
            {"inputs": ("qkv_ptr",), "outputs": ()},
            "takes qkv_ptr, out_ptr, and the plugin would pass qkv_ptr",
        ),
        ({"inputs": ("qkv",), "outputs": ("out_ptr",)}, "would pass qkv, out_ptr"),
        ({"inputs": ("qkv_ptr", "qkv_ptr"), "outputs": ("out_ptr",)}, "would pass qkv_ptr, qkv_ptr"),
        (
            {"inputs": (), "integers": ("qkv_ptr",), "outputs": ("out_ptr",)},
            r"qkv_ptr is \*fp16, and would be passed as something else",
        ),
    ],
)
def test_names_must_be_the_launchs(kernels: Any, named: Any, message: str) -> None:
    with pytest.raises(AotError, match=message):
        plugin_ptx(of(kernels, "sm_90", attention()), attention(), **named)


def test_an_integer_is_no_input(kernels: Any) -> None:
    named = {**LINEAR, "inputs": (*LINEAR["inputs"], "rows"), "integers": ()}
    with pytest.raises(AotError, match="rows is i32, and would be passed as something else"):
        plugin_ptx(of(kernels, "sm_90", linear()), linear(), **named)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"global_scratch": 128}, r"needs scratch memory \(128 and 0 bytes\)"),
        ({"profile_scratch": 8}, r"needs scratch memory \(0 and 8 bytes\)"),
        (
            {"parameters": ("*fp16", "fp32", "scratch", "scratch")},
            "out_ptr is a float, which a plugin cannot",
        ),
        ({"parameters": ("*fp16", "i64", "scratch", "scratch")}, "out_ptr has 64 bits"),
        ({"parameters": ("*fp16", "*fp16", "*fp16", "scratch")}, "was compiled with the parameters"),
        ({"parameters": ("*fp16", "*fp16", "scratch")}, "does not have the parameters"),
        ({"name": "other"}, r"the PTX has the entries \['attention_kernel'\], not other alone"),
        ({"warps": 8}, "does not say that it runs 8 warps"),
        ({"arch": "sm_80"}, "the PTX is for sm_90a, not for sm_80"),
    ],
)
def test_what_is_not_as_expected_is_refused(kernels: Any, changes: Any, message: str) -> None:
    compiled = dataclasses.replace(of(kernels, "sm_90", attention()), **changes)
    with pytest.raises(AotError, match=message):
        plugin_ptx(compiled, attention(), **ATTENTION)


def test_a_kernel_that_reads_its_scratch_memory_is_refused(kernels: Any) -> None:
    compiled = of(kernels, "sm_90", attention())
    first = "ld.param.b64 \t"
    assert first in compiled.ptx
    text = compiled.ptx.replace(first, f"ld.param.b64 \t%rd0, [attention_kernel_param_3];\n\t{first}", 1)
    with pytest.raises(AotError, match=r"reads its scratch memory \(attention_kernel_param_3\)"):
        plugin_ptx(dataclasses.replace(compiled, ptx=text), attention(), **ATTENTION)


def test_a_float_and_a_wide_integer_that_were_really_compiled() -> None:
    launch = layernorm_linear_launch()
    wide = linear()
    wide = dataclasses.replace(wide, arguments={**wide.arguments, "rows": 2**40})
    done = compile_all([("sm_80", launch), ("sm_80", wide)])
    named = {**LINEAR, "integers": ("rows", "eps")}
    with pytest.raises(AotError, match="eps is a float, which a plugin cannot pass; compile it in"):
        plugin_ptx(of(done, "sm_80", launch), launch, **named)
    with pytest.raises(AotError, match="rows has 64 bits, and a plugin passes integers of 32"):
        plugin_ptx(of(done, "sm_80", wide), wide, **LINEAR)


def test_ptxas_has_the_last_word(kernels: Any) -> None:
    made: PluginPtx = plugin_ptx(of(kernels, "sm_90", attention()), attention(), **ATTENTION)
    with pytest.raises(AotError, match="ptxas refuses the kernel for sm_90: line "):
        assemble(made.text.replace("ret;", "retire;"), "sm_90")
    with pytest.raises(AotError, match="no architecture"):
        assemble("", "sm_90")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gpu_runs_it_as_tensorrt_would(dtype: torch.dtype) -> None:
    """PTX into the driver, arguments in TensorRT's order, nothing asked for before the launch."""
    major, minor = torch.cuda.get_device_capability()
    arch = f"sm_{major}{minor}"
    generator = torch.Generator("cuda").manual_seed(0)
    qkv = torch.randn(3, 197, 3 * 192, generator=generator, device="cuda", dtype=dtype)
    out = torch.full((3, 197, 192), torch.nan, device="cuda", dtype=dtype)
    launch = with_constant_floats(
        attend.launch(qkv, out, heads=3, scale=0.125, config=Config(64, 64, warps=4, stages=2))
    )
    made = plugin_ptx(of(compile_all([(arch, launch)]), arch, launch), launch, **ATTENTION)
    assert made.shared <= LARGE_SHARED
    driver = CudaDriver()
    binary = Binary(made.name, made.text.encode(), (), made.shared, made.warps)
    function = CubinKernel(driver, binary, qkv.device.index)._function
    values = [ctypes.c_uint64(tensor.data_ptr()) for tensor in (qkv, out)]
    addresses = (ctypes.c_void_p * 2)(*map(ctypes.addressof, values))
    block = (32 * made.warps, 1, 1)
    with driver.on(qkv.device.index):
        stream = driver.stream(qkv.device.index)
        driver.call(
            "cuLaunchKernel", function, *launch.grid, 1, 1, *block, made.shared, stream, addresses, None
        )
    torch.cuda.synchronize()
    expected = reference.attention(qkv, 3, scale=0.125)
    assert (out - expected).norm() < 1e-2 * expected.norm()


def test_bfloat16() -> None:
    launch = with_constant_floats(layernorm_linear_launch(dtype=torch.bfloat16))
    compiled = of(compile_all([("sm_80", launch)]), "sm_80", launch)
    assert number(plugin_ptx(compiled, launch, **LINEAR).isa) < [8, 0]
