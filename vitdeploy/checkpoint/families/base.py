"""What the families share: how a foreign checkpoint is described, renamed, checked and taken over.

A family reads a foreign checkpoint into a ``Reading``: a configuration, and for each of our parameters the
``Source`` it comes from. ``take_over`` does the rest, the same for all: find, reshape, check.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from vitdeploy.checkpoint.families.positions import PositionRule
from vitdeploy.checkpoint.refusals import CORRECT, OTHER_MODEL, looks_like, shown, some
from vitdeploy.config import ModelConfig, Preprocess, Scores, Size, ViTConfig
from vitdeploy.errors import CheckpointError
from vitdeploy.model.registry import expected_shapes


@dataclass(frozen=True)
class Foreign:
    """A checkpoint as its files have it."""

    source: str
    """What the user called it; errors name it."""
    state: Mapping[str, Tensor]
    config: Mapping[str, object] | None = None
    """``config.json``, where there is one."""
    processor: Mapping[str, object] | None = None
    """``preprocessor_config.json``, where there is one."""
    wanted: Size | None = None
    """The image size that the user asks for: it settles the shape of a position table that no file states."""
    heads: int | None = None
    """The heads that the user states."""
    folder: Path | None = None
    """Where its files lie; None where there are none."""


_MOST = 400
"""Characters of a refusal and its hint; of names, as many are told as fit."""

Pick = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Source:
    """Where one of our parameters lies: a foreign name, and what to take of it.

    ``{i}`` in a name is the number of the block; where blocks lie in stages, ``{i}`` is the stage and ``{j}``
    the block in it: ``layers.{i}.blocks.{j}.norm1.weight``.
    """

    name: str
    pick: Pick = lambda tensor: tensor


Layout = Mapping[str, Source]
"""Our parameter names, with ``{i}`` and ``{j}`` for the numbers in them, to their sources."""


@dataclass(frozen=True)
class Reading:
    """What a family understood of a foreign checkpoint."""

    config: ModelConfig
    """At the checkpoint's own resolution, that of its position table."""
    layout: Layout
    state: Mapping[str, Tensor]
    """The foreign tensors under the names that ``layout`` uses."""
    preprocess: Callable[[Size | None], Preprocess]
    """Preprocessing for a network input of this size; None is the size it is configured for."""
    ignored: Mapping[str, str | None] = field(default_factory=dict)
    """Patterns of names that are not needed for inference, with the note to give (None: nothing to say)."""
    labels: tuple[str, ...] | None = None
    scores: Scores | None = None
    """What the checkpoint says that its logits mean; None where it says nothing."""
    notes: tuple[str, ...] = ()
    assumed: Mapping[str, str | None] = field(default_factory=dict)
    """Which of ``preprocess``, ``heads`` and ``activation`` no file states, with the note to give."""
    default_size: Size | None = None
    """The resolution to build for when the user names none; None is the checkpoint's own."""
    originals: Mapping[str, str] = field(default_factory=dict)
    """Names of ``state`` to those in the file, where they differ."""
    spell: Callable[[str], str] = str
    """How the file would write the name of a tensor it lacks."""

    def in_file(self, name: str) -> str:
        return self.originals.get(name, name) if name in self.state else self.spell(name)


@dataclass(frozen=True)
class Family:
    """One foreign naming and how to read it."""

    name: str
    claims: Callable[[Foreign], bool]
    read: Callable[[Foreign, ViTConfig | None], Reading]
    """The second argument is the variant named beside the file; it settles what the file leaves open."""
    positions: PositionRule


# --- what to take of a foreign tensor ------------------------------------------------------------------


def flat(dimensions: int) -> Pick:
    """Drop leading dimensions of length 1: (1, 1, D) to (D), or (1, R, D) to (R, D)."""

    def pick(tensor: Tensor) -> Tensor:
        while tensor.ndim > dimensions and tensor.shape[0] == 1:
            tensor = tensor[0]
        return tensor

    return pick


def part(index: int, of: int) -> Pick:
    """One of several that a tensor has one above the other, as key and value in (2D, ...)."""

    def pick(tensor: Tensor) -> Tensor:
        if not tensor.ndim or tensor.shape[0] % of:
            return tensor
        rows = tensor.shape[0] // of
        return tensor[index * rows : (index + 1) * rows]

    return pick


def third(index: int) -> Pick:
    """One of query, key, value out of a merged (3D, ...) tensor."""
    return part(index, of=3)


