"""From a bundle and an image to figures: by the reference model, or by an artifact where there is none."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vitdeploy.backends.torch import load_reference
from vitdeploy.bundle.folder import WEIGHTS, Bundle
from vitdeploy.config import Output, Preprocess
from vitdeploy.errors import BundleError, ImageError, UsageError
from vitdeploy.explanation import measures
from vitdeploy.explanation.attention import Observation, attention_bytes, observe
from vitdeploy.explanation.figures import ImageFigures, LeftOut, ModelFigures, Relevance
from vitdeploy.explanation.measures import Array, Float
from vitdeploy.explanation.pictures import Pixels, seen
from vitdeploy.explanation.precision import BlockErrors, block_errors
from vitdeploy.images.preprocess import apply
from vitdeploy.machine.memory import total_memory
from vitdeploy.model.registry import architecture_of
from vitdeploy.model.view import ModelView
from vitdeploy.predictor import Prediction, Predictor, best_of

_CLASSES = 5
"""That are named for each image."""
_RELEVANT = 3
"""Of them, those whose relevance is shown."""
_RELEVANT_LABELS = 6
"""The same of a zero-shot classifier, whose labels are few and the user's own."""


class Looker(ABC):
    """Looks at images with a bundle of one image size."""

    def __init__(self, bundle: Bundle, spec: Preprocess) -> None:
        self.bundle, self.spec = bundle, spec

    @abstractmethod
    def look(self, name: str, image: Image.Image) -> ImageFigures:
        """The figures of one image."""

    def rollout(self, image: Image.Image) -> tuple[Pixels, Float]:
        """What the model is given, as a picture, (H, W, 3), and the attention rollout, (rows, columns).

        Raises:
            UsageError: the model has no rollout; says why.
        """
        left = self.left_out()[0]
        raise UsageError(f"{left.figure} cannot be shown: {left.reason}")

    @abstractmethod
    def weights(self) -> ModelFigures:
        """The figures of the weights alone."""

    @abstractmethod
    def left_out(self) -> tuple[LeftOut, ...]:
        """Which figures there are none of, and why."""

    def errors(self, image: Image.Image) -> tuple[BlockErrors, ...]:
        """What each precision costs on an image."""
        return ()

    def close(self) -> None:  # noqa: B027 - most hold nothing that has to be freed
        """Free what is held."""


def looker_of(bundle: Bundle, spec: Preprocess) -> Looker:
    """Open a bundle of one image size.

    Raises:
        UsageError: it has no weights, or attention of such images does not fit into memory.
        BundleError: it is damaged.
    """
    if bundle.manifest.model is None:
        return ArtifactLooker(bundle, spec)
    if not bundle.weights:
        raise UsageError(
            f"{bundle.root}: has no {WEIGHTS}, and figures are computed from the weights",
            hint="export the model again, or take the bundle that this one was made from",
        )
    bundle.verify_hashes(bundle.weights)
    return ReferenceLooker(bundle, spec)


def preprocess_of(bundle: Bundle) -> Preprocess:
    """How its images are prepared.

    Raises:
        UsageError: no images can go in.
    """
    spec = bundle.manifest.preprocess
    if spec is None:
        raise UsageError(
            f"{bundle.root}: says nothing of preprocessing, so images cannot be looked at with it",
            hint="export the model again with --preprocess",
        )
    if not spec.takes_images:
        raise UsageError(f"{bundle.root}: reads tensors of {spec.channels} channels, not images")
    return spec


