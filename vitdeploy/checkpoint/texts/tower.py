"""A text tower as its file has it: how it is described, looked for, checked and taken over."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from vitdeploy.checkpoint.families.base import (
    Foreign,
    Layout,
    check_values,
    filled,
    find_tensor,
    shape_text,
    template_of,
)
from vitdeploy.checkpoint.refusals import CORRECT, some
from vitdeploy.checkpoint.texts.tokenizer import Clean
from vitdeploy.errors import CheckpointError, ConfigError
from vitdeploy.model.text import TextConfig, TextTower, build_text_tower, text_shapes


@dataclass(frozen=True)
class TextReading:
    """What a naming understood of a text tower."""

    config: TextConfig
    layout: Layout
    """Our parameter names to theirs."""
    names: str
    """A pattern of all names of the tower; one of them that is not in the layout is unexpected."""
    ignored: str
    """A pattern of those that are not needed."""
    tokenizer: str
    """The ``tokenizer_class`` that is meant where no file states one."""
    clean: Clean | None = None
    """What becomes of a text before its tokenizer, where the tower's own description says it."""


@dataclass(frozen=True)
class TextNaming:
    """One way to name a text tower's tensors."""

    claims: Callable[[Foreign], bool]
    described_by: str
    """The file that describes it."""
    key: str
    """What it is known by."""
    read: Callable[[Foreign], TextReading]


def read_text_tower(naming: TextNaming, foreign: Foreign) -> tuple[TextReading, TextTower]:
    """The tower with its weights, as the file has them.

    Raises:
        CheckpointError: it is not as its description says, or there is none.
    """
    source, described_by = foreign.source, naming.described_by
    if naming.key not in (foreign.config or {}):
        raise CheckpointError(
            f"{source}: its text tower needs the {described_by} that belongs beside the weights",
            hint="keep it in its folder",
        )
    try:
        reading = naming.read(foreign)
        return reading, build_text_tower(reading.config, _tensors(reading, foreign, described_by))
    except ConfigError as error:  # the checkpoint's own numbers, not the user's
        message = f"{source}: {described_by}: of the text tower, {error.message}"
        raise CheckpointError(message, hint=error.hint or CORRECT) from error


def logit_scale_and_bias(state: Mapping[str, Tensor], source: str) -> tuple[float | None, float | None]:
    """The logarithm of what similarities are multiplied by, and what is added; None where there is none.

    Raises:
        CheckpointError: one of them is no number.
    """
    found: list[float | None] = []
    for name in ("logit_scale", "logit_bias"):
        tensor = state.get(name)
        if tensor is not None and (tensor.numel() != 1 or not tensor.isfinite().all()):
            raise CheckpointError(f"{source}: {name} is not one finite number", hint=CORRECT)
        found.append(None if tensor is None else float(tensor.double()))
    return found[0], found[1]


def _tensors(reading: TextReading, foreign: Foreign, described_by: str) -> dict[str, Tensor]:
    """Every parameter of the tower.

    Raises:
        CheckpointError: some are missing, of another shape, left over, or no usable weights.
    """
    config, layout = reading.config, reading.layout
    what = f"{foreign.source}: its text tower is not as {described_by} says"
    if config.depth > len(foreign.state):  # seen before it costs memory
        raise CheckpointError(f"{what}: {config.depth} blocks of {len(foreign.state)} tensors", hint=CORRECT)
    state: dict[str, Tensor] = {}
    problems: list[str] = []
    used: dict[str, Tensor] = {}
    for ours, shape in text_shapes(config).items():
        template, numbers = template_of(ours)
        theirs = filled(layout[template].name, numbers)
        tensor = find_tensor(layout, foreign.state, ours)
        if tensor is None:
            problems.append(f"{theirs} is missing")
        elif tuple(tensor.shape) != shape:
            problems.append(f"{theirs} is {shape_text(tensor.shape)}, must be {shape_text(shape)}")
        else:
            state[ours], used[theirs] = tensor, foreign.state[theirs]
    known = re.compile(reading.ignored)
    rest = (name for name in foreign.state if name not in used and re.fullmatch(reading.names, name))
    problems += [] if problems else [f"{name} is unexpected" for name in rest if not known.fullmatch(name)]
    if problems:
        raise CheckpointError(f"{what}: {some(problems, 2)}", hint=CORRECT)
    check_values(used, foreign.source)
    return state
