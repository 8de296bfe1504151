"""Images in, labels or vectors out: what ``vitdeploy.load`` returns. Needs no torch."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from PIL import Image

from vitdeploy.backends.base import Array, Backend, Options, Session, all_backends, get_backend, runs_nothing
from vitdeploy.bundle.folder import Bundle
from vitdeploy.bundle.manifest import Artifact, Choice, TensorSpec
from vitdeploy.errors import BundleError, ImageError, UsageError, VitdeployError
from vitdeploy.images.decode import ImageSource, load_image
from vitdeploy.images.preprocess import pixel_values
from vitdeploy.machine.identity import this_machine
from vitdeploy.scores import scores_of

AnyImage = ImageSource | np.ndarray[Any, Any]
"""A path, the bytes of an image file, a binary file object, a Pillow image, (H, W, 3) uint8 RGB, or (H, W) or
(H, W, 1) uint8 grey."""

EXACTNESS = ("fp32", "mixed", "fp16", "bf16")
"""Precisions, the most exact first: the order in which an artifact is chosen."""

DEFAULT_BACKEND = "onnxruntime"
_DEFAULT_CHUNK = 8
"""Images at a time where the session takes any batch size."""


@dataclass(frozen=True)
class Prediction:
    """One class of an image."""

    label: str
    """The checkpoint's name of the class; its index, as text, where it names none."""
    index: int
    score: float
    """As the bundle's ``scores`` says: a softmax, a sigmoid or the logit itself, computed in float64."""


