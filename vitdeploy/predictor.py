"""Images in, labels or vectors out: what ``vitdeploy.load`` returns. Needs no torch."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from PIL import Image

from vitdeploy.backends.base import (
    Array,
    Backend,
    Options,
    Session,
    SessionFacts,
    all_backends,
    get_backend,
    runs_nothing,
)
from vitdeploy.bundle.dtypes import ArtifactPrecision
from vitdeploy.bundle.folder import Bundle
from vitdeploy.bundle.manifest import Artifact, Choice, Manifest, TensorSpec
from vitdeploy.bundle.sizes import size_of_shape
from vitdeploy.config import Size
from vitdeploy.errors import BundleError, ImageError, UsageError, VitdeployError
from vitdeploy.images.decode import ImageSource, load_image, upright
from vitdeploy.images.fitting import DEFAULT_RULE, Rule, fit, require_size
from vitdeploy.images.preprocess import pixel_values
from vitdeploy.machine.identity import this_machine
from vitdeploy.scores import scores_of

AnyImage = ImageSource | np.ndarray[Any, Any]
"""A path, the bytes of an image file, a binary file object, a Pillow image, (H, W, 3) uint8 RGB, or (H, W) or
(H, W, 1) uint8 grey."""

EXACTNESS: tuple[ArtifactPrecision, ...] = ("fp32", "mixed", "fp16", "bf16", "int8", "fp8")
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


def best_of(manifest: Manifest, logits: Array, top_k: int) -> list[Prediction]:
    """The likeliest classes of finite logits, (classes,), the likeliest first."""
    scores = scores_of(logits, manifest.scores)
    order = np.argsort(-scores, kind="stable")[:top_k]
    labels = manifest.labels
    return [
        Prediction(labels[index] if labels else str(index), int(index), float(scores[index]))
        for index in order
    ]


class Answer(NamedTuple):
    """What came out for one image."""

    size: Size | None
    """The image size that it was computed at; None where the bundle does not tell its only one."""
    row: Array
    """One output, (...) float32."""


class Predictor:
    """A loaded bundle that classifies or embeds images. Get one from ``vitdeploy.load``.

    Of several image sizes, each image goes where it fits, and a tensor to the size of its shape. A size is
    loaded when something goes there for the first time; ``session`` is the default's.

    As safe to share between threads as its backend's sessions are.
    """

    def __init__(
        self,
        bundle: Bundle,
        session: Session,
        note: str = "",
        batch: int | None = None,
        sizes: _Sizes | None = None,
    ) -> None:
        self.bundle = bundle
        self.session = session
        self.note = note
        """Why it runs as it does, where the bundle says how: one line, for the user."""
        self._batch = batch
        self._sizes = sizes

    @classmethod
    def open(
        cls,
        bundle: str | os.PathLike[str] | Bundle,
        *,
        backend: str | None = None,
        artifact: str | None = None,
        options: Options | None = None,
        size: Size | None = None,
        fit: Rule = DEFAULT_RULE,
        batch: int | None = None,
    ) -> Predictor:
        """Open a bundle; ``vitdeploy.load`` documents the other arguments, and the errors.

        Args:
            batch: how many images are computed together; the artifact's optimum when omitted.
        """
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(Path(bundle))
        size = size or (None if isinstance(fit, str) else fit)
        if size is None and artifact is not None:  # a name may be of one size only
            size = opened.artifact(artifact).image_size
        if size is not None:
            opened = opened.at_size(size)

        def open_one(bundle: Bundle) -> Predictor:
            one = cls._open_one(bundle, backend, artifact, options or Options())
            one._batch = batch or one._batch
            return one

        if len(opened.sizes) < 2:
            return open_one(opened)
        sizes = _Sizes(opened.sizes, fit, lambda size: open_one(opened.at_size(size)))
        default = sizes.at(opened.sizes[0])
        return cls(opened, default.session, default.note, default._batch, sizes)

    @classmethod
    def _open_one(
        cls, opened: Bundle, backend: str | None, artifact: str | None, options: Options
    ) -> Predictor:
        """Open a bundle of one image size."""
        way = choose(opened, backend, artifact, options)
        if way.picked is not None and way.picked.concurrency > 1:  # its threads are of one among several
            way = replace(way, options=replace(way.options, threads=options.threads))
        session = way.backend.load(opened, way.artifact, way.options)
        return cls(opened, session, way.note, way.batch)

    @classmethod
    def open_most_exact(cls, bundle: Bundle) -> Predictor:
        """Open the most exact artifact that something on this machine runs: ONNX Runtime, if that does; a
        quantised one where nothing runs another.

        Raises:
            VitdeployError: nothing runs one; the reason of the first backend that might.
        """
        reason: VitdeployError | None = None
        others = [backend for backend in all_backends() if backend.name != DEFAULT_BACKEND]
        able = [b for b in (get_backend(DEFAULT_BACKEND), *others) if b.availability().ok]
        for quantised, backend in itertools.product((False, True), able):
            try:
                chosen = choose_artifact(bundle, backend)
                if (chosen is not None and chosen.is_quantised) == quantised:
                    return cls(bundle, backend.load(bundle, chosen, Options()))
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
        if top_k < 1:
            raise UsageError(f"top_k must be at least 1, not {top_k}")
        for answer in self.logit_answers(images):
            yield answer if isinstance(answer, ImageError) else self.best(answer.row, top_k)

    def stream_vectors(self, images: Iterable[AnyImage]) -> Iterator[Array | ImageError]:
        """As :meth:`embed`, one batch at a time: (columns,) float32 for each image, or its error.

        Raises:
            UsageError, BundleError: as :meth:`embed`, at the first vector.
        """
        for answer in self.vector_answers(images):
            yield answer if isinstance(answer, ImageError) else answer.row

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
                hint=self.bundle.manifest.towards_vectors,
            )
        return vectors

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Image sizes to choose from, the default first; none where the bundle does not tell the only one."""
        return self._sizes.known if self._sizes else self.bundle.sizes

    def at(self, size: Size) -> Predictor:
        """The predictor of one size alone, which this one closes; itself where it has only that.

        Raises:
            UsageError: there is no such size; names those that there are.
            BundleError, MissingDependency, DeviceUnavailable: as when a bundle is opened.
        """
        require_size(size, self.sizes)
        return self._sizes.at(size) if self._sizes else self

    def preprocess(self, image: AnyImage) -> Array:
        """Return the model's input for one image: (C, H, W) float32, or (H, W, C) uint8 for uint8 input.

        Raises:
            ImageError: it cannot be decoded.
            UsageError: the bundle takes tensors only.
        """
        return self.prepared(image)[1]

    def prepared(self, image: AnyImage) -> tuple[Predictor, Array]:
        """As :meth:`preprocess`, with the predictor of the size that fits."""
        manifest = self.bundle.manifest
        if manifest.preprocess is None or manifest.refuses_images:
            reads = self.session.facts.inputs[0]
            raise UsageError(
                f"{self.bundle.root}: {manifest.refuses_images}, so it cannot take images",
                hint=f"in Python, vitdeploy.load(BUNDLE).run(x) takes x: {reads.dtype} "
                f"({', '.join(map(str, reads.shape))})",
            )
        picture = load_image(_picture(image) if isinstance(image, np.ndarray) else image, heif=True)
        one = self
        if self._sizes is not None:
            picture = upright(picture) if manifest.preprocess.exif else picture
            one = self._sizes.fitting(picture)
        spec = one.bundle.manifest.preprocess
        assert spec is not None  # every size has one where the first has
        return one, pixel_values(picture, spec, manifest.input)

    def run(self, inputs: Array) -> Array | dict[str, Array]:
        """Return the model's output (N, ...) for inputs (N, ...); of a model with several all, by name.

        Args:
            inputs: as :meth:`preprocess` makes them, of one size; at least one.

        Raises:
            UsageError: no image size takes such inputs, or several do; names the sizes.
            BundleError: the runtime fails.
        """
        outputs = self.outputs(inputs)
        return outputs if len(outputs) > 1 else next(iter(outputs.values()))

    def outputs(self, inputs: Array) -> dict[str, Array]:
        """As :meth:`run`, by name however many there are; ``chunk`` inputs are computed together."""
        if self._sizes is not None:
            return self.at(size_of_shape(self.bundle.manifest, inputs.shape[1:])).outputs(inputs)
        begins = range(0, len(inputs), self.chunk)
        parts = [self.run_batch(inputs[begin : begin + self.chunk]) for begin in begins]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def run_batch(self, inputs: Array) -> dict[str, Array]:
        """As :meth:`outputs`, in one batch; too few for the artifact are filled up, and the rest is cut."""
        if self._sizes is not None:
            return self.at(size_of_shape(self.bundle.manifest, inputs.shape[1:])).run_batch(inputs)
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
        return best_of(self.bundle.manifest, logits, top_k)

    @property
    def chunk(self) -> int:
        """How many images are computed together."""
        return chunk_of(self.session.facts, self._batch)

    def close(self) -> None:
        """Free what the runtime holds."""
        for one in self._sizes.opened if self._sizes else ():
            one.close()
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
        rows = []
        for answer in self._answers(as_many(images), output):
            if isinstance(answer, ImageError):
                raise answer
            rows.append(answer.row)
        if not rows:
            raise UsageError("no image was given")
        return np.stack(rows)

    def logit_answers(self, images: Iterable[AnyImage]) -> Iterator[Answer | ImageError]:
        """The logits of images, one batch at a time, each with the image size that it was computed at.

        Raises:
            UsageError, BundleError: as :meth:`logits`, at the first answer.
        """
        self._require_logits()
        yield from self._answers(images, "logits")

    def _answers(self, images: Iterable[AnyImage], output: str) -> Iterator[Answer | ImageError]:
        """One output of each image, in order, a batch at a time; the error in place of one that has one."""
        for chunk in _chunks(images, self.chunk):
            prepared = [self._try(image) for image in chunk]
            good = [item for item in prepared if not isinstance(item, ImageError)]
            rows: dict[Predictor, Iterator[Array]] = {}
            for one in dict.fromkeys(predictor for predictor, _ in good):
                pixels = np.stack([tensor for predictor, tensor in good if predictor is one])
                rows[one] = iter(one.outputs(pixels)[output])
            for item in prepared:
                if isinstance(item, ImageError):
                    yield item
                else:
                    one = item[0]
                    yield Answer(next(iter(one.bundle.sizes), None), next(rows[one]))

    def vector_answers(self, images: Iterable[AnyImage]) -> Iterator[Answer | ImageError]:
        """As :meth:`stream_vectors`, with the image size that each was computed at."""
        for answer in self._answers(images, self.vectors.name):
            if not isinstance(answer, ImageError):
                self._require_finite(answer.row, self.vectors.name)
            yield answer

    def _try(self, image: AnyImage) -> tuple[Predictor, Array] | ImageError:
        try:
            return self.prepared(image)
        except ImageError as error:
            return error


