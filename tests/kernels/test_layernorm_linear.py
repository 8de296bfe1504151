"""layernorm_linear against float64."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.interpreter import run_inside
from tests.helpers.kernel_tensors import TOLERANCE, Guarded, guard, guard_rows, relative
from vitdeploy_kernels import reference
from vitdeploy_kernels.config import Config
from vitdeploy_kernels.gemm import ACTIVATIONS
from vitdeploy_kernels.layernorm_linear import Folded, _operator, fold_layernorm, launch, layernorm_linear
from vitdeploy_kernels.support import UnsupportedError

SMALL = Config(block_m=32, block_n=64, block_k=32, group=2, warps=4, stages=2)
EPS = 1e-6


def folded(width: int, columns: int, dtype: torch.dtype, device: torch.device) -> Folded:
    weight = torch.randn(width, columns) / width**0.5
    f = fold_layernorm(torch.randn(width), torch.randn(width), weight, torch.randn(columns), dtype)
    return Folded(*(guard(t, device) for t in f))


def error(x: Tensor, f: Folded, out: Tensor, activation: str = "none") -> float:
    expected = reference.layernorm_linear(x.cpu(), f.weight.cpu(), f.bias.cpu(), EPS, activation)
    return relative(out, expected)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_is_layernorm_linear_activation(dtype: torch.dtype, activation: str, device: torch.device) -> None:
    torch.manual_seed(0)
    x = guard(torch.randn(70, 96).to(dtype), device)
    stats = guard(reference.statistics(x.cpu(), 32).float(), device)
    f = folded(96, 136, dtype, device)
    out = layernorm_linear(x, stats, *f, eps=EPS, activation=activation, config=SMALL)
    assert out.dtype == dtype
    assert error(x, f, out, activation) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    "name, values",
    [
        ("mean 60, deviation 1", lambda: torch.randn(40, 96) + 60),
        ("all zero", lambda: torch.zeros(40, 96)),
        ("+-6e4", lambda: torch.randn(40, 96).sign() * 6e4),
        ("one massive channel", lambda: torch.cat([torch.full((40, 1), 3e4), torch.randn(40, 95)], dim=1)),
        ("subnormal", lambda: torch.randn(40, 96) * 1e-6),
    ],
)
def test_extreme_rows(name: str, values: object, device: torch.device) -> None:
    torch.manual_seed(1)
    x = guard(values().half(), device)  # type: ignore[operator]
    stats = guard(reference.statistics(x.cpu(), 32).float(), device)
    f = folded(x.shape[1], 64, torch.float16, device)
    out = layernorm_linear(x, stats, *f, eps=EPS, config=SMALL)
    assert error(x, f, out) < TOLERANCE[torch.float16], name


def test_centred_rows(device: torch.device) -> None:
    torch.manual_seed(2)
    x = torch.randn(40, 96)
    x = guard((x - x.mean(dim=1, keepdim=True)).half(), device)
    stats = guard(reference.statistics(x.cpu(), 32).float(), device)
    f = folded(96, 80, torch.float16, device)
    out = layernorm_linear(x, stats, *f, eps=EPS, config=SMALL)
    assert error(x, f, out) < TOLERANCE[torch.float16]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
def test_rows_with_nan_and_inf_are_nan_alone(device: torch.device) -> None:
    torch.manual_seed(4)
    x = torch.randn(40, 96).half()
    x[3, 7], x[4, 0], x[33, 95] = torch.nan, torch.inf, -torch.inf
    x = guard(x, device)
    stats = guard(reference.statistics(x.cpu(), 32).float(), device)
    f = folded(96, 80, torch.float16, device)
    out = layernorm_linear(x, stats, *f, eps=EPS, config=SMALL).cpu()
    ill = torch.tensor([3, 4, 33])
    clean = torch.tensor([row for row in range(40) if row not in ill])
    assert out[ill].isnan().all()
    assert error(x.cpu()[clean], f, out[clean]) < TOLERANCE[torch.float16]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_large_values_and_of_infinity(activation: str, device: torch.device) -> None:
    x = torch.tensor([[1.0, -1.0]] * 2).half().to(device)
    stats = reference.statistics(x.cpu(), 2).float().to(device)
    bias = torch.tensor([torch.inf, -torch.inf, torch.nan, 3e4, -3e4, 0.0, -0.5, 8.0])
    weight = torch.zeros(2, 8, dtype=torch.float16, device=device)
    out = layernorm_linear(
        x, stats, weight, torch.zeros(8, device=device), bias.to(device), activation=activation, config=SMALL
    )
    wanted = {
        "none": lambda v: v,
        # PyTorch's own is NaN at infinity on processors with AVX-512.
        "gelu": lambda v: torch.tensor([0.5 * x * (1 + math.erf(x / math.sqrt(2))) for x in v.tolist()]),
        "gelu_tanh": lambda v: torch.nn.functional.gelu(v, approximate="tanh"),
        "quick_gelu": lambda v: v * torch.sigmoid(1.702 * v),
        "relu": torch.relu,
        "silu": torch.nn.functional.silu,
    }[activation](bias)
    torch.testing.assert_close(out.cpu(), wanted.half().expand(2, 8), equal_nan=True, rtol=1e-3, atol=1e-6)


def test_gelu_is_exact_to_1e_6(device: torch.device) -> None:
    bias = torch.linspace(-12, 12, 4096)
    x = torch.tensor([[1.0, -1.0]]).half()
    zeros = torch.zeros(2, 4096, dtype=torch.float16), torch.zeros(4096)
    inputs = (t.to(device) for t in (x, reference.statistics(x, 2).float(), *zeros, bias))
    out = layernorm_linear(*inputs, activation="gelu", out_dtype=torch.float32, config=SMALL)
    assert (out[0].cpu().double() - reference.activate(bias.double(), "gelu")).abs().max() < 1e-6


def test_eps_counts(device: torch.device) -> None:
    x = torch.tensor([[1.0, -1.0]]).half().to(device) / 64
    stats = reference.statistics(x.cpu(), 2).float().to(device)
    weight = torch.tensor([[1.0, 1.0], [0.0, 1.0]]).half().to(device)
    colsum, bias = weight.float().sum(dim=0), torch.zeros(2, device=device)
    out = layernorm_linear(x, stats, weight, colsum, bias, eps=3 / 64**2, config=SMALL)
    assert torch.equal(out.cpu(), torch.tensor([[0.5, 0.0]]).half())


def test_sums_in_float32(device: torch.device) -> None:
    """The products' sum passes 65504 by far before the deviation scales it back."""
    x = torch.full((4, 2048), 64.0)
    x[:, 1::2] = -64.0
    x = x.half()
    weight = (x[:1].T / 64 * torch.tensor([3.0, 1.0, -2.0] * 5 + [0.5])).half()
    stats = reference.statistics(x, 64).float()
    f = Folded(weight, weight.float().sum(dim=0), torch.zeros(16))
    out = layernorm_linear(x.to(device), stats.to(device), *(t.to(device) for t in f), config=SMALL)
    assert error(x, f, out) < TOLERANCE[torch.float16]


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 50),
    width=st.integers(1, 150),
    columns=st.integers(1, 150),
    blocks=st.tuples(
        st.sampled_from([16, 32, 64]), st.sampled_from([16, 64, 128]), st.sampled_from([16, 32, 64])
    ),
    group=st.integers(1, 3),
    tile=st.sampled_from([16, 32, 64, 256]),
    dtype=st.sampled_from(sorted(TOLERANCE, key=str)),
    out_dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