class Predictor:
    """A loaded bundle that classifies or embeds images. Get one from ``vitdeploy.load``.

    As safe to share between threads as its backend's sessions are.
    """

    def __init__(self, bundle: Bundle, session: Session, note: str = "", batch: int | None = None) -> None:
        self.bundle = bundle
        self.session = session
        self.note = note
        """Why it runs as it does, where the bundle says how: one line, for the user."""
        self._batch = batch

    @classmethod
    def open(
        cls,
        bundle: str | os.PathLike[str] | Bundle,
        *,
        backend: str | None = None,
        artifact: str | None = None,
        options: Options | None = None,
    ) -> Predictor:
        """Open a bundle; ``vitdeploy.load`` documents the arguments and the errors."""
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(Path(bundle))
        options = options or Options()
        if backend is None and artifact is None and options == Options(threads=options.threads):
            choice, note = choice_for_this_machine(opened)
            if choice is not None:
                threads = options.threads or choice.threads
                options = Options(threads=threads, provider=choice.provider)
                chosen = None if choice.artifact is None else opened.artifact(choice.artifact)
                session = get_backend(choice.backend).load(opened, chosen, options)
                return cls(opened, session, note, choice.batch)
        else:
            note = ""
        runtime = get_backend(backend or DEFAULT_BACKEND)
        chosen = opened.artifact(artifact) if artifact is not None else choose_artifact(opened, runtime)
        return cls(opened, runtime.load(opened, chosen, options), note)

    @classmethod
    def open_most_exact(cls, bundle: Bundle) -> Predictor:
        """Open the most exact artifact that something on this machine runs: ONNX Runtime, if that does.

        Raises:
            VitdeployError: nothing runs one; the reason of the first backend that might.
        """
        reason: VitdeployError | None = None
        others = [backend for backend in all_backends() if backend.name != DEFAULT_BACKEND]
        for backend in (get_backend(DEFAULT_BACKEND), *others):
            if backend.availability().ok:
                try:
                    return cls(bundle, backend.load(bundle, choose_artifact(bundle, backend), Options()))
                except VitdeployError as error:
                    reason = reason or error
        raise reason or VitdeployError(f"{bundle.root}: no backend works on this machine")

    def predict(self, images: AnyImage | Iterable[AnyImage], top_k: int = 5) -> list[list[Prediction]]:
        """Classify one or many images.

        Args:
            images: one image or an iterable of them; see ``AnyImage``. A (N, H, W, 3 or 1) uint8 array is N.
            top_k: how many classes per image, the likeliest first; at most all of them.

        Returns:
            One list per image, in order; a single image gives one list too.

        Raises:
            ImageError: an image cannot be decoded; nothing is returned for the others.
            UsageError: ``top_k`` is not positive, or the bundle gives no logits.
            BundleError: the runtime fails, or gives NaN or infinite logits.
        """
        results = []
        for result in self.stream(as_many(images), top_k):
            if isinstance(result, ImageError):
                raise result
            results.append(result)
        return results

    def stream(self, images: Iterable[AnyImage], top_k: int = 5) -> Iterator[list[Prediction] | ImageError]:
        """Classify images one batch at a time, giving the error in place of an image that has one.

        Raises:
            UsageError, BundleError: as :meth:`predict`, at the first result.
        """
        self._require_logits()
        if top_k < 1:
            raise UsageError(f"top_k must be at least 1, not {top_k}")
        for row in self._rows(images, "logits"):
            yield row if isinstance(row, ImageError) else self.best(row, top_k)

    def stream_vectors(self, images: Iterable[AnyImage]) -> Iterator[Array | ImageError]:
        """As :meth:`embed`, one batch at a time: (columns,) float32 for each image, or its error.

        Raises:
            UsageError, BundleError: as :meth:`embed`, at the first vector.
        """
        for row in self._rows(images, self.vectors.name):
            if not isinstance(row, ImageError):
                self._require_finite(row, self.vectors.name)
            yield row

    def logits(self, images: AnyImage | Iterable[AnyImage]) -> Array:
        """Return the logits of one or many images: (N, classes) float32.

        Raises:
            ImageError: an image cannot be decoded.
            UsageError: the bundle gives no logits; or no image is given.
            BundleError: the runtime fails.
        """
        self._require_logits()
        return self._output(images, "logits")

    def embed(self, images: AnyImage | Iterable[AnyImage]) -> Array:
        """Return the vectors of one or many images: (N, columns) float32.

        They are the bundle's embedding, each of length 1, or its features where it gives no embedding.

        Raises:
            ImageError: an image cannot be decoded.
            UsageError: the bundle gives neither; or no image is given.
            BundleError: the runtime fails, or gives NaN or infinite values.
        """
        vectors = self._output(images, self.vectors.name)
        self._require_finite(vectors, self.vectors.name)
        return vectors

    @property
    def vectors(self) -> TensorSpec:
        """The output that is a vector for each image.

        Raises:
            UsageError: there is none.
        """
        if (vectors := self.bundle.manifest.vectors) is None:
            raise UsageError(
                f"{self.bundle.root}: gives {self.bundle.manifest.gives}, no vector of each image",
                hint="export with --output embedding",
            )
        return vectors

    def preprocess(self, image: AnyImage) -> Array:
        """Return the model's input for one image: (C, H, W) float32, or (H, W, C) uint8 for uint8 input.

        Raises:
            ImageError: it cannot be decoded.
            UsageError: the bundle takes tensors only.
        """
        manifest = self.bundle.manifest
        if manifest.preprocess is None or manifest.refuses_images:
            reads = self.session.facts.inputs[0]
            raise UsageError(
                f"{self.bundle.root}: {manifest.refuses_images}, so it cannot take images",
                hint=f"in Python, vitdeploy.load(BUNDLE).run(x) takes x: {reads.dtype} "
                f"({', '.join(map(str, reads.shape))})",
            )
        picture = load_image(_picture(image) if isinstance(image, np.ndarray) else image, heif=True)
        return pixel_values(picture, manifest.preprocess, manifest.input)

    def run(self, inputs: Array) -> Array | dict[str, Array]:
        """Return the model's output (N, ...) for inputs (N, ...); of a model with several all, by name.

        Args:
            inputs: as :meth:`preprocess` makes them; at least one.

        Raises:
            BundleError: the runtime fails.
        """
        outputs = self.outputs(inputs)
        return outputs if len(outputs) > 1 else next(iter(outputs.values()))

    def outputs(self, inputs: Array) -> dict[str, Array]:
        """As :meth:`run`, by name however many there are; ``chunk`` inputs are computed together."""
        begins = range(0, len(inputs), self.chunk)
        parts = [self.run_batch(inputs[begin : begin + self.chunk]) for begin in begins]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def run_batch(self, inputs: Array) -> dict[str, Array]:
        """As :meth:`outputs`, in one batch; too few for the artifact are filled up, and the rest is cut."""
        facts = self.session.facts
        least = facts.batch.min if facts.batch else 1
        filled = inputs if len(inputs) >= least else inputs[np.arange(least) % len(inputs)]
        outputs = self.session.run({facts.inputs[0].name: filled})
        return {name: array[: len(inputs)] for name, array in outputs.items()}

    def best(self, logits: Array, top_k: int) -> list[Prediction]:
        """The likeliest classes of one image's logits, (classes,), the likeliest first.

        Raises:
            BundleError: they are NaN or infinite.
        """
        self._require_finite(logits, "logits")
        scores = scores_of(logits, self.bundle.manifest.scores)
        order = np.argsort(-scores, kind="stable")[:top_k]
        labels = self.bundle.manifest.labels
        return [
            Prediction(labels[index] if labels else str(index), int(index), float(scores[index]))
            for index in order
        ]

    @property
    def chunk(self) -> int:
        """How many images are computed together."""
        batch = self.session.facts.batch
        return self._batch or (batch.opt if batch else _DEFAULT_CHUNK)

    def close(self) -> None:
        """Free what the runtime holds."""
        self.session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _require_logits(self) -> None:
        manifest, given = self.bundle.manifest, [spec.name for spec in self.session.facts.outputs]
        if not manifest.classifies or "logits" not in given:
            raise UsageError(
                f"{self.bundle.root}: gives {manifest.gives}, which are no classes to predict",
                hint="export with --output logits, or run its session for the raw output"
                if manifest.vectors is None
                else "in Python, vitdeploy.load(BUNDLE).embed(images) gives its vectors",
            )

    def _require_finite(self, rows: Array, output: str) -> None:
        if not np.isfinite(rows).all():
            raise BundleError(
                f"{self.session.facts.artifact} gives NaN or infinite {output}",
                hint=f"vitdeploy verify {self.bundle.root}",
            )

    def _output(self, images: AnyImage | Iterable[AnyImage], output: str) -> Array:
        """One output (N, ...) for one or many images."""
        chunks = _chunks(as_many(images), self.chunk)
        parts = [self.run_batch(np.stack([self.preprocess(image) for image in c]))[output] for c in chunks]
        if not parts:
            raise UsageError("no image was given")
        return np.concatenate(parts)

    def _rows(self, images: Iterable[AnyImage], output: str) -> Iterator[Array | ImageError]:
        """One output of each image, a batch at a time; the error in place of an image that has one."""
        for chunk in _chunks(images, self.chunk):
            prepared = [self._try(image) for image in chunk]
            good = [item for item in prepared if not isinstance(item, ImageError)]
            rows = iter(self.run_batch(np.stack(good))[output] if good else ())
            for item in prepared:
                yield item if isinstance(item, ImageError) else next(rows)

    def _try(self, image: AnyImage) -> Array | ImageError:
        try:
            return self.preprocess(image)
        except ImageError as error:
            return error


