"""Random problems for every kernel, of the shapes that a model's plan has: for tuning and for benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vitdeploy_kernels import (
    absorbed,
    add_layernorm,
    attention,
    layernorm_attention,
    layernorm_linear,
    linear_residual,
    patch_embed,
    reference,
)
from vitdeploy_kernels.config import Config, Table
from vitdeploy_kernels.launch import Launch, tiles
from vitdeploy_kernels.layernorm_linear import fold_layernorm
from vitdeploy_kernels.planner import multiply
from vitdeploy_kernels.specs import Spec

EPS = 1e-6
TILE = 128
"""Columns of a tile of the row statistics that a problem is given."""

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Worst relative error of a row against float64: twice what the kernels promise at best."""

Run = Callable[[], None]


@dataclass(frozen=True)
class Problem:
    """One set of random inputs of a spec, and the memory for its output.

    Attributes:
        launch: of the fused kernel, writing ``output``.
        output: what is compared.
        expected: the output in float64.
        unfused: what the planner does if the table's route is cuBLASLt, writing ``output`` as well; given
            the table for the kernels it still needs. None where there is no such route.
    """

    launch: Callable[[Config], Launch]
    output: Tensor
    expected: Callable[[], Tensor]
    inputs: tuple[Tensor, ...]
    unfused: Callable[[Table], Run] | None = field(default=None)

    @property
    def size(self) -> int:
        """Bytes of inputs and output."""
        return sum(t.numel() * t.element_size() for t in (*self.inputs, self.output))

    def wrong(self, expected: Tensor) -> str | None:
        """What is wrong with the output: None if every row is as close to ``expected`` as it should be."""
        width = expected.shape[-1]
        actual, wanted = self.output.reshape(-1, width).double(), expected.reshape(-1, width)
        error = (actual - wanted).norm(dim=1) / wanted.norm(dim=1).clamp(min=1e-30)
        worst = float(torch.where(error.isnan(), torch.inf, error).max())
        limit = TOLERANCE[self.output.dtype]
        return None if worst <= limit else f"relative error {worst:.1e}, allowed is {limit:.1e}"