def test_any_shape_stays_inside(
    rows: int,
    width: int,
    columns: int,
    blocks: tuple[int, int, int],
    group: int,
    tile: int,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    device: torch.device,
) -> None:
    torch.manual_seed(rows)
    # The columns' means differ, so that the tiles of the statistics differ in more than noise.
    values = torch.randn(rows, width) + torch.arange(width) / 16
    x = guard_rows(values.to(dtype), device, gap=3)
    stats = guard(reference.statistics(x.cpu(), tile).float(), device)
    f = folded(width, columns, dtype, device)
    out = Guarded((rows, columns), out_dtype, device)
    config = Config(*blocks, group=group, warps=4, stages=2)
    run_inside(launch(x, stats, *f, out.tensor, eps=EPS, config=config))
    # One column may cancel to next to nothing: it is held against the terms of its sum.
    expected = reference.layernorm_linear(x.cpu(), f.weight.cpu(), f.bias.cpu(), EPS)
    terms = (reference.normalise(x.cpu(), EPS) ** 2 @ f.weight.cpu().double() ** 2).sqrt()
    size = expected.norm(dim=1).maximum(terms.norm(dim=1))
    worst = ((out.tensor.cpu().double() - expected).norm(dim=1) / size.clamp(min=1e-30)).max()
    assert worst < max(TOLERANCE.get(out_dtype, 0.0), TOLERANCE[dtype])
    assert out.intact()