@dataclass
class _Sizes:
    """The predictors of single image sizes, behind one of several."""

    known: tuple[Size, ...]
    rule: Rule
    open: Callable[[Size], Predictor]
    _opened: dict[Size, Predictor] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def at(self, size: Size) -> Predictor:
        with self._lock:
            if size not in self._opened:
                self._opened[size] = self.open(size)
            return self._opened[size]

    def fitting(self, picture: Image.Image) -> Predictor:
        return self.at(fit((picture.height, picture.width), self.known, self.rule))

    @property
    def opened(self) -> Sequence[Predictor]:
        return tuple(self._opened.values())


@dataclass(frozen=True)
class Way:
    """What of a bundle of one image size runs, and how."""

    backend: Backend
    artifact: Artifact | None
    """None is the reference weights."""
    options: Options
    note: str = ""
    """Why, where the bundle says it: one line, for the user."""
    picked: Choice | None = None
    """What it follows, where that was chosen for this machine."""

    @property
    def batch(self) -> int | None:
        """How many images are computed together, where that was chosen, too."""
        return self.picked.batch if self.picked else None


def choose(bundle: Bundle, backend: str | None, artifact: str | None, options: Options) -> Way:
    """What to run of a bundle of one image size: what is asked for, else what was picked for this machine,
    else the most exact artifact on ONNX Runtime.

    Raises:
        UsageError, DeviceUnavailable: there is no such backend or artifact; the backend runs none.
    """
    note = ""
    if backend is None and artifact is None and options == Options(threads=options.threads):
        choice, note = choice_for_this_machine(bundle)
        if choice is not None:
            threads = options.threads or choice.threads
            options = Options(threads=threads, provider=choice.provider, spin=choice.spin)
            chosen = None if choice.artifact is None else bundle.artifact(choice.artifact)
            return Way(get_backend(choice.backend), chosen, options, note, choice)
    runtime = get_backend(backend or DEFAULT_BACKEND)
    chosen = bundle.artifact(artifact) if artifact is not None else choose_artifact(bundle, runtime)
    if artifact is None:
        note = note or quantised_note(chosen, runtime)
    return Way(runtime, chosen, options, note)


