"""A library's model as a module: built, given weights of a file or random ones, and made for a size."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from vitdeploy.checkpoint.families.base import Foreign, check_values, refuse_misfit, shape_text, sole_head
from vitdeploy.config import Preprocess, Size
from vitdeploy.errors import UsageError

_NOISE = 0.02
"""Deviation of what is added to random weights: libraries begin the last norm of a branch and layer scales
with zeros, behind which nothing of the branch would show in the output."""
_COUNTER = "num_batches_tracked"
"""Of BatchNorm in training; inference has no use for it."""


class Library(ABC):
    """A library with models under names of its own."""

    name: str
    """What stands before the colon; the module to import, too."""

    @abstractmethod
    def build(
        self, name: str, *, trained: bool, classes: int | None = None, cache_dir: Path | str | None = None
    ) -> nn.Module:
        """Return a model, with the weights that the library downloads or with random ones.

        Args:
            classes: of its head; the model's own when None.

        Raises:
            MissingDependency: the library is not installed.
            CheckpointError: it does not know the model, or cannot get its weights.
        """

    @abstractmethod
    def described(self, name: str, module: nn.Module, *, trained: bool) -> Foreign:
        """The model as a family's checkpoint.

        Args:
            trained: whether its weights are those that the library's labels are about.

        Raises:
            ArchitectureError: no family reads what the library builds.
        """

    @abstractmethod
    def preprocess(self, name: str, module: nn.Module) -> Preprocess:
        """How images become what the model reads, at its own size.

        Raises:
            CheckpointError: the library says something of it that is not known here.
        """

    @abstractmethod
    def labels(self, name: str, module: nn.Module) -> tuple[str, ...] | None:
        """The classes that trained weights are about; None where the library does not name them."""

    @abstractmethod
    def classifier(self, module: nn.Module) -> str | None:
        """The name of the layer that gives the logits; None where there is none, or none alone."""

    def is_of_one_size(self, module: nn.Module) -> bool:
        """Whether a model is made for one image size; others take what comes."""
        return False

    def resize(self, module: nn.Module, size: Size) -> None:
        """Make a model of one size for another."""
        raise NotImplementedError


def randomised(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """What ``make`` builds, with random weights that depend on ``seed`` alone, none of them constant."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        module = make()
        statistics = (b for name, b in module.named_buffers() if name.endswith(("_mean", "_var")))
        for tensor in (*module.parameters(), *statistics):
            # Clamped, so that no variance is negative.
            tensor.add_((_NOISE * torch.randn_like(tensor)).clamp_(-4 * _NOISE, 4 * _NOISE))
    return module


def with_weights(
    library: Library, name: str, module: nn.Module, foreign: Foreign
) -> tuple[nn.Module, tuple[str, ...]]:
    """The model with a file's weights, built anew where the file has another number of classes; and notes.

    Raises:
        CheckpointError: the tensors do not fit, or are not finite; one error lists them all.
    """
    foreign, notes = _inside(foreign, module)
    state = dict(foreign.state)
    if head := library.classifier(module):
        layer = sole_head(state, head)
        if layer not in (None, head):
            notes += (f"the head is the linear layer {layer!r}",)
            state = {
                n.replace(f"{layer}.", f"{head}.", 1) if n.startswith(f"{layer}.") else n: t
                for n, t in state.items()
            }
        weight, own = state.get(f"{head}.weight"), module.state_dict().get(f"{head}.weight")
        if weight is not None and own is not None and weight.ndim and len(weight) != len(own):
            module = library.build(name, trained=False, classes=len(weight))
    expected = module.state_dict()
    missing = [n for n in expected if n not in state and not n.endswith(_COUNTER)]
    wrong = {
        n: f"is {shape_text(state[n].shape)}, must be {shape_text(tensor.shape)}"
        for n, tensor in expected.items()
        if n in state and state[n].shape != tensor.shape
    }
    refuse_misfit(
        f"{foreign.source} does not fit {library.name}:{name}",
        missing,
        [n for n in state if n not in expected],
        wrong,
        f"name the model of {library.name} that the file is of",
    )
    check_values({n: t for n, t in state.items() if expected[n].is_floating_point()}, foreign.source)
    module.load_state_dict(state)
    return module, notes


def _inside(foreign: Foreign, module: nn.Module) -> tuple[Foreign, tuple[str, ...]]:
    """The tensors below the prefix that most of the module's names have in the file; and notes."""
    expected, prefixes = module.state_dict().keys(), Counter[str]()
    for name in foreign.state:
        parts = name.split(".")
        for count in range(len(parts)):
            if ".".join(parts[count:]) in expected:
                prefixes[".".join((*parts[:count], ""))] += 1
    # Of equals the first: state dicts keep the order of their files.
    prefix = prefixes.most_common(1)[0][0] if prefixes else ""
    state = {n.removeprefix(prefix): t for n, t in foreign.state.items() if n.startswith(prefix)}
    if not prefix:
        return foreign, ()
    left = len(foreign.state) - len(state)
    note = f"weights taken from names that begin with {prefix!r}; {left} others left out"
    return replace(foreign, state=state), (
        note if left else f"the prefix {prefix!r} of every name was dropped",
    )


def resized(library: Library, name: str, module: nn.Module, size: Size) -> None:
    """Make a model for an image size, where it is of one.

    Raises:
        UsageError: it cannot be made for it.
    """
    if not library.is_of_one_size(module):
        return
    try:
        library.resize(module, size)
    except Exception as error:  # whatever the library says: an assertion, a division that is not even
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"{library.name}:{name} cannot be made for {size[0]}x{size[1]} pixels: {reason}",
            hint="leave --image-size out, or choose one that its patches or windows divide",
        ) from error
