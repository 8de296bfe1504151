"""Open a model, whatever the user calls it, as our configuration and our tensors.

A name is, in the order it is tried: ``digits``, a named variant (``vit_base_patch16_224``, ``B/16``),
``timm:<name>`` or ``torchvision:<name>``, a Python entry ``module:function``, a folder or file, an id on the
Hugging Face hub. What a library builds and no family reads becomes a module, exported as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vitdeploy.bundle.manifest import FactSource
from vitdeploy.checkpoint import families
from vitdeploy.checkpoint.families import reference
from vitdeploy.checkpoint.families.base import Family, Foreign, Reading, take_over
from vitdeploy.checkpoint.families.image_text import TEXT_LEFT_OUT
from vitdeploy.checkpoint.files import Weights
from vitdeploy.checkpoint.footprint import require_memory
from vitdeploy.checkpoint.libraries import library_of
from vitdeploy.checkpoint.libraries.base import Library, randomised, resized, with_weights
from vitdeploy.checkpoint.places import from_hub, from_path
from vitdeploy.checkpoint.refusals import CORRECT
from vitdeploy.checkpoint.stated import SHAPELESS, Stated
from vitdeploy.checkpoint.texts import tokenizer
from vitdeploy.checkpoint.texts.head import zero_shot_head
from vitdeploy.checkpoint.texts.prompts import ZeroShot
from vitdeploy.config import (
    ModelConfig,
    Output,
    Preprocess,
    Scores,
    Size,
    SwinConfig,
    ViTConfig,
    model_fields,
)
from vitdeploy.data import DIGITS, digits_folder
from vitdeploy.errors import ArchitectureError, CheckpointError, ConfigError, UsageError, did_you_mean
from vitdeploy.images.preprocess import at_size, preset
from vitdeploy.model.registry import expected_shapes
from vitdeploy.model.user_module import input_channels
from vitdeploy.scores import usual_scores
from vitdeploy.variants import DEFAULT_MODEL, decode_variant, find_variant, is_variant, variant_names

_ENTRY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class Resized:
    """What of a checkpoint is different for images of another size."""

    config: ModelConfig
    state: Mapping[str, Tensor]
    """Only the tensors that are: positions, interpolated by the family's own rule from those of the file."""
    preprocess: Preprocess


@dataclass(frozen=True)
class Checkpoint:
    """A model ready for export: configuration, weights, preprocessing, labels, and where they are from."""

    config: ModelConfig
    state: Mapping[str, Tensor]
    """Exactly the names and shapes of ``registry.expected_shapes(config)``; dtypes as in the file. A position
    table that was interpolated is float64, or float32 where its family computes it so; what an adapter was
    merged into is float64."""
    preprocess: Preprocess
    labels: tuple[str, ...] | None
    family: str
    source: str
    scores: Scores = "softmax"
    facts: Mapping[str, FactSource] = field(default_factory=dict)
    """Where labels, preprocessing, scores and what no shape tells are from."""
    notes: tuple[str, ...] = ()
    provenance: Mapping[str, str] = field(default_factory=dict)
    """File names to sha256."""
    seed: int | None = None
    """The seed of random weights; None where the weights are from a file."""
    further: tuple[Resized, ...] = ()
    """The same for other image sizes, as they were asked for."""

    def at(self, resized: Resized) -> Checkpoint:
        """One of ``further`` as a checkpoint of its own, which shares all other tensors."""
        state = {**self.state, **resized.state}
        return replace(self, config=resized.config, state=state, preprocess=resized.preprocess, further=())


@dataclass(frozen=True)
class UserModule:
    """Any module of the user's, or one that a library builds: exported as it is."""

    module: nn.Module
    source: str
    family: str = "user module"
    output: Output = "logits"
    """What it returns."""
    preprocess: Preprocess = field(default_factory=Preprocess)
    labels: tuple[str, ...] | None = None
    scores: Scores | None = None
    """None is what is usual for as many outputs as it has."""
    facts: Mapping[str, FactSource] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    provenance: Mapping[str, str] = field(default_factory=dict)
    """File names to sha256."""
    seed: int | None = None
    """The seed of random weights."""
    further: tuple[Preprocess, ...] = ()
    """The preprocessing for other image sizes, as they were asked for."""