def chunk_of(facts: SessionFacts, batch: int | None) -> int:
    """How many images are computed together where ``batch`` does not say it."""
    return batch or (facts.batch.opt if facts.batch else _DEFAULT_CHUNK)


def choose_artifact(bundle: Bundle, backend: Backend) -> Artifact | None:
    """The most exact artifact that ``backend`` runs on this machine; None is the reference weights.

    Of several image sizes, the first one's. A quantised one where there is no other, which
    :func:`quantised_note` says.

    Raises:
        UsageError, DeviceUnavailable: it runs none; says why for each.
    """
    bundle = bundle.of(None)
    for artifact in sorted(
        bundle.manifest.artifacts, key=lambda artifact: EXACTNESS.index(artifact.precision)
    ):
        if backend.supports(bundle.manifest, artifact) is None:
            return artifact
    if backend.supports(bundle.manifest, None) is None:
        return None
    raise runs_nothing(backend, bundle)


def quantised_note(chosen: Artifact | None, backend: Backend) -> str:
    """One line for the user where what was chosen is quantised, and nobody asked for it; else empty."""
    if chosen is None or not chosen.is_quantised:
        return ""
    return f"{chosen.name} is quantised; the {backend.name} backend runs no other artifact of the bundle"


def choice_for_this_machine(bundle: Bundle) -> tuple[Choice | None, str]:
    """What ``bench --pick`` or ``optimize`` chose for this machine, and one line that says so.

    None where the bundle has no choice for this machine, or one that does not run here any more; then
    the line says why, if there is anything to say.
    """
    picked = [c for c in bundle.manifest.choices if c.image_size is None and c.goal != "serving"]
    if not picked:
        return None, ""
    here = this_machine()
    choice = next((choice for choice in picked if choice.machine == here), None)
    if choice is None:
        return None, ""
    state = get_backend(choice.backend).availability()
    what = " ".join(filter(None, (choice.backend, choice.artifact)))
    if not state.ok:
        return None, f"{what} was picked for this machine, but does not run here now: {state.reason}"
    threads = ""
    if choice.threads and choice.concurrency == 1:
        threads = f", {choice.threads} thread{'s' * (choice.threads > 1)}"
    threads += ", spinning" if choice.spin else ""
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