@pytest.mark.parametrize("width, tile", [(33, 16), (96, 32)])
def test_ragged_tiles_stay_inside(width: int, tile: int, device: torch.device) -> None:
    torch.manual_seed(11)
    x = guard_rows((torch.randn(20, width) + torch.arange(width) / 8).half(), device, gap=3)
    stats = guard(reference.statistics(x.cpu(), tile).float(), device)
    f = folded(width, 70, torch.float16, device)
    out = Guarded((20, 70), torch.float16, device)
    run_inside(launch(x, stats, *f, out.tensor, eps=EPS, config=SMALL))
    assert error(x, f, out.tensor) < TOLERANCE[torch.float16]
    assert out.intact()


def test_float32_output_is_not_rounded(device: torch.device) -> None:
    torch.manual_seed(5)
    x = guard(torch.randn(20, 64).half(), device)
    stats = guard(reference.statistics(x.cpu(), 64).float(), device)
    f = folded(64, 48, torch.float16, device)
    for activation in ACTIVATIONS:
        out = layernorm_linear(
            x, stats, *f, eps=EPS, activation=activation, out_dtype=torch.float32, config=SMALL
        )
        assert out.dtype == torch.float32
        assert error(x, f, out, activation) < 1e-5


def test_first_token_of_each_image(device: torch.device) -> None:
    torch.manual_seed(6)
    tokens = guard(torch.randn(9, 7, 64).half(), device)
    stats = guard(reference.statistics(tokens.cpu().flatten(0, 1), 32).float().view(9, 7, 2, 2), device)
    f = folded(64, 48, torch.float16, device)
    out = layernorm_linear(tokens[:, 0], stats[:, 0], *f, eps=EPS, config=SMALL)
    assert error(tokens[:, 0], f, out) < TOLERANCE[torch.float16]
    apart = Guarded((9, 48), torch.float16, device)
    launch(tokens[:, 0], stats[:, 0], *f, apart.tensor, eps=EPS, config=SMALL).run()
    assert torch.equal(apart.tensor, out)
    assert apart.intact()


def test_misaligned_and_transposed_inputs(device: torch.device) -> None:
    torch.manual_seed(7)
    x, f = torch.randn(40, 50).half(), folded(50, 70, torch.float16, device)
    stats = reference.statistics(x, 32).float()
    shifted = (guard(t, device, shift=1) for t in (x, stats, *f))
    out = layernorm_linear(*shifted, eps=EPS, config=SMALL)
    assert error(x, f, out) < TOLERANCE[torch.float16]
    vectors = (torch.stack([v, v], dim=1)[:, 0] for v in (f.colsum, f.bias))
    apart = guard(x.mT, device).mT, guard(stats.mT, device).mT, guard(f.weight.mT, device).mT, *vectors
    assert torch.equal(layernorm_linear(*apart, eps=EPS, config=SMALL), out)


def test_fold_layernorm_is_exact_to_one_rounding() -> None:
    torch.manual_seed(8)
    gain, shift, weight, bias = torch.randn(30), torch.randn(30), torch.randn(30, 20), torch.randn(20)
    x = torch.randn(5, 30)
    wanted = (reference.normalise(x, EPS) * gain + shift) @ weight.double() + bias
    f = fold_layernorm(gain, shift, weight, bias, torch.float32)
    assert relative(reference.normalise(x, EPS) @ f.weight.double() + f.bias, wanted) < 1e-6
    half = fold_layernorm(gain, shift, weight, None, torch.float16)
    assert torch.equal(half.weight, (gain.double()[:, None] * weight.double()).half())
    assert torch.equal(half.colsum, half.weight.double().sum(dim=0).float())
    assert torch.equal(half.bias, (shift.double() @ weight.double()).float())


