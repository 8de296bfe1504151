"""The checkpoint as the truth about somebody's file: golden inputs in the file's form, answers in float64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vitdeploy._version import __version__
from vitdeploy.backends.base import Array, Session, SessionFacts
from vitdeploy.bundle.folder import Bundle
from vitdeploy.bundle.golden import golden_inputs
from vitdeploy.bundle.manifest import Manifest, Provenance, TensorSpec
from vitdeploy.checkpoint.opening import Checkpoint, UserModule, open_model, user_module
from vitdeploy.checkpoint.stated import Stated
from vitdeploy.config import ModelConfig, Output, Preprocess, Scores, Size
from vitdeploy.errors import UsageError
from vitdeploy.model.folds import normalisation
from vitdeploy.model.reference import Reference, forward_float64
from vitdeploy.model.registry import build_reference
from vitdeploy.model.user_module import module_float64
from vitdeploy.scores import usual_scores
from vitdeploy.verification.foreign.onnx_file import Interface, Value

INPUT = "pixel_values"
Model = str | Path | nn.Module

# What exporters call these; a shape alone decides where no name does.
_NAMES: Mapping[Output, tuple[str, ...]] = {
    "logits": ("logits", "output", "output0", "output_0", "scores", "probabilities", "probs"),
    "tokens": ("last_hidden_state", "tokens", "hidden_states", "output", "output_0"),
    "features": ("pooler_output", "features", "pooled", "output", "output_0"),
    "embedding": ("image_embeds", "embedding", "embeddings", "image_embedding", "image_features"),
}
_ORDER: tuple[Output, ...] = ("logits", "embedding", "tokens", "features")
_WITH_POOLER_LAYER = ("vit", "deit")
"""Families of transformers whose ``pooler_output`` is another layer's, which the reference leaves out."""


@dataclass(frozen=True)
class Chosen:
    """The output of a file that is compared."""

    value: Value
    output: Output
    """What it is of the checkpoint."""