def linear(ours: str, theirs: str) -> dict[str, Source]:
    """The weight and bias of a layer that both sides store alike."""
    return {f"{ours}.{leaf}": Source(f"{theirs}.{leaf}") for leaf in ("weight", "bias")}


def rename_tensors(
    state: Mapping[str, Tensor], to: Callable[[str], str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors under other names, and those names' originals."""
    originals = {to(name): name for name in state}
    return {name: state[original] for name, original in originals.items()}, originals


def join_halves(state: Mapping[str, Tensor], halves: tuple[str, str], joined: str) -> dict[str, Tensor]:
    """Put two layers together: SwiGLU's gate and what it gates are one ``fc1`` here, the gate first.

    Args:
        halves: parts of names, the gate's first.
        joined: what stands there instead.
    """
    first, second = halves
    result = dict(state)
    for name in (name for name in state if first in name):
        other = name.replace(first, second)
        gate, up = state[name], state.get(other)
        if up is not None and gate.shape == up.shape != ():
            del result[name], result[other]
            result[name.replace(first, joined)] = torch.cat([gate, up])
    return result


def sole_head(state: Mapping[str, Tensor], root: str) -> str | None:
    """The one linear layer under ``root``, as people replace it: ``heads``, ``heads.0``, ``heads.head.1``."""
    layers = {name.rpartition(".")[0] for name in state if name.startswith(f"{root}.")}
    weight = state.get(f"{next(iter(layers))}.weight") if len(layers) == 1 else None
    return layers.pop() if weight is not None and weight.ndim == 2 else None


def merged_qkv(weight: str, bias: str, ours: str = "blocks.{i}.attn") -> dict[str, Source]:
    """Query, key and value of a block, stored as one (3D, D) layer."""
    parts = {f"{ours}.{name}": third(index) for index, name in enumerate("qkv")}
    weights = {f"{ours}.weight": Source(weight, pick) for ours, pick in parts.items()}
    return weights | {f"{ours}.bias": Source(bias, pick) for ours, pick in parts.items()}


# --- reading a foreign config.json ----------------------------------------------------------------------


def config_number(config: Mapping[str, object], key: str, default: float) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise CheckpointError(f"config.json: {key} must be a number, not {shown(value)}", hint=CORRECT)
    return float(value)


def config_integer(config: Mapping[str, object], key: str, default: int) -> int:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise CheckpointError(f"config.json: {key} must be a whole number, not {shown(value)}", hint=CORRECT)
    return value


def height_and_width(value: object, key: str) -> Size:
    """A length for both sides, or [height, width]."""
    sides = value if isinstance(value, (list, tuple)) else (value, value)
    if len(sides) != 2 or not all(type(side) is int for side in sides):
        raise CheckpointError(
            f"config.json: {key} must be one or two whole numbers, not {shown(value)}", hint=CORRECT
        )
    return sides[0], sides[1]


def config_object(config: Mapping[str, object] | None, key: str) -> Mapping[str, object]:
    value = {} if config is None or config.get(key) is None else config[key]
    if not isinstance(value, Mapping):
        raise CheckpointError(f"config.json: {key} must be an object, not {shown(value)}", hint=CORRECT)
    return value


def refuse_indivisible(who: str, source: str, size: Size, patch: int) -> None:
    """Refuse a model that sees the upper left part of its images only: ours see all that they are given.

    Raises:
        CheckpointError: the patch does not divide the size.
    """
    rows, columns = (side - side % patch for side in size)
    if (rows, columns) != size:
        height, width = size
        raise CheckpointError(
            f"{source}: {who} feeds {height}x{width} pixels, of which patches of {patch} use "
            f"{rows}x{columns}",
            hint=f"--image-size {rows}x{columns} resizes images to what is used; the scores change a little",
        )


# --- reading the tensors ---------------------------------------------------------------------------------


_PLACES = "ij"
"""What stands in a template for the first number of a name, and for the second."""


_NUMBER = r"(\d{1,4})"
"""Of a block or a stage in a name; there are no more of them."""


def template_of(ours: str) -> tuple[str, tuple[str, ...]]:
    """``layers.1.blocks.3.norm1.weight`` to ``layers.{i}.blocks.{j}.norm1.weight`` and ``("1", "3")``."""
    numbers: list[str] = []

    def place(match: re.Match[str]) -> str:
        numbers.append(match[0])
        return f"{{{_PLACES[len(numbers) - 1]}}}"

    template = re.sub(r"(?<=\.)\d+(?=\.)", place, ours, count=len(_PLACES))
    return template, tuple(numbers)


def filled(template: str, numbers: Iterable[str]) -> str:
    """The name in which these numbers stand for ``{i}`` and ``{j}``."""
    return template.format(**dict(zip(_PLACES, numbers, strict=False)))


def find_tensor(layout: Layout, state: Mapping[str, Tensor], ours: str) -> Tensor | None:
    """The tensor that becomes our parameter ``ours``, or None where the checkpoint lacks it."""
    template, numbers = template_of(ours)
    source = layout.get(template)
    tensor = state.get(filled(source.name, numbers)) if source else None
    return source.pick(tensor) if source and tensor is not None else None


def count_blocks(layout: Layout, names: Iterable[str]) -> int:
    """One more than the highest number of a block that lies in no stage."""
    return max((i for i, *rest in _numbers(layout, names, "{i}") if not rest), default=-1) + 1


def count_stages(layout: Layout, names: Iterable[str]) -> tuple[int, ...]:
    """The blocks of each stage, one more than the highest number of both that any name carries."""
    numbers = _numbers(layout, names, "{j}")
    stages = max((i for i, _ in numbers), default=-1) + 1
    return tuple(max((j for i, j in numbers if i == stage), default=-1) + 1 for stage in range(stages))


def _numbers(layout: Layout, names: Iterable[str], place: str) -> set[tuple[int, ...]]:
    """The numbers in those foreign names whose template has ``place``."""
    sources = sorted({source.name for source in layout.values() if place in source.name})
    patterns = [re.escape(name).replace(r"\{i\}", _NUMBER).replace(r"\{j\}", _NUMBER) for name in sources]
    pattern = re.compile("|".join(patterns) or r"(?!)")
    matches = (match for name in names if (match := pattern.fullmatch(name)))
    return {tuple(int(number) for number in match.groups() if number is not None) for match in matches}


def take_over(reading: Reading, family: str, source: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return every parameter of ``reading.config`` under our names, in the file's dtype, and notes.

    Raises:
        CheckpointError: tensors are missing, unexpected or of the wrong shape (one error lists them all), of
            a dtype that holds no weights, or not finite.
    """
    state: dict[str, Tensor] = {}
    used: set[str] = set()
    missing: dict[str, None] = {}
    wrong: dict[str, str] = {}
    for ours, shape in expected_of(reading.config, len(reading.state), source).items():
        template, numbers = template_of(ours)
        if template not in reading.layout:
            raise CheckpointError(f"{source}: {family} checkpoints have no {ours}", hint=OTHER_MODEL)
        theirs = filled(reading.layout[template].name, numbers)
        used.add(theirs)
        tensor = find_tensor(reading.layout, reading.state, ours)
        if tensor is None:
            missing[theirs] = None
        elif tuple(tensor.shape) == shape:
            state[ours] = tensor
        else:
            have = tuple(reading.state[theirs].shape)
            got = "" if have == tuple(tensor.shape) else f", giving {shape_text(tensor.shape)}"
            wrong.setdefault(theirs, f"is {shape_text(have)}{got}, must be {shape_text(shape)}")
    notes, unexpected = _left_over(reading, used)
    what = f"{source} does not fit a {family} model"
    refuse_misfit(what, list(missing), unexpected, wrong, OTHER_MODEL, reading.in_file)
    check_values({reading.in_file(name): reading.state[name] for name in sorted(used)}, source)
    return {ours: _unshared(tensor) for ours, tensor in state.items()}, notes


def expected_of(config: ModelConfig, tensors: int, source: str) -> dict[str, tuple[int, ...]]:
    """The parameters to look for, with their shapes.

    Raises:
        CheckpointError: the configuration is out of all proportion to a file of so many tensors; this is seen
            before it costs memory.
    """
    if config.depth > tensors:
        raise CheckpointError(
            f"{source}: the configuration has {config.depth} blocks, the file only {tensors} tensors",
            hint=CORRECT,
        )
    try:
        return expected_shapes(config)
    except RuntimeError as error:  # torch's word for sizes that overflow
        raise CheckpointError(
            f"{source}: the configuration's sizes are impossibly large", hint=CORRECT
        ) from error


def _left_over(reading: Reading, used: set[str]) -> tuple[tuple[str, ...], list[str]]:
    """Notes about ignored tensors, and the names that nothing accounts for."""
    notes: dict[str, None] = {}
    unexpected = []
    for name in reading.state:
        if name in used:
            continue
        pattern = next((p for p in reading.ignored if re.fullmatch(p, name)), None)
        if pattern is None:
            unexpected.append(name)
        elif note := reading.ignored[pattern]:
            notes[note] = None
    return tuple(notes), unexpected


def refuse_misfit(
    what: str,
    missing: Sequence[str],
    unexpected: Sequence[str],
    wrong: Mapping[str, str],
    hint: str,
    in_file: Callable[[str], str] = str,
) -> None:
    """Raise one CheckpointError for all tensors that do not fit, where there are any.

    Args:
        what: what does not fit, with which the message begins.
        wrong: names, and what is wrong with each one's shape.
        in_file: how the file spells a name.
    """
    if not (missing or unexpected or wrong):
        return
    lack, extra = (_grouped([in_file(name) for name in names]) for names in (missing, unexpected))
    details: dict[str, list[str]] = {}
    for name, problem in wrong.items():
        details.setdefault(problem, []).append(in_file(name))
    lines = [f"{some(_grouped(names), 2)} {problem}" for problem, names in details.items()]
    similar = (difflib.get_close_matches(name, extra, n=1, cutoff=0.8) for name in lack)
    close = next((f"; did you mean {match[0]!r}?" for match in similar if match), "")
    guess = looks_like(unexpected) or close
    counts = (
        (len(missing), "missing", lack),
        (len(unexpected), "unexpected", extra),
        (len(wrong), "of the wrong shape", lines),
    )
    room = max(200, _MOST - len(what) - len(hint))
    for most in (len(lack) + len(extra) + len(lines), 8, 4, 2, 1):
        problems = [f"{count} {kind} ({some(names, most)})" for count, kind, names in counts if count]
        text = f": {', '.join(problems)}{guess}"
        if len(text) <= room:
            break
    raise CheckpointError(f"{what}{text}", hint=hint)


def _grouped(names: Iterable[str]) -> list[str]:
    """Join names that differ in one number only: ``blocks.{0,1,2}.norm1.weight``; then in another one."""
    parts = [re.split(r"(?<=[._])(\d+)(?=[./])", name) for name in names]  # every second part is a number
    for place in range(max(map(len, parts), default=0) - 2, 0, -2):
        groups: dict[tuple[int, str], list[list[str]]] = {}
        for index, name in enumerate(parts):
            rest = "\0".join((*name[:place], "", *name[place + 1 :]))
            groups.setdefault((len(name), rest) if len(name) > place else (-index, ""), []).append(name)
        parts = [_joined(group, place) for group in groups.values()]
    return ["".join(name) for name in parts]


def _joined(names: Sequence[list[str]], place: int) -> list[str]:
    """One name for names that differ in their part ``place`` only."""
    first = names[0]
    if len(names) == 1:
        return first
    numbers = [name[place] for name in names]
    ends = int(numbers[0]), int(numbers[-1])
    run = len(numbers) > 3 and [int(number) for number in numbers] == list(range(ends[0], ends[1] + 1))
    listed = "{}..{}".format(*ends) if run else ",".join(numbers)
    return [*first[:place], "{" + listed + "}", *first[place + 1 :]]


def shape_text(shape: Iterable[int]) -> str:
    """A tensor's shape, as errors have it."""
    return "x".join(map(str, shape)) or "a scalar"


def check_values(tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse tensors that hold no usable weights: integers, NaN, infinities."""
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    dtypes = {
        name: str(t.dtype).removeprefix("torch.") for name, t in tensors.items() if t.dtype not in floats
    }
    odd = [f"{name} ({dtype})" for name, dtype in dtypes.items()]
    if odd:
        raise CheckpointError(
            f"{source}: weights must be float16, bfloat16, float32 or float64: {some(odd, 3)}",
            hint="quantised checkpoints cannot be exported; start from the original",
        )
    bad = []
    for name, tensor in tensors.items():
        # NaN spreads to both ends of aminmax, which is 20 times as fast as isfinite of everything.
        if not all(end.isfinite() for end in torch.aminmax(tensor)):
            nan, infinite = int(torch.isnan(tensor).sum()), int(torch.isinf(tensor).sum())
            counts = [f"{count} {kind}" for count, kind in ((nan, "NaN"), (infinite, "infinite")) if count]
            bad.append(f"{name} ({' and '.join(counts)} of {tensor.numel()})")
    if bad:
        raise CheckpointError(
            f"{source}: {len(bad)} tensor(s) with values that are not finite: {some(bad, 3)}",
            hint="the training diverged or the file is damaged; take an earlier checkpoint",
        )


def _unshared(tensor: Tensor) -> Tensor:
    """The tensor in storage of its own: no slice of a merged one, contiguous."""
    shared = tensor.untyped_storage().nbytes() != tensor.nbytes
    return tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()