def test_compiles_and_exports(device: torch.device) -> None:
    class Linear(torch.nn.Module):
        def forward(self, x: Tensor, stats: Tensor) -> Tensor:
            return layernorm_linear(x, stats, *f, activation="gelu", out_dtype=torch.float32, config=SMALL)

    torch.manual_seed(9)
    f = folded(48, 64, torch.float16, device)
    x = torch.randn(40, 48).half()
    inputs = x.to(device), reference.statistics(x, 16).float().to(device)
    expected = Linear()(*inputs)
    rows = torch.export.Dim("rows")
    exported = torch.export.export(Linear(), inputs, dynamic_shapes=({0: rows}, {0: rows}))
    for model in (torch.compile(Linear(), fullgraph=True, backend="eager"), exported.module()):
        assert torch.equal(model(*inputs), expected)
    assert exported.module()(inputs[0][:7], inputs[1][:7]).shape == (7, 64)


def test_operator_is_a_good_citizen(device: torch.device) -> None:
    torch.manual_seed(10)
    f, x = folded(32, 40, torch.float16, device), torch.randn(20, 32).half()
    stats = reference.statistics(x, 16).float().to(device)
    options = (EPS, "gelu", torch.bfloat16, SMALL.as_list())
    torch.library.opcheck(_operator, (x.to(device), stats, *f, *options))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(32)}, "x must have the shape (any, any), not (32,)"),
        ({"x": torch.zeros(20, 32)}, "x must be float16 or bfloat16, not float32"),
        ({"stats": torch.zeros(20, 2)}, "stats must have the shape (20, any, 2), not (20, 2)"),
        ({"stats": torch.zeros(20, 2, 2).half()}, "stats must be float32, not float16"),
        ({"weight": torch.zeros(31, 40).half()}, "weight must have the shape (32, any), not (31, 40)"),
        ({"weight": torch.zeros(32, 40).bfloat16()}, "weight must be float16, not bfloat16"),
        ({"colsum": torch.zeros(41)}, "colsum must have the shape (40), not (41,)"),
        ({"bias": torch.zeros(40).half()}, "bias must be float32, not float16"),
        ({"bias": torch.zeros(40).to("meta")}, "tensors lie on different devices"),
        ({"activation": "mish"}, "unknown activation 'mish' (known: none, gelu, gelu_tanh, quick_gelu"),
    ],
)
def test_unsupported(change: dict[str, Tensor | str], message: str, device: torch.device) -> None:
    f = folded(32, 40, torch.float16, device)
    inputs: dict[str, object] = {
        "x": torch.zeros(20, 32, dtype=torch.float16, device=device),
        "stats": torch.zeros(20, 2, 2, device=device),
        **f._asdict(),
        "activation": "none",
    }
    for name, value in change.items():
        movable = isinstance(value, Tensor) and not value.is_meta
        inputs[name] = value.to(device) if movable else value  # type: ignore[union-attr]
    with pytest.raises(UnsupportedError, match=r"^layernorm_linear: ") as caught:
        layernorm_linear(**inputs, config=SMALL)  # type: ignore[arg-type]
    assert message in str(caught.value)


@pytest.mark.slow
def test_without_gpu_and_interpreter() -> None:
    program = """
import torch
from vitdeploy_kernels.layernorm_linear import layernorm_linear
from vitdeploy_kernels.support import UnsupportedError
x, single = torch.zeros(4, 8).half(), torch.zeros(8)
try:
    layernorm_linear(x, torch.zeros(4, 1, 2), torch.zeros(8, 8).half(), single, single)
except UnsupportedError as error:
    print(error)
"""
    outside = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=outside, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == (
        "layernorm_linear: the kernels need an NVIDIA GPU, and the tensors are on cpu; "
        "TRITON_INTERPRET=1 runs them on the CPU, slowly"
    )