def open_model(
    name: str | None = None,
    *,
    checkpoint: Path | str | None = None,
    image_size: Size | None = None,
    further_sizes: Sequence[Size] = (),
    classes: int | None = None,
    seed: int = 0,
    random: bool = False,
    stated: Stated | None = None,
    zero_shot: ZeroShot | None = None,
    revision: str | None = None,
    cache_dir: Path | str | None = None,
) -> Checkpoint | UserModule:
    """Open a model by its name, or weights from a file.

    Args:
        name: see the module; ``DEFAULT_MODEL`` when neither a name nor a checkpoint is given.
        checkpoint: a file or folder with the weights. A ``name`` beside it is a named variant, which gives
            heads and image size, or ``timm:<name>`` or ``torchvision:<name>``, which gives the library's own
            configuration; the file gives the rest.
        image_size: height and width to build for; position embeddings interpolate by the family's own rule.
        further_sizes: others to build for, beside it; the checkpoint is read once.
        classes: how many classes the model is expected to have; of a variant with random weights, how many it
            gets.
        seed: of random weights, where a named variant comes without a checkpoint, or ``random`` is asked for.
        random: random weights where a library would download trained ones.
        stated: what the user says; it beats what the files say.
        zero_shot: the classes of a head that is made for them.
        revision: a branch, tag or commit of the hub; goes with a hub id.
        cache_dir: where downloads are kept, the library's own folder when omitted.

    A token for the hub is what its library finds: ``HF_TOKEN``, or what ``hf auth login`` has kept.

    Raises:
        UsageError: the name is unknown, or does not go with the other arguments.
        ConfigError: the resolution is not divisible by the patch.
        CheckpointError: the checkpoint cannot be read, or is wrong.
        MissingDependency: the hub's library, timm or torchvision is needed and not installed.
    """
    said, template = stated or Stated(), None
    on_hub = checkpoint is None and name is not None and _is_elsewhere(name)
    if revision is not None and not on_hub:
        what = name or checkpoint or DEFAULT_MODEL
        raise UsageError(
            f"a revision goes with a hub id, not with {what}", hint="-m owner/name --revision REV"
        )
    named = library_of(name)
    if random and (checkpoint is not None or not (named or is_variant(name or DEFAULT_MODEL))):
        raise UsageError(
            f"{checkpoint or name} has weights of its own: they cannot be random",
            hint="--random goes with timm:NAME or torchvision:NAME alone",
        )
    if named is not None:
        drawn = seed if random else None
        sizes = image_size, further_sizes
        return _of_library(*named, checkpoint, *sizes, classes, drawn, said, zero_shot, cache_dir)
    if checkpoint is not None:
        template = None if name is None else _template(name)
        foreign, files = from_path(Path(checkpoint), str(checkpoint))
    elif name is None or is_variant(name):
        variant = name or DEFAULT_MODEL
        untrained = _random(variant, image_size, further_sizes, classes, seed, said)
        return _with_head(untrained, Foreign(variant, {}), zero_shot, said)
    elif name == DIGITS:
        foreign, files = from_path(digits_folder(), DIGITS)
    elif _ENTRY.fullmatch(name) and not Path(name).exists():
        return user_module(_called(name), name, image_size, said, further_sizes)
    elif on_hub:
        foreign, files = from_hub(name, revision, cache_dir, () if zero_shot is None else tokenizer.FILES)
    else:
        foreign, files = from_path(Path(name), name)
    return _convert(foreign, files, template, image_size, further_sizes, classes, said, zero_shot)


def user_module(
    module: nn.Module,
    source: str,
    image_size: Size | None,
    stated: Stated,
    further_sizes: Sequence[Size] = (),
    known: Preprocess | None = None,
    labels: tuple[str, ...] | None = None,
) -> UserModule:
    """A module of the user's, with what the user says of it.

    Args:
        known: its preprocessing, of this size, where a library states it; ``labels`` alike.

    Raises:
        UsageError: what is said does not fit a module that is exported as it is.
    """
    stated.refuse_shapeless(source)
    size = known.size if known else image_size or (224, 224)
    assumed = ("scores",) if known else ("preprocess", "scores")
    facts = stated.facts(assumed, ("preprocess", "scores", *(("labels",) if labels else ())))
    channels = len(stated.mean) if isinstance(stated.mean, Sequence) else input_channels(module, size)
    usual = known or Preprocess(size=size)
    preprocess, notes = stated.prepare(usual, channels)
    if known is None and not any(
        facts.get(name) == "user" for name in ("preprocess", "mean", "std", "resize", "crop")
    ):
        unsaid = (
            "a module of your own says nothing of its preprocessing; assumed (--preprocess says it): "
            f"resize to {size[0]}x{size[1]}, mean and std 0.5"
        )
        notes = (unsaid, *notes)
    return UserModule(
        module,
        source,
        preprocess=preprocess,
        labels=stated.name_classes(None, labels),
        scores=stated.scores,
        facts=facts,
        notes=notes,
        further=tuple(
            stated.prepare_another(at_size(usual, other), preprocess, channels) for other in further_sizes
        ),
    )