def choose_artifact(bundle: Bundle, backend: Backend) -> Artifact | None:
    """The most exact artifact that ``backend`` runs on this machine; None is the reference weights.

    Raises:
        UsageError, DeviceUnavailable: it runs none; says why for each.
    """
    for artifact in sorted(
        bundle.manifest.artifacts, key=lambda artifact: EXACTNESS.index(artifact.precision)
    ):
        if backend.supports(bundle.manifest, artifact) is None:
            return artifact
    if backend.supports(bundle.manifest, None) is None:
        return None
    raise runs_nothing(backend, bundle)


def choice_for_this_machine(bundle: Bundle) -> tuple[Choice | None, str]:
    """What ``vitdeploy bench --pick`` chose for this machine, and one line that says so.

    None where the bundle has no choice for this machine, or one that does not run here any more; then
    the line says why, if there is anything to say.
    """
    if not bundle.manifest.choices:
        return None, ""
    here = this_machine()
    choice = next((c for c in bundle.manifest.choices if (c.machine, c.image_size) == (here, None)), None)
    if choice is None:
        return None, ""
    state = get_backend(choice.backend).availability()
    what = " ".join(filter(None, (choice.backend, choice.artifact)))
    if not state.ok:
        return None, f"{what} was picked for this machine, but does not run here now: {state.reason}"
    threads = f", {choice.threads} thread{'s' * (choice.threads > 1)}" if choice.threads else ""
    return choice, f"{what}{threads}: picked for {choice.goal} on this machine on {choice.created[:10]}"


def as_many(images: AnyImage | Iterable[AnyImage]) -> Iterable[AnyImage]:
    """One image as an iterable of one."""
    if isinstance(images, np.ndarray):
        return list(images) if images.ndim == 4 else [images]
    single = isinstance(images, str | os.PathLike | bytes | bytearray | memoryview | Image.Image)
    if single or hasattr(images, "read") or not hasattr(images, "__iter__"):
        return [images]  # type: ignore[list-item]
    return images  # type: ignore[return-value]


def _picture(array: np.ndarray[Any, Any]) -> Image.Image:
    grey = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 1)
    rgb = array.ndim == 3 and array.shape[2] == 3
    if array.dtype != np.uint8 or not (grey or rgb) or not array.size:
        raise ImageError(
            f"an array of shape {array.shape} and dtype {array.dtype} is not an image",
            hint="pass (H, W, 3) uint8 RGB, or (H, W) uint8 grey",
        )
    return Image.fromarray(array.reshape(array.shape[:2]) if grey else array)


def _chunks(images: Iterable[AnyImage], size: int) -> Iterator[tuple[AnyImage, ...]]:
    iterator = iter(images)
    while chunk := tuple(itertools.islice(iterator, size)):
        yield chunk
