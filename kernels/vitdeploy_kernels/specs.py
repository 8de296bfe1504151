"""Which kernel at which shape: what tables are looked up by, what is tuned, and what it must compute."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitdeploy_kernels.config import Table
from vitdeploy_kernels.launch import Launch
from vitdeploy_kernels.plans import Shape, launches


@dataclass(frozen=True)
class Spec:
    """Which kernel, and the numbers it is launched with.

    Attributes:
        kernel: its name in the tables.
        shape: its shape in the tables.
        options: what else it is given, by name: numbers, and the name of an activation.
    """

    kernel: str
    shape: tuple[int, ...]
    options: tuple[tuple[str, int | str], ...] = ()

    def number(self, name: str) -> int:
        return int(dict(self.options)[name])

    def __str__(self) -> str:
        return f"{self.kernel} {'x'.join(map(str, self.shape))}"


def spec_of(launch: Launch) -> Spec:
    """The spec of a launch of a plan."""
    name = launch.name.removesuffix("_kernel")
    given, fixed = launch.arguments, launch.constants

    def size(parameter: str) -> int:
        value = fixed.get(parameter, given.get(parameter))
        assert isinstance(value, int)
        return value

    def lengths(parameter: str) -> torch.Size:
        tensor = given[parameter]
        assert isinstance(tensor, Tensor)
        return tensor.shape

    if name == "layernorm_linear":
        shape = (size("rows"), size("COLUMNS"), size("WIDTH"))
        return Spec(name, shape, (("activation", str(fixed["ACTIVATION"])),))
    if name == "linear_residual":
        return Spec(name, (size("rows"), size("COLUMNS"), size("DEPTH")))
    if name == "head_linear":
        return Spec(name, (size("rows"), size("COLUMNS"), size("DEPTH")), (("heads", size("HEADS")),))
    if name == "add_layernorm":
        return Spec(name, (size("rows"), size("WIDTH")))
    if name == "patch_embed":
        names = ("NHWC", "PATCH", "CHANNELS", "HEIGHT", "WIDTH", "PREFIX")
        options = tuple((each.lower(), size(each)) for each in names)
        return Spec(name, (size("rows"), size("COLUMNS"), lengths("weight_ptr")[0]), options)
    if name == "attention":
        images, tokens, _ = lengths("qkv_ptr")
        options = _attention_options(size("HEADS"), "bias_ptr" in given)
        return Spec(name, (images * size("HEADS"), tokens, size("WIDTH")), options)
    if name == "layernorm_attention":
        images, tokens, width = lengths("x_ptr")
        options = _attention_options(size("HEADS"), "mask_ptr" in given)
        return Spec(name, (images * size("HEADS"), tokens, width), options)
    assert name == "absorbed_attention"
    return Spec(name, tuple(lengths("x_ptr")), (("rows", size("ROWS")),))


def _attention_options(heads: int, biased: bool) -> tuple[tuple[str, int], ...]:
    return (("heads", heads), ("biased", 1)) if biased else (("heads", heads),)


def flops(spec: Spec) -> int:
    """Floating-point operations of the products; a kernel without products has none."""
    if spec.kernel == "add_layernorm":
        return 0
    rows, columns, depth = spec.shape
    if spec.kernel == "head_linear":
        return 2 * spec.number("heads") * rows * columns * depth
    if spec.kernel == "attention":
        groups, tokens, head_width = spec.shape
        return 4 * groups * tokens**2 * head_width
    if spec.kernel == "layernorm_attention":
        groups, tokens, width = spec.shape
        images = groups // spec.number("heads")
        return 6 * images * tokens * width**2 + 4 * images * tokens**2 * width
    if spec.kernel == "absorbed_attention":
        images, tokens, width = spec.shape
        return 4 * images * spec.number("rows") * tokens * width
    return 2 * rows * columns * depth


def size(launch: Launch) -> int:
    """Bytes that a launch must move at least: each of its tensors once."""
    tensors = [value for value in launch.arguments.values() if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def model_specs(shape: Shape, dtype: torch.dtype, batch: int, table: Table) -> dict[Spec, int]:
    """The specs of a forward pass, and how often each is launched."""
    counts: dict[Spec, int] = {}
    for _, launch in launches(shape, dtype, batch, table):
        spec = spec_of(launch)
        counts[spec] = counts.get(spec, 0) + 1
    return counts