def _is_elsewhere(name: str) -> bool:
    """Whether a name is neither one of ours nor of anything on this machine."""
    ours = name == DIGITS or is_variant(name) or library_of(name) or _ENTRY.fullmatch(name)
    return not ours and not Path(name).exists()


def save_folder(checkpoint: Checkpoint, path: Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` that ``open_model`` reads back as they are.

    Raises:
        OSError: the folder cannot be written.
    """
    path.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": reference.MODEL_TYPE,
        "model": model_fields(checkpoint.config),
        "preprocess": dataclasses.asdict(checkpoint.preprocess),
        "labels": checkpoint.labels,
        "scores": checkpoint.scores,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (path / "config.json").write_text(text, encoding="utf-8")
    state = {name: tensor.contiguous() for name, tensor in checkpoint.state.items()}
    save_file(state, path / "model.safetensors")


def _template(name: str) -> ViTConfig | SwinConfig:
    if not is_variant(name):
        raise UsageError(
            f"--checkpoint goes with a named variant, timm:NAME or torchvision:NAME, not {name!r}"
            f"{did_you_mean(name, variant_names())}",
            hint="leave --model out to let the checkpoint say what it is",
        )
    return decode_variant(name)


# --- conversion -----------------------------------------------------------------------------------------


def _convert(
    foreign: Foreign,
    files: Weights,
    template: ViTConfig | SwinConfig | None,
    image_size: Size | None,
    further_sizes: Sequence[Size],
    classes: int | None,
    stated: Stated,
    zero_shot: ZeroShot | None,
) -> Checkpoint:
    foreign = replace(foreign, wanted=image_size, heads=stated.heads)
    family, foreign, dropped = families.recognise(foreign)
    named = template if isinstance(template, ViTConfig) else None
    reading = _read(family, replace(foreign, config=stated.without(foreign.config)), named, stated)
    native = stated.configure(reading.config)
    if template is not None:
        _check_template(foreign.source, native, template)
    if classes is not None and native.classes != classes:
        raise CheckpointError(
            f"{foreign.source} has {native.classes} classes, not {classes}",
            hint="leave the number out, or give the checkpoint that has this head",
        )
    size = image_size or (template.image_size if template else reading.default_size) or native.image_size
    config = native.at_size(size)
    others = [native.at_size(other) for other in further_sizes]
    for one in (config, *others):
        require_memory(one)
    taken, notes = take_over(reading, family.name, foreign.source)
    fitted = [family.positions.fit(taken, native, one.image_size) for one in (config, *others)]
    for one, tensors in zip((config, *others), fitted, strict=True):
        if tensors:
            notes = (*notes, _interpolation_note(reading, one.image_size, family.name))
    state = {**taken, **fitted[0]}
    labels = stated.name_classes(config.classes, reading.labels)
    assumed = {**reading.assumed, **({} if reading.scores else {"scores": None})}
    known = ("preprocess", "scores", *_shapeless(config), *(("labels",) if labels else ()))
    facts = stated.facts(assumed, known)
    if template is not None and "heads" in assumed:
        facts["heads"] = "user"
    guesses = [note for name, note in assumed.items() if note and facts[name] == "default"]
    preprocess, seen = stated.prepare(reading.preprocess(size), config.channels)
    further = []
    for other, tensors in zip(others, fitted[1:], strict=True):
        differing = {name: tensors.get(name, taken[name]) for name in fitted[0].keys() | tensors.keys()}
        spec = stated.prepare_another(reading.preprocess(other.image_size), preprocess, other.channels)
        further.append(Resized(other, differing, spec))
    checkpoint = Checkpoint(
        config=config,
        state=state,
        preprocess=preprocess,
        labels=labels,
        family=family.name,
        source=foreign.source,
        scores=stated.scores or reading.scores or usual_scores(config.classes),
        facts=facts,
        notes=(*files.notes, *dropped, *reading.notes, *guesses, *notes, *seen),
        provenance=files.files,
        further=tuple(further),
    )
    return _with_head(checkpoint, foreign, zero_shot, stated)


def _with_head(
    checkpoint: Checkpoint, foreign: Foreign, zero_shot: ZeroShot | None, stated: Stated
) -> Checkpoint:
    """The checkpoint with the zero-shot head that is asked for."""
    if zero_shot is None:
        return checkpoint
    head = zero_shot_head(zero_shot, checkpoint.config, foreign)
    config: Any = checkpoint.config
    others: list[tuple[Any, Resized]] = [(resized.config, resized) for resized in checkpoint.further]
    facts: dict[str, FactSource] = {**checkpoint.facts, "labels": "user"}
    if stated.scores is None:
        facts["scores"] = head.scores_from
    # It was read, after all.
    read = zero_shot.vectors is None
    notes = [note for note in checkpoint.notes if not (read and note == TEXT_LEFT_OUT)]
    return replace(
        checkpoint,
        config=replace(config, classes=len(head.labels), head_on="embedding"),
        further=tuple(
            replace(resized, config=replace(other, classes=len(head.labels), head_on="embedding"))
            for other, resized in others
        ),
        state={**checkpoint.state, "head.weight": head.weight, "head.bias": head.bias},
        labels=head.labels,
        scores=stated.scores or head.scores,
        facts=facts,
        notes=(*notes, *head.notes),
        provenance={**head.files, **checkpoint.provenance},
    )


def _read(family: Family, foreign: Foreign, template: ViTConfig | None, stated: Stated) -> Reading:
    try:
        return family.read(foreign, template)
    except ConfigError as error:  # the checkpoint's own numbers, not the user's
        raise CheckpointError(f"{foreign.source}: {error.message}", hint=error.hint or CORRECT) from error
    except CheckpointError:
        if stated.preprocess is None or foreign.processor is None:
            raise
        # Settings that the user replaces need not be readable.
        return _read(family, replace(foreign, processor=None), template, stated)


def _shapeless(config: ModelConfig) -> list[str]:
    return [name for name in SHAPELESS if hasattr(config, name)]


def _check_template(source: str, config: ModelConfig, template: ViTConfig | SwinConfig) -> None:
    sizes, marks = _SIZES[template.kind], []
    if isinstance(template, ViTConfig):
        plain = ViTConfig()
        marks = [name for name in _MARKS if bool(getattr(template, name)) != bool(getattr(plain, name))]
    compared: list[tuple[str, object, object]] = [
        *((name, getattr(config, name, None), getattr(template, name)) for name in sizes),
        *((name, bool(getattr(config, name, None)), bool(getattr(template, name))) for name in marks),
        ("stages", _stages(config), _stages(template)),
    ]
    if config.kind != template.kind:
        compared = [("its kind", config.kind, template.kind)]
    differing = [f"{name} {theirs}, not {ours}" for name, theirs, ours in compared if theirs != ours]
    if differing:
        raise CheckpointError(
            f"{source} is of another architecture than the variant named: {'; '.join(differing)}",
            hint="name the variant it is of, or leave --model out",
        )


def _stages(config: ModelConfig) -> tuple[int, ...]:
    """The blocks in each stage of the ResNet before the patches."""
    return config.stem.stages if isinstance(config, ViTConfig) and config.stem else ()


_SIZES: Mapping[str, tuple[str, ...]] = {
    ViTConfig.kind: ("patch_size", "width", "depth", "heads", "mlp_width", "distillation_token"),
    SwinConfig.kind: ("version", "patch_size", "width", "depths", "heads", "windows", "mlp_ratio"),
}
_MARKS = ("pre_norm", "cls_token", "gated_mlp", "rotary", "score_bias", "stem")
"""Where families' variants differ from a plain ViT, whose name may stand beside any family's file."""


def _interpolation_note(reading: Reading, size: Size, family: str) -> str:
    (height, width), (old_height, old_width) = size, reading.config.image_size
    if size == reading.config.image_size:
        return f"positions interpolated at their own {height}x{width} pixels, as {family} does"
    return f"positions interpolated from {old_height}x{old_width} to {height}x{width} pixels as {family} does"


def _random(
    name: str,
    image_size: Size | None,
    further_sizes: Sequence[Size],
    classes: int | None,
    seed: int,
    stated: Stated,
) -> Checkpoint:
    """Random weights of a named variant; for further sizes, positions are interpolated from the first's."""
    if classes is not None and classes < 0:
        raise UsageError(f"classes must be at least 0, not {classes}")
    variant = find_variant(name)
    config = variant.config.at_size(image_size or variant.config.image_size)
    config = config if classes is None else replace(config, classes=classes)
    others = [config.at_size(other) for other in further_sizes]
    for one in (config, *others):
        require_memory(one)
    deployed = stated.configure(config)
    usual = replace(at_size(preset(variant.preset), config.image_size), exif=False)
    preprocess, _ = stated.prepare(usual, config.channels)
    labels = stated.name_classes(config.classes, None)
    state = random_state(config, seed)
    further = []
    for other in others:
        spec = stated.prepare_another(at_size(usual, other.image_size), preprocess, config.channels)
        fitted = reference.FAMILY.positions.fit(state, config, other.image_size)
        further.append(Resized(deployed.at_size(other.image_size), fitted, spec))
    return Checkpoint(
        config=deployed,
        state=state,
        preprocess=preprocess,
        labels=labels,
        family="vitdeploy",
        source=name,
        scores=stated.scores or usual_scores(config.classes),
        facts=stated.facts(("preprocess", "scores"), ("preprocess", "scores")),
        notes=(f"no checkpoint: the weights of {name} are random (seed {seed})",),
        seed=seed,
        further=tuple(further),
    )


def random_state(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Return float32 weights that depend on ``config`` and ``seed`` alone.

    Every parameter is normal with deviation 0.02, clamped to twice that, around 1 for the gains of LayerNorm
    and layer scale, around 0 otherwise: nothing is constant, so that every part shows in the output.
    """
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in expected_shapes(config).items():
        # Not trunc_normal_, which takes 30 times as long.
        tensor = torch.empty(shape).normal_(std=0.02, generator=generator).clamp_(-0.04, 0.04)
        gain = re.search(r"(norm\d?\.weight|scale\d)$", name)
        state[name] = tensor.add_(1.0) if gain else tensor
    return state


# --- what a library builds --------------------------------------------------------------------------------


def _of_library(
    library: Library,
    name: str,
    checkpoint: Path | str | None,
    image_size: Size | None,
    further_sizes: Sequence[Size],
    classes: int | None,
    seed: int | None,
    stated: Stated,
    zero_shot: ZeroShot | None,
    cache_dir: Path | str | None,
) -> Checkpoint | UserModule:
    """A library's model: as a family reads it, where one does, and as a module otherwise.

    Args:
        seed: of random weights; None where they are trained or a file's.
    """
    source, trained = f"{library.name}:{name}", checkpoint is None and seed is None
    given: Foreign | None = None
    files = Weights({}, {})
    if checkpoint is not None:
        given, files = from_path(Path(checkpoint), str(checkpoint))
    if seed is None:
        module = library.build(name, trained=trained, cache_dir=cache_dir)
    else:
        module = randomised(lambda: library.build(name, trained=False), seed)
        files = replace(files, notes=(f"no checkpoint: the weights of {source} are random (seed {seed})",))
    try:
        foreign = library.described(name, module, trained=trained)
        if given is not None:
            foreign = replace(given, config=foreign.config)
        read = _convert(foreign, files, None, image_size, further_sizes, classes, stated, zero_shot)
        return replace(read, seed=seed)
    except ArchitectureError as error:
        why = f"{error.message}: it is exported as it is, with the same proof but no rewrites and no kernels"
    notes: tuple[str, ...] = (*files.notes, why)
    if given is not None:
        module, seen = with_weights(library, name, module, given)
        notes += seen
    usual = library.preprocess(name, module)
    if image_size is not None and image_size != usual.size:
        resized(library, name, module, image_size)
        usual = at_size(usual, image_size)
    if further_sizes and library.is_of_one_size(module):
        raise UsageError(
            f"{source} is made for one image size at a time: one bundle cannot hold several",
            hint="a bundle for each size",
        )
    labels = library.labels(name, module) if trained else None
    own = user_module(module.eval(), source, image_size, stated, further_sizes, usual, labels)
    return replace(
        own,
        family=library.name,
        output="features" if getattr(module, "num_classes", None) == 0 else "logits",
        notes=(*notes, *own.notes),
        provenance=files.files,
        seed=seed,
    )


# --- the user's own module ------------------------------------------------------------------------------


def _called(name: str) -> nn.Module:
    """Call a user's function for its module, with the working directory importable as in ``python -c``."""
    module_name, function_name = name.split(":")
    with _working_directory_importable():
        try:
            module = importlib.import_module(module_name)
        except Exception as error:
            raise UsageError(
                f"--model {name}: cannot import {module_name}: {_reason(error)}",
                hint="the module must lie in the working directory or be installed",
            ) from error
        function = getattr(module, function_name, None)
        if not callable(function):
            guess = did_you_mean(
                function_name, (key for key, value in vars(module).items() if callable(value))
            )
            raise UsageError(f"--model {name}: {module_name} has no function {function_name!r}{guess}")
        try:
            result = function()
        except Exception as error:
            message = f"--model {name}: calling it without arguments failed: {_reason(error)}"
            raise UsageError(message) from error
    if not isinstance(result, nn.Module):
        raise UsageError(f"--model {name}: it returned {type(result).__name__}, not a torch.nn.Module")
    return result.eval()


@contextlib.contextmanager
def _working_directory_importable() -> Iterator[None]:
    entry = str(Path.cwd())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(entry)


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
