"""A bundle that is being served: which of its image sizes a request is for, and what comes out."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from vitdeploy.bundle.dtypes import DATATYPES
from vitdeploy.bundle.manifest import TensorSpec
from vitdeploy.bundle.sizes import varying
from vitdeploy.config import Size, size_name
from vitdeploy.errors import ImageError
from vitdeploy.images.decode import load_image
from vitdeploy.images.fitting import fit, rule_name
from vitdeploy.images.preprocess import shown_size
from vitdeploy.machine.processors import processors
from vitdeploy.predictor import Prediction
from vitdeploy.server.decoding import Decoding
from vitdeploy.server.lane import Lane
from vitdeploy.server.loading import LoadedBundle, ModelSettings
from vitdeploy.server.messages import Array, InferRequest, InferResponse, RequestedOutput, RequestError
from vitdeploy.server.statistics import Statistics

_T = TypeVar("_T")


@dataclass(frozen=True)
class Classified:
    """What became of one image."""

    predictions: list[Prediction]
    size: Size | None
    """That was taken, where the model has several."""


@dataclass(frozen=True)
class Embedded:
    """What became of one image."""

    vector: Array
    """(columns,) float32."""
    size: Size | None
    """That was taken, where the model has several."""


class InHand:
    """A request that a model has in hand: meanwhile the model stays open, and then the request is counted."""

    __slots__ = ("_begin", "_model")

    def __init__(self, model: ServedModel) -> None:
        self._model = model

    def __enter__(self) -> ServedModel:
        self._begin = self._model.statistics.began()
        self._model.hold()
        return self._model

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._model.release()
        self._model.statistics.ended(self._begin, error)


class ServedModel:
    """One version of one model. Create it on the event loop; ``close`` it there.

    A bundle with several image sizes is one model: tensors go to the size that their shape says, images to
    the one that ``settings.fit`` chooses.

    Args:
        workers: where images are decoded.
    """

    def __init__(
        self,
        loaded: LoadedBundle,
        statistics: Statistics,
        settings: ModelSettings,
        workers: Executor,
    ) -> None:
        self.name, self.version = statistics.name, statistics.version
        self.bundle = loaded.bundle
        self.statistics = statistics
        self._settings = settings
        self._decoding = Decoding(self._decode, workers, processors())
        lanes = [Lane(size, statistics.of(size.view.manifest.image_size)) for size in loaded.sizes]
        self._lanes = {lane.size: lane for lane in lanes}
        self._first, *_ = lanes
        self.note = self._first.note
        self.facts = self._first.facts
        """Of the default size."""
        self.inputs = _of_all([lane.facts.inputs for lane in lanes])
        self.outputs = _of_all([lane.facts.outputs for lane in lanes])
        self._held = 0
        self._free = asyncio.Event()
        self._free.set()
        self._preparing = 0

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The image sizes to choose from, the default first; none where there is no choice."""
        return self.bundle.sizes if len(self._lanes) > 1 else ()

    def in_hand(self) -> InHand:
        """Around a request."""
        return InHand(self)

    def hold(self) -> None:
        """The model is not closed until as often as this ``release`` was called."""
        self._held += 1
        self._free.clear()

    def release(self) -> None:
        self._held -= 1
        if not self._held:
            self._free.set()

    @property
    def busy(self) -> int:
        """Requests in hand."""
        return self._held

    async def close(self) -> None:
        """Finish every request that holds the model, then free the sessions."""
        await self._free.wait()
        for lane in self._lanes.values():
            await lane.close()

    def abandon(self) -> None:
        """Refuse the requests that wait for a session."""
        for lane in self._lanes.values():
            lane.abandon()

    async def infer(self, request: InferRequest) -> InferResponse:
        """Run tensors.

        Raises:
            RequestError: the inputs are not what the model takes, or it cannot run them now.
        """
        requested = self._requested(request.requested)
        lane = self._lane_for(request)
        lane.check(request.inputs)
        found = await lane.run(request.inputs, request.timeout)
        outputs = {}
        for output in requested:
            array = found[output.name]
            outputs[output.name] = self._classes(array, output.classes) if output.classes else array
        return InferResponse(self.name, self.version, outputs, request, self._taken(lane))

    async def classify(self, images: Sequence[bytes], top_k: int) -> list[Classified | ImageError]:
        """Classify image files; an image that cannot be decoded has its error in its place.

        Raises:
            RequestError: the model gives no classes, or cannot run them now.
        """
        self._require_classes()
        if top_k < 1:
            raise RequestError("invalid", f"top_k must be at least 1, not {top_k}")
        rows = await self._run_images(images, "logits")
        return [
            row if isinstance(row, ImageError) else Classified(self._first.best(row[0], top_k), row[1])
            for row in rows
        ]

    async def embed(self, images: Sequence[bytes]) -> list[Embedded | ImageError]:
        """The vectors of image files; an image that cannot be decoded has its error.

        Raises:
            RequestError: the model gives no vectors, or cannot run them now.
        """
        if (vectors := self.bundle.manifest.vectors) is None:
            raise RequestError(
                "invalid",
                f"model '{self.name}' gives {self.bundle.manifest.gives}, no vector of each image: "
                "vitdeploy export --output embedding makes a bundle that does",
                param="model",
            )
        rows = await self._run_images(images, vectors.name)
        return [row if isinstance(row, ImageError) else Embedded(*row) for row in rows]

    async def _run_images(
        self, images: Sequence[bytes], output: str
    ) -> list[tuple[Array, Size | None] | ImageError]:
        """One output for each of some image files, through the queue, and the size that was taken."""
        if reason := self.bundle.manifest.refuses_images:
            raise RequestError(
                "invalid",
                f"model '{self.name}' takes no images: its bundle {reason}; tensors go to "
                f"/v2/models/{self.name}/infer",
                param="model",
            )
        waiting = self._preparing + sum(lane.waiting for lane in self._lanes.values())
        if waiting + len(images) > self._first.rules.max_queue:
            longest = max(lane.busy_for() for lane in self._lanes.values())
            raise RequestError("overloaded", "Exceeds maximum queue size", retry_after=longest)
        self._preparing += len(images)
        try:
            decoded = await _all([self._decoding.decoded(data) for data in images])
        finally:
            self._preparing -= len(images)
        return await _all([self._run_image(image, output) for image in decoded])

    async def _run_image(
        self, image: tuple[Lane, Array] | ImageError, output: str
    ) -> tuple[Array, Size | None] | ImageError:
        if isinstance(image, ImageError):
            return image
        lane, pixels = image
        return await lane.run_image(pixels, output), lane.size if self.sizes else None

    def _decode(self, data: bytes) -> tuple[Lane, Array] | ImageError:
        """The pixels of an image file, and what runs them."""
        try:
            picture, lane = load_image(data, self._settings.max_pixels), self._first
            if self.sizes:
                preprocess = self.bundle.manifest.preprocess
                assert preprocess is not None
                shown = shown_size(picture, preprocess)
                lane = self._lanes[fit(shown, self.sizes, self._settings.fit)]
            return lane, lane.preprocess(picture)
        except ImageError as error:
            return error
        except MemoryError:
            return ImageError("the image needs more memory than there is", hint="scale it down first")

    def _lane_for(self, request: InferRequest) -> Lane:
        """What runs tensors of this shape; of what is no such tensor at all, whoever says what is wrong."""
        spec = self.facts.inputs[0]
        given = request.inputs.get(spec.name)
        if not self.sizes or given is None or given.ndim != len(spec.shape):
            return self._first
        lanes = {size_name(size): self._lanes[size] for size in self.sizes}
        fitting = {
            name: lane
            for name, lane in lanes.items()
            if lane.facts.inputs[0].shape[1:] == given.shape[1:] and request.image_size in (None, name)
        }
        if len(fitting) == 1:
            return next(iter(fitting.values()))
        what = f"{spec.name} of the shape (N, {', '.join(map(str, given.shape[1:]))})"
        if fitting:
            message = f"{what} may be of {' or '.join(fitting)}: name one in the parameter image_size"
            raise RequestError("invalid", message)
        asked = f" at {request.image_size[:40]}" if request.image_size else ""
        message = f"no image size of model '{self.name}' takes {what}{asked}: it has {', '.join(lanes)}"
        raise RequestError("invalid", message)

    def _taken(self, lane: Lane) -> dict[str, str]:
        """The parameters of an answer: the size that ran, where there are several."""
        return {"image_size": size_name(lane.size)} if self.sizes and lane.size else {}

    def _requested(self, outputs: Sequence[RequestedOutput]) -> Sequence[RequestedOutput]:
        """The outputs to give: those that were named, or all."""
        names = {spec.name for spec in self.facts.outputs}
        for output in outputs:
            if output.name not in names:
                raise RequestError(
                    "invalid", f"unexpected inference output '{output.name}' for model '{self.name}'"
                )
            if output.classes and output.name != "logits":
                raise RequestError("invalid", f"'{output.name}' of model '{self.name}' are no classes")
        if len({output.name for output in outputs}) < len(outputs):
            raise RequestError("invalid", "an output is asked for twice")
        return outputs or [RequestedOutput(spec.name) for spec in self.facts.outputs]

    def _require_classes(self) -> None:
        manifest = self.bundle.manifest
        if not manifest.classifies:
            where = "" if manifest.vectors is None else ": its vectors are at /v1/embeddings"
            message = f"model '{self.name}' gives {manifest.gives}, which are no classes{where}"
            raise RequestError("invalid", message)

    def _classes(self, logits: Array, count: int) -> Array:
        """The classification extension: (n, count) of b"score:index:label"."""
        labels = self.bundle.manifest.labels
        rows = []
        for row in logits:
            best = np.argsort(-row, kind="stable")[:count]
            texts = [f"{row[i]:f}:{i}" + (f":{labels[i]}" if labels else "") for i in best]
            rows.append([text.encode() for text in texts])
        return np.array(rows, dtype=object)

    def metadata(self) -> dict[str, Any]:
        """As the v2 protocol has it; -1 is a dimension that varies."""
        return {
            "name": self.name,
            "versions": [self.version],
            "platform": f"vitdeploy_{self.facts.backend}",
            "inputs": [_tensor(spec.name, spec.dtype, spec.shape) for spec in self.inputs],
            "outputs": [_tensor(spec.name, spec.dtype, spec.shape) for spec in self.outputs],
            "parameters": {
                "artifact": self.facts.artifact,
                "precision": self.facts.precision,
                "bundle_digest": self.bundle.manifest.digest,
                **self._choice(),
            },
        }

    def config(self) -> dict[str, Any]:
        """As the model configuration extension has it."""
        rules = self._first.rules
        tensors = {
            kind: [
                {
                    "name": spec.name,
                    "data_type": f"TYPE_{DATATYPES[spec.dtype]}",
                    "dims": [-1 if isinstance(size, str) else size for size in spec.shape[1:]],
                }
                for spec in specs
            ]
            for kind, specs in (("input", self.inputs), ("output", self.outputs))
        }
        return {
            "name": self.name,
            "platform": f"vitdeploy_{self.facts.backend}",
            "backend": self.facts.backend,
            "max_batch_size": min(lane.rules.max_rows for lane in self._lanes.values()),
            **tensors,
            "instance_group": [{"name": self.name, "count": self._first.instances}],
            "dynamic_batching": {
                "preferred_batch_size": [rules.gather],
                "max_queue_delay_microseconds": round(1e6 * rules.delay),
                "default_queue_policy": {"max_queue_size": rules.max_queue},
            },
            "version_policy": {"specific": {"versions": [int(self.version)]}},
            "parameters": {
                "vitdeploy_artifact": {"string_value": self.facts.artifact},
                "vitdeploy_bundle": {"string_value": self.bundle.manifest.digest},
                **{f"vitdeploy_{key}": {"string_value": text} for key, text in self._choice().items()},
            },
        }

    def _choice(self) -> dict[str, str]:
        """What a description says of several sizes: which there are, and how an image gets one."""
        if not self.sizes:
            return {}
        sizes = ",".join(map(size_name, self.sizes))
        return {"image_sizes": sizes, "fit": rule_name(self._settings.fit)}


def _of_all(lanes: Sequence[Sequence[TensorSpec]]) -> tuple[TensorSpec, ...]:
    """Inputs or outputs of all sizes, each once; a dimension in which they differ is a string."""
    return tuple(map(varying, zip(*lanes, strict=True)))


def _tensor(name: str, dtype: str, shape: Sequence[int | str]) -> dict[str, Any]:
    sizes = [-1 if isinstance(size, str) else size for size in shape]
    return {"name": name, "datatype": DATATYPES[dtype], "shape": sizes}


async def _all(work: Sequence[Awaitable[_T]]) -> list[_T]:
    """What each gives; most requests have one image, which needs no task of its own."""
    return [await work[0]] if len(work) == 1 else await asyncio.gather(*work)