class Truth:
    """A checkpoint that is opened for the images a file takes."""

    def __init__(self, opened: Checkpoint | UserModule, interface: Interface) -> None:
        """Take a checkpoint.

        Raises:
            UsageError: it reads other channels than the file.
        """
        self.opened, self.interface = opened, interface
        self.checkpoint = opened if isinstance(opened, Checkpoint) else None
        self.size: Size = interface.size or (
            self.config.image_size if self.config else opened.preprocess.size
        )
        channels = self.preprocess.channels
        if interface.channels not in (None, channels):
            raise UsageError(
                f"the file reads {interface.channels} channels, and {self.source} {channels}",
                hint="give the checkpoint that the file was made from",
            )

    @classmethod
    def open(cls, model: Model | None, checkpoint: Path | str | None, interface: Interface) -> Truth:
        """Open a checkpoint at the size that a file takes.

        Raises:
            UsageError, CheckpointError, MissingDependency: as ``open_model``; or its weights are random.
        """
        if isinstance(model, nn.Module):
            opened: Checkpoint | UserModule = user_module(
                model, type(model).__name__, interface.size, Stated()
            )
        else:
            name = None if model is None else str(model)
            opened = open_model(name, checkpoint=checkpoint, image_size=interface.size)
        if opened.seed is not None:
            raise UsageError(
                f"{opened.source} names an architecture, whose weights would be random",
                hint="--checkpoint FILE, or -m FOLDER",
            )
        return cls(opened, interface)

    @property
    def source(self) -> str:
        return self.opened.source

    @property
    def config(self) -> ModelConfig | None:
        return self.checkpoint.config if self.checkpoint else None

    @property
    def labels(self) -> tuple[str, ...] | None:
        return self.opened.labels

    @property
    def stated_preprocess(self) -> Preprocess | None:
        """What the checkpoint says of it; not what is assumed where it says nothing."""
        assumed = self.opened.facts.get("preprocess", "default") == "default"
        return None if assumed else self.opened.preprocess

    @property
    def stated_scores(self) -> Scores | None:
        """The same of its scores."""
        return None if self.opened.facts.get("scores", "default") == "default" else self.opened.scores

    @property
    def preprocess(self) -> Preprocess:
        return self.opened.preprocess

    @property
    def state(self) -> Mapping[str, Tensor]:
        """The weights."""
        if self.checkpoint is not None:
            return self.checkpoint.state
        assert isinstance(self.opened, UserModule)
        return self.opened.module.state_dict()

    @cached_property
    def inputs(self) -> Array:
        """Golden inputs as the file reads them."""
        drawn = golden_inputs(self.preprocess, self.size, self.interface.kind)
        return drawn.astype(self.interface.dtype, copy=False)

    @cached_property
    def _reference(self) -> Reference:
        assert self.checkpoint is not None
        return build_reference(self.checkpoint.config, self.checkpoint.state)

    def answer(self, inputs: Array, output: Output) -> Array:
        """What the checkpoint computes in float64 for inputs as the file reads them."""
        tensor = torch.from_numpy(np.ascontiguousarray(inputs)).double()
        if self.interface.kind == "uint8":
            scale, shift = normalisation(self.preprocess)
            tensor = (tensor * scale + shift).permute(0, 3, 1, 2)
        if self.checkpoint is None:
            assert isinstance(self.opened, UserModule)
            return module_float64(self.opened.module, tensor).numpy()
        return forward_float64(self._reference, tensor, output).numpy()

    @cached_property
    def _of_module(self) -> Array:
        """What a module of the user's answers to the golden inputs; it can be asked for nothing else."""
        return self.answer(self.inputs, "logits")

    def golden(self, output: Output) -> dict[str, Array]:
        """Inputs and reference, as ``check_session`` takes them."""
        reference = self._of_module if self.checkpoint is None else self.answer(self.inputs, output)
        return {INPUT: self.inputs, "reference": reference}

    def meanings(self, output: Output) -> Iterator[tuple[str, dict[str, Array]]]:
        """What an output of a file may be: words for it, and what :meth:`golden` gives for that.

        Of transformers' exports of a CLIP, one has ``image_embeds`` of length 1 (CLIPModel), another as they
        are projected (CLIPVisionModelWithProjection).
        """
        if output != "embedding":
            yield "", self.golden(output)
            return
        yield ", of length 1", self.golden(output)
        projected, weight = self.answer(self.inputs, "features"), self.state.get("projection.weight")
        if weight is not None:
            projected = projected @ weight.double().numpy().T
        yield ", not of length 1", {INPUT: self.inputs, "reference": projected}

    def choose(self) -> Chosen:
        """The output of the file to compare: the first in ``_ORDER`` that it has, by name and shape.

        A shape alone makes no embedding of what may be the pooled vector itself.

        Raises:
            UsageError: the file has none of what the checkpoint gives.
        """
        values = self.interface.outputs
        if self.config is None:
            shapes: Mapping[Output, tuple[int, ...]] = {"logits": self._of_module.shape[1:]}
        else:
            shapes = self.config.output_shapes
        for output in (name for name in _ORDER if name in shapes):
            fitting = [v for v in values if _fits(v, shapes[output]) and not self._is_pooler_layer(v)]
            named = [v for v in fitting if v.name.lower() in _NAMES[output]]
            by_shape = output != "embedding" or shapes[output] != shapes["features"]
            if found := named or [v for v in fitting if by_shape and v.shape and v.shape[-1] is not None]:
                return Chosen(found[0], output)
        # An output of this name that has another shape is held against it, and fails.
        for value in values:
            if "logits" in shapes and value.name == "logits":
                return Chosen(value, "logits")
        given = ", ".join(map(str, values[:4]))
        wanted = ", ".join(f"{name} {('N', *shape)}" for name, shape in shapes.items()).replace("'", "")
        raise UsageError(f"none of its outputs ({given}) is one of {self.source}'s: {wanted}")

    def _is_pooler_layer(self, value: Value) -> bool:
        family = self.checkpoint.family if self.checkpoint else ""
        return value.name == "pooler_output" and family in _WITH_POOLER_LAYER

    def bundle(self, path: Path, scores: Scores | None) -> Bundle:
        """What a predictor needs to know of the model, as an unwritten bundle."""
        classes = self.config.classes if self.config else self._of_module.shape[-1]
        manifest = Manifest(
            name=path.name,
            created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            generator=f"vitdeploy {__version__}",
            model=self.config,
            input=self.interface.kind,
            preprocess=self.preprocess,
            labels=self.labels if self.config or self.labels else tuple(map(str, range(classes))),
            scores=scores or self.opened.scores or usual_scores(classes),
            provenance=Provenance(source=self.source, family=self.opened.family),
        )
        return Bundle(path, manifest, {})


class TruthSession(Session):
    """The checkpoint itself, in float64, as a session that reads what the file reads."""

    def __init__(self, truth: Truth, like: SessionFacts) -> None:
        output = TensorSpec(name="logits", dtype="float64", shape=like.outputs[0].shape)
        facts = SessionFacts(
            backend="torch",
            artifact="reference",
            precision="fp32",
            executes="float64",
            device="cpu",
            provider="cpu",
            batch=None,
            inputs=like.inputs,
            outputs=(output,),
            versions={},
        )
        super().__init__(facts)
        self._truth = truth

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return {"logits": self._truth.answer(inputs[INPUT], "logits")}

    def _close(self) -> None:
        return


def _fits(value: Value, shape: tuple[int, ...]) -> bool:
    """Whether an output can be (N, *shape)."""
    if value.dtype not in ("float32", "float16", "float64"):
        return False
    if value.shape is None:
        return True  # its name has to tell
    return len(value.shape) == len(shape) + 1 and all(
        have is None or have == want for have, want in zip(value.shape[1:], shape, strict=True)
    )