class ReferenceLooker(Looker):
    """By the reference model, in float32."""

    def __init__(self, bundle: Bundle, spec: Preprocess) -> None:
        super().__init__(bundle, spec)
        self.model = load_reference(bundle, torch.float32)
        self.config = self.model.config
        self.view = architecture_of(self.config).view(self.model)
        if self.view is not None:
            needed, there = attention_bytes(self.view), total_memory()
            if there is not None and needed > there // 2:
                raise UsageError(
                    f"the attention of all blocks takes {needed / 1e9:.1f} GB with its gradients, and this "
                    f"machine has {there / 1e9:.1f} GB",
                    hint="export the model with a smaller --image-size to look at it",
                )

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The logits where there are some; else what the model is for."""
        return ("logits",) if self.config.classes else self.config.outputs[:1]

    def pixels(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(apply(image, self.spec))[None]

    def look(self, name: str, image: Image.Image) -> ImageFigures:
        pixels = self.pixels(image)
        picture = seen(pixels[0].numpy(), self.spec)
        if self.view is None:
            with torch.no_grad():
                logits = self.model(pixels, "logits")[0].numpy() if self.config.classes else None
            return ImageFigures(name, picture, self._named(logits))
        found = self._observed(self.view, pixels)
        logits = found.outputs["logits"].detach()[0].numpy() if "logits" in found.outputs else None
        return self._figures(name, picture, found, logits)

    def rollout(self, image: Image.Image) -> tuple[Pixels, Float]:
        view = self.view
        if view is None or not view.whole:
            return super().rollout(image)
        pixels = self.pixels(image)
        found, last = self._observed(view, pixels, gradients=False), view.blocks[-1]
        tokens = measures.on_the_grid(found.rollout(), last.tokens.numpy(), last.grid)
        return seen(pixels[0].numpy(), self.spec), tokens

    def _observed(self, view: ModelView, pixels: Tensor, *, gradients: bool = True) -> Observation:
        found = observe(self.model, view, pixels, self.outputs, gradients=gradients)
        if not all(bool(tensor.isfinite().all()) for tensor in (*found.tokens, *found.outputs.values())):
            raise BundleError(f"{self.bundle.root}: the reference model computes numbers that are not finite")
        return found

    def _named(self, logits: Array | None, count: int = _CLASSES) -> tuple[Prediction, ...]:
        return () if logits is None else tuple(best_of(self.bundle.manifest, logits, count))

    def _figures(self, name: str, picture: Array, found: Observation, logits: Array | None) -> ImageFigures:
        view = found.view
        last = view.blocks[-1]
        tokens, grid = last.tokens.numpy(), last.grid
        relevant = _RELEVANT_LABELS if getattr(self.config, "head_on", "") == "embedding" else _RELEVANT
        relevance = [
            Relevance(label, measures.on_the_grid(found.relevance(label.index), tokens, grid))
            for label in self._named(logits if view.whole else None, relevant)
        ]
        attention, distances, norms, lengths = [], [], [], []
        for number, block in enumerate(view.blocks):
            weights, places = found.attention(number), block.places.numpy()
            shares = None if view.reads is None else view.reads.numpy()
            attention.append(measures.looked_at(weights, places, block.grid, shares))
            distances.append(measures.mean_distances(weights, places, block.grid, block.step))
            figures, long = measures.token_norms(found.tokens[number].numpy(), block.tokens.numpy())
            norms.append(figures)
            lengths.append(measures.on_the_grid(long, block.tokens.numpy(), block.grid))
        return ImageFigures(
            name,
            picture,
            self._named(logits),
            measures.on_the_grid(found.rollout(), tokens, grid) if view.whole else None,
            tuple(relevance),
            tuple(attention),
            tuple(distances),
            tuple(norms),
            tuple(lengths),
        )

    def weights(self) -> ModelFigures:
        if self.view is None:
            return ModelFigures()
        view = self.view
        filters, shares = _filters(view.filters)
        positions = view.positions
        similar = None if positions is None else measures.position_similarity(positions.detach().numpy())
        return ModelFigures(filters, shares, similar, view.blocks[0].grid, view.prefix, self._looks())

    def _looks(self) -> str:
        view = self.view
        assert view is not None
        if view.reads is None:
            where = "from all tokens together" if view.whole else "from all tokens of its window together"
            return f"what each place receives {where}"
        prefix = len(view.prefix)
        read = [name for name, share in zip(view.prefix, view.reads.tolist(), strict=False) if share]
        if bool(view.reads[prefix:].any()):
            read.append("the mean of all patches")
        return f"from what the model reads at its end, {' and '.join(read)}, to every patch"

    def left_out(self) -> tuple[LeftOut, ...]:
        view, found = self.view, []
        if view is None:
            what = "attention, rollout, relevance, distances, lengths"
            return (
                LeftOut(what, f"models of the kind {self.config.kind!r} have no attention that is known"),
            )
        if not view.whole:
            reason = "attention stays within windows and tokens are merged between stages: no product of its "
            found.append(
                LeftOut("rollout and relevance", reason + "matrices leads from the image to the class")
            )
        elif not self.config.classes:
            found.append(LeftOut("relevance", "the model has no head, so no class that something speaks for"))
        if self.config.output_shape("layer_0") is None:
            reason = "the model gives no tokens of single blocks, so only its output is rehearsed"
            found.append(LeftOut("errors by block", reason))
        if view.positions is None:
            reason = "the model has no position for each patch: they are rotary, relative, or none"
            found.append(LeftOut("similarity of positions", reason))
        return tuple(found)

    def errors(self, image: Image.Image) -> tuple[BlockErrors, ...]:
        return block_errors(self.model, self.bundle.manifest, self.pixels(image))


class ArtifactLooker(Looker):
    """A module of the user's own, of which a bundle has artifacts and the weights by name."""

    def __init__(self, bundle: Bundle, spec: Preprocess) -> None:
        super().__init__(bundle, spec)
        self._predictor = Predictor.open_most_exact(bundle) if bundle.manifest.classifies else None

    def look(self, name: str, image: Image.Image) -> ImageFigures:
        picture = seen(apply(image, self.spec), self.spec)
        if self._predictor is None:
            return ImageFigures(name, picture)
        (answer,) = self._predictor.logit_answers([image])
        if isinstance(answer, ImageError):
            raise answer
        return ImageFigures(name, picture, tuple(self._predictor.best(answer.row, _CLASSES)))

    def weights(self) -> ModelFigures:
        filters, shares = _filters(_first_filters(self.bundle, self.spec.channels))
        return ModelFigures(filters, shares)

    def left_out(self) -> tuple[LeftOut, ...]:
        inside = "attention, rollout, relevance, distances, lengths, positions, errors by block"
        reason = "this is a module of your own, a graph without parts that are known: classes, filters and "
        left = [LeftOut(inside, reason + "the errors of whole outputs are what can be shown")]
        if self._predictor is None:
            left.append(LeftOut("classes", f"the bundle gives {self.bundle.manifest.gives}"))
        if self.weights().filters is None:
            left.append(LeftOut("filters", "the bundle's weights have no convolution of an image's channels"))
        return tuple(left)

    def close(self) -> None:
        if self._predictor is not None:
            self._predictor.close()


def _filters(filters: Tensor | None) -> tuple[Float | None, tuple[float, ...]]:
    """The principal components, of filters of grey or of colours."""
    if filters is None or filters.shape[1] not in (1, 3) or len(filters) < 2:
        return None, ()
    components, shares = measures.principal_filters(filters.detach().float().numpy())
    return components, tuple(map(float, shares))


def _first_filters(bundle: Bundle, channels: int) -> Tensor | None:
    """The largest convolution of an image's channels among the weights of a module: (filters, C, h, w).

    Raises:
        BundleError: the weights are damaged.
    """
    found: list[Tensor] = []
    for file in bundle.weights:
        bundle.verify_hashes([file])
        try:
            with safe_open(bundle.path(file), "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - it is no dictionary
                    shape: Sequence[int] = tensors.get_slice(name).get_shape()
                    if len(shape) == 4 and shape[1] == channels and min(shape[2:]) > 1:
                        found.append(tensors.get_tensor(name))
        except (OSError, SafetensorError) as error:
            raise BundleError(f"{bundle.path(file)}: cannot be read: {error}") from error
    return max(found, key=lambda tensor: int(np.prod(tensor.shape[2:])), default=None)