class Random:
    """Seeded random tensors on a device."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self.dtype, self.device = dtype, device
        # Nothing is drawn on the meta device, and it has no generators.
        self._generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)

    def normal(self, *size: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.randn(size, generator=self._generator, device=self.device) * scale
        return drawn.to(dtype or self.dtype)

    def single(self, *size: int) -> Tensor:
        return self.normal(*size, scale=0.1, dtype=torch.float32)

    def pixels(self, *size: int) -> Tensor:
        drawn = torch.randint(0, 256, size, generator=self._generator, device=self.device)
        return drawn.to(torch.uint8)

    def empty(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(size, dtype=dtype or self.dtype, device=self.device)

    def statistics(self, x: Tensor) -> Tensor:
        return reference.statistics(x.reshape(-1, x.shape[-1]), TILE).float().contiguous()


def build(spec: Spec, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Problem:
    """A random problem of this spec."""
    return BUILDERS[spec.kernel](spec, Random(dtype, device, seed))


def _layernorm_linear(spec: Spec, random: Random) -> Problem:
    rows, columns, width = spec.shape
    activation = str(dict(spec.options)["activation"])
    x, out = random.normal(rows, width), random.empty(rows, columns)
    stats = random.statistics(x)
    ones, zeros = torch.ones(width, device=random.device), torch.zeros(width, device=random.device)
    weight, bias = random.normal(width, columns, scale=width**-0.5), random.single(columns)
    folded = fold_layernorm(ones, zeros, weight, bias, random.dtype)

    def launch(config: Config) -> Launch:
        return layernorm_linear.launch(x, stats, *folded, out, eps=EPS, activation=activation, config=config)

    def unfused(table: Table) -> Run:
        normed, rounded = torch.empty_like(x), folded.bias.to(random.dtype)
        norm = add_layernorm.launch(
            x, None, None, None, normed, None, eps=EPS, config=table.config("add_layernorm", (rows, width))
        )

        def run() -> None:
            norm.run()
            multiply(normed, folded.weight, rounded, out, activation)

        return run

    def expected() -> Tensor:
        return reference.layernorm_linear(x, folded.weight, folded.bias, EPS, activation)

    return Problem(launch, out, expected, (x, stats, *folded), unfused)


def _linear_residual(spec: Spec, random: Random) -> Problem:
    rows, columns, depth = spec.shape
    x, weight = random.normal(rows, depth), random.normal(depth, columns, scale=depth**-0.5)
    bias, residual, out = random.single(columns), random.normal(rows, columns), random.empty(rows, columns)

    def launch(config: Config) -> Launch:
        stats = random.empty(rows, tiles(columns, config.block_n), 2, dtype=torch.float32)
        return linear_residual.launch(x, weight, bias, residual, out, stats, config=config)

    def unfused(table: Table) -> Run:
        stream, stats = residual.clone(), random.empty(rows, 1, 2, dtype=torch.float32)
        add = add_layernorm.launch(
            stream, None, bias, out, None, stats,
            eps=EPS, config=table.config("add_layernorm", (rows, columns)),
        )  # fmt: skip

        def run() -> None:
            stream.addmm_(x, weight)  # The first run is right; the others take as long.
            add.run()

        return run

    def expected() -> Tensor:
        return reference.linear_residual(x, weight, bias, residual)

    return Problem(launch, out, expected, (x, weight, bias, residual), unfused)


def _patch_embed(spec: Spec, random: Random) -> Problem:
    rows, columns, depth = spec.shape
    patch, prefix, channels, height, width, nhwc = (
        spec.number(name) for name in ("patch", "prefix", "channels", "height", "width", "nhwc")
    )
    tokens = random.single(prefix + (height // patch) * (width // patch), columns)
    count = rows // len(tokens)
    if nhwc:
        image = random.pixels(count, height, width, channels)
    else:
        image = random.normal(count, channels, height, width).float()
    scale, shift = (1 / 64, 128.0) if nhwc else (1.0, 0.0)
    weight, out = random.normal(depth, columns, scale=depth**-0.5), random.empty(rows, columns)

    def launch(config: Config) -> Launch:
        stats = random.empty(rows, tiles(columns, config.block_n), 2, dtype=torch.float32)
        return patch_embed.launch(
            image, weight, tokens, out, stats, patch=patch, prefix=prefix, scale=scale, config=config
        )

    def expected() -> Tensor:
        return reference.patch_embed(image, weight, tokens, patch, prefix, scale, shift)

    return Problem(launch, out, expected, (image, weight, tokens))


def _head_linear(spec: Spec, random: Random) -> Problem:
    (rows, columns, depth), heads = spec.shape, spec.number("heads")
    x, weight = random.normal(rows, heads, depth), random.normal(heads, depth, columns, scale=depth**-0.5)
    out = random.empty(rows, heads, columns)

    def launch(config: Config) -> Launch:
        return absorbed.launch_head_linear(x, weight, out, config=config)

    return Problem(launch, out, lambda: reference.head_linear(x, weight), (x, weight))


def _add_layernorm(spec: Spec, random: Random) -> Problem:
    rows, width = spec.shape
    x, branch, bias = random.normal(rows, width), random.normal(rows, width), random.single(width)
    total, normed = random.empty(rows, width), random.empty(rows, width)

    def launch(config: Config) -> Launch:
        return add_layernorm.launch(x, branch, bias, total, normed, None, eps=EPS, config=config)

    def expected() -> Tensor:
        return reference.add_layernorm(x, branch, bias, EPS)[1]

    return Problem(launch, normed, expected, (x, branch, bias, total))


def _score_bias(spec: Spec, random: Random) -> Tensor | None:
    """A bias on the scores, its rows a multiple of 8 apart as in :class:`vitdeploy_kernels.vit.Block`."""
    if "biased" not in dict(spec.options):
        return None
    length = spec.shape[1]
    return random.normal(1, spec.number("heads"), length, -(-length // 8) * 8)[..., :length]


def _attention(spec: Spec, random: Random) -> Problem:
    (groups, length, width), heads = spec.shape, spec.number("heads")
    images, bias = groups // heads, _score_bias(spec, random)
    qkv = random.normal(images, length, 3 * heads * width)
    out = random.empty(images, length, heads * width)
    inputs = (qkv,) if bias is None else (qkv, bias)

    def launch(config: Config) -> Launch:
        return attention.launch(qkv, out, heads=heads, scale=width**-0.5, bias=bias, config=config)

    return Problem(launch, out, lambda: reference.attention(qkv, heads, width**-0.5, bias), inputs)


def _layernorm_attention(spec: Spec, random: Random) -> Problem:
    (groups, length, width), heads = spec.shape, spec.number("heads")
    images, scale, mask = groups // heads, (width // heads) ** -0.5, _score_bias(spec, random)
    x, weight = random.normal(images, length, width), random.normal(width, 3 * width, scale=width**-0.5)
    bias, out = random.single(3 * width), random.empty(images, length, width)
    ones, zeros = torch.ones(width, device=random.device), torch.zeros(width, device=random.device)

    def launch(config: Config) -> Launch:
        return layernorm_attention.launch(
            x, weight, bias, out, heads=heads, scale=scale, eps=EPS, mask=mask, config=config
        )

    def unfused(table: Table) -> Run:
        folded = fold_layernorm(ones, zeros, weight, bias, random.dtype)
        qkv = random.empty(images, length, 3 * width)
        rows = images * length
        project = layernorm_linear.launch(
            x.view(rows, width), random.statistics(x), *folded, qkv.view(rows, -1),
            eps=EPS, config=table.config("layernorm_linear", (rows, 3 * width, width)),
        )  # fmt: skip
        config = table.config("attention", (groups, length, width // heads))
        attend = attention.launch(qkv, out, heads=heads, scale=scale, bias=mask, config=config)

        def run() -> None:
            project.run()
            attend.run()

        return run

    def expected() -> Tensor:
        return reference.layernorm_attention(x, weight, bias, heads, scale, EPS, mask)

    inputs = (x, weight, bias) if mask is None else (x, weight, bias, mask)
    return Problem(launch, out, expected, inputs, unfused)


def _absorbed_attention(spec: Spec, random: Random) -> Problem:
    (images, length, width), rows = spec.shape, spec.number("rows")
    x, queries = random.normal(images, length, width), random.normal(images, rows, width, scale=width**-0.5)
    stats, out = random.statistics(x), random.empty(images, rows, width)

    def launch(config: Config) -> Launch:
        return absorbed.launch_absorbed_attention(queries, x, stats, out, scale=1.0, eps=EPS, config=config)

    def expected() -> Tensor:
        return reference.absorbed_attention(queries, x, 1.0, EPS)

    return Problem(launch, out, expected, (queries, x, stats))


BUILDERS: Mapping[str, Callable[[Spec, Random], Problem]] = {
    "layernorm_linear": _layernorm_linear,
    "linear_residual": _linear_residual,
    "patch_embed": _patch_embed,
    "head_linear": _head_linear,
    "add_layernorm": _add_layernorm,
    "attention": _attention,
    "layernorm_attention": _layernorm_attention,
    "absorbed_attention": _absorbed_attention,
}
"""How the problems of each kernel are built."""
