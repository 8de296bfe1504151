"""A bundle that is being served: its sessions, its batches, its images."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vitdeploy.backends.base import Options, Session, SessionFacts, check_inputs
from vitdeploy.bundle.dtypes import DATATYPES
from vitdeploy.bundle.folder import Bundle
from vitdeploy.errors import BundleError, ImageError, ParityError, UsageError
from vitdeploy.images.decode import load_image
from vitdeploy.predictor import Prediction, Predictor
from vitdeploy.server.batcher import Batcher, BatchingRules, RequestOutputs
from vitdeploy.server.messages import Array, InferRequest, InferResponse, RequestedOutput, RequestError
from vitdeploy.server.statistics import Statistics
from vitdeploy.verification.parity import check_session

_MAX_ROWS = 32
"""Rows of a request, at most, where the session takes any number."""
_SHORT_RUN = 0.01
"""Seconds: to begin and to end such a run is a good part of its cost, and it keeps nobody waiting."""


@dataclass(frozen=True)
class ModelSettings:
    """How bundles are loaded and requests are bounded; None is the bundle's or the runtime's own choice."""

    backend: str | None = None
    artifact: str | None = None
    options: Options = field(default_factory=Options)
    instances: int = 1
    """Sessions per model, each with threads of its own."""
    max_batch: int | None = None
    max_delay: float = 0.0
    """Seconds."""
    max_queue: int = 256
    """Images that wait."""
    timeout: float = 30.0
    """Seconds in the queue."""
    buckets: tuple[int, ...] = ()
    max_pixels: int = 50_000_000
    """Of an image that is sent."""

    def rules(self, facts: SessionFacts, chunk: int) -> BatchingRules:
        """How this session's requests are batched.

        Raises:
            UsageError: the session does not run the batch sizes that were asked for.
        """
        least, most = (facts.batch.min, facts.batch.max) if facts.batch else (1, _MAX_ROWS)
        if self.max_batch is not None:
            if facts.batch and self.max_batch > most:
                raise UsageError(
                    f"--max-batch {self.max_batch}, but {facts.artifact} takes {most} at most",
                    hint=facts.rebuild,
                )
            most = self.max_batch
        outside = [size for size in self.buckets if not least <= size <= most]
        if outside:
            raise UsageError(f"--buckets {outside[0]}, but {facts.artifact} runs {least} to {most}")
        usual = max(chunk, facts.batch.opt if facts.batch else 1)
        gather = most if self.max_batch is not None else min(most, usual)
        fixed = (least,) if least > 1 else ()
        return BatchingRules(
            gather=gather,
            max_rows=most,
            short=_SHORT_RUN,
            delay=self.max_delay,
            max_queue=self.max_queue,
            timeout=self.timeout,
            buckets=tuple(sorted({*self.buckets, *fixed, *((most,) if self.buckets else ())})),
        )


@dataclass(frozen=True)
class LoadedBundle:
    """A bundle with its sessions open and their outputs compared with the reference."""

    bundle: Bundle
    predictors: tuple[Predictor, ...]
    rules: BatchingRules


def load_bundle(path: Path, settings: ModelSettings) -> LoadedBundle:
    """Open a bundle and check that it answers rightly here before anybody asks it; not on the event loop.

    Raises:
        BundleError, UsageError, DeviceUnavailable, MissingDependency: it cannot be run as asked.
        ParityError: its outputs are not the reference's.
    """
    bundle = Bundle.open(path)
    predictors: list[Predictor] = []
    try:
        for _ in range(settings.instances):
            predictors.append(
                Predictor.open(
                    bundle, backend=settings.backend, artifact=settings.artifact, options=settings.options
                )
            )
        session = predictors[0].session
        rules = settings.rules(session.facts, predictors[0].chunk)
        sizes = sorted({rules.padded(1), rules.padded(rules.gather)})
        for predictor in predictors:
            _require_parity(predictor.session, bundle, sizes)
    except BaseException:
        for predictor in predictors:
            predictor.close()
        raise
    return LoadedBundle(bundle, tuple(predictors), rules)


def _require_parity(session: Session, bundle: Bundle, sizes: Sequence[int]) -> None:
    """Compare with the reference; warms the session up besides."""
    golden = bundle.golden()
    for record in check_session(session, golden, batches=sizes, max_abs=bundle.manifest.max_abs):
        if not record.passed:
            raise ParityError(
                f"{bundle.root}: {record.artifact} on {record.backend} is not served: its outputs are wrong "
                f"at {record.place}: {record.failures[0]}",
                hint=f"vitdeploy verify {bundle.root}",
            )


class ServedModel:
    """One version of one model. Create it on the event loop; ``close`` it there.

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
        self._workers = workers
        self._predictors = loaded.predictors
        self.facts = loaded.predictors[0].session.facts
        self.note = loaded.predictors[0].note
        self.rules = loaded.rules
        self._any_batch = dataclasses.replace(self.facts, batch=None)
        runs = [_runner(predictor.session) for predictor in loaded.predictors]
        self._batcher = Batcher(runs, loaded.rules, statistics)
        self._held = 0
        self._free = asyncio.Event()
        self._free.set()
        self._preparing = 0

    @contextmanager
    def held(self) -> Iterator[None]:
        """While a request is in hand, the model is not closed."""
        self._held += 1
        self._free.clear()
        try:
            yield
        finally:
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
        await self._batcher.close()
        for predictor in self._predictors:
            await asyncio.to_thread(predictor.close)

    def abandon(self) -> None:
        """Refuse the requests that wait for a session."""
        self._batcher.abandon()

    async def infer(self, request: InferRequest) -> InferResponse:
        """Run tensors.

        Raises:
            RequestError: the inputs are not what the model takes, or it cannot run them now.
        """
        requested = self._requested(request.requested)
        self._check(request.inputs)
        answer = await self._batcher.submit(request.inputs, request.timeout)
        self.statistics.answered(answer)
        self._require_finite(answer)
        outputs = {}
        for output in requested:
            array = answer.outputs[output.name]
            outputs[output.name] = self._classes(array, output.classes) if output.classes else array
        return InferResponse(self.name, self.version, outputs, request)

    async def classify(self, images: Sequence[bytes], top_k: int) -> list[list[Prediction] | ImageError]:
        """Classify image files; an image that cannot be decoded has its error in its place.

        Raises:
            RequestError: the model gives no classes, or cannot run them now.
        """
        self._require_classes()
        if top_k < 1:
            raise RequestError("invalid", f"top_k must be at least 1, not {top_k}")
        rows = await self._run_images(images, "logits")
        best = self._predictors[0].best
        return [row if isinstance(row, ImageError) else best(row, top_k) for row in rows]

    async def embed(self, images: Sequence[bytes]) -> list[Array | ImageError]:
        """The vectors (columns,) float32 of image files; an image that cannot be decoded has its error.

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
        return await self._run_images(images, vectors.name)

    async def _run_images(self, images: Sequence[bytes], output: str) -> list[Array | ImageError]:
        """One output for each of some image files, through the queue."""
        if reason := self.bundle.manifest.refuses_images:
            raise RequestError(
                "invalid",
                f"model '{self.name}' takes no images: its bundle {reason}; tensors go to "
                f"/v2/models/{self.name}/infer",
                param="model",
            )
        waiting = self._preparing + self._batcher.waiting
        if waiting + len(images) > self.rules.max_queue:
            raise RequestError(
                "overloaded", "Exceeds maximum queue size", retry_after=self._batcher.busy_for()
            )
        self._preparing += len(images)
        try:
            loop = asyncio.get_running_loop()
            decoding = [loop.run_in_executor(self._workers, self._decode, data) for data in images]
            tensors = await asyncio.gather(*decoding)
        finally:
            self._preparing -= len(images)
        return await asyncio.gather(*(self._run_image(tensor, output) for tensor in tensors))

    async def _run_image(self, tensor: Array | ImageError, output: str) -> Array | ImageError:
        if isinstance(tensor, ImageError):
            return tensor
        answer = await self._batcher.submit({self.facts.inputs[0].name: tensor[None]})
        self.statistics.answered(answer)
        self._require_finite(answer)
        row: Array = answer.outputs[output][0]
        return row

    def _decode(self, data: bytes) -> Array | ImageError:
        try:
            return self._predictors[0].preprocess(load_image(data, self._settings.max_pixels))
        except ImageError as error:
            return error
        except MemoryError:
            return ImageError("the image needs more memory than there is", hint="scale it down first")

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

    def _check(self, inputs: Mapping[str, Array]) -> None:
        try:
            check_inputs(self._any_batch, inputs)
        except UsageError as error:
            raise RequestError("invalid", error.message) from error
        for name, array in inputs.items():
            if not len(array):
                raise RequestError("invalid", f"{name} has no rows")
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise RequestError("invalid", f"{name} has NaN or infinite values")

    def _require_finite(self, answer: RequestOutputs) -> None:
        if not answer.finite:
            raise RequestError("internal", "the model gives NaN or infinite values for these inputs")

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
            "inputs": [_tensor(spec.name, spec.dtype, spec.shape) for spec in self.facts.inputs],
            "outputs": [_tensor(spec.name, spec.dtype, spec.shape) for spec in self.facts.outputs],
            "parameters": {
                "artifact": self.facts.artifact,
                "precision": self.facts.precision,
                "bundle_digest": self.bundle.manifest.digest,
            },
        }

    def config(self) -> dict[str, Any]:
        """As the model configuration extension has it."""
        tensors = {
            kind: [
                {
                    "name": spec.name,
                    "data_type": f"TYPE_{DATATYPES[spec.dtype]}",
                    "dims": [-1 if isinstance(size, str) else size for size in spec.shape[1:]],
                }
                for spec in specs
            ]
            for kind, specs in (("input", self.facts.inputs), ("output", self.facts.outputs))
        }
        return {
            "name": self.name,
            "platform": f"vitdeploy_{self.facts.backend}",
            "backend": self.facts.backend,
            "max_batch_size": self.rules.max_rows,
            **tensors,
            "instance_group": [{"name": self.name, "count": len(self._predictors)}],
            "dynamic_batching": {
                "preferred_batch_size": [self.rules.gather],
                "max_queue_delay_microseconds": round(1e6 * self.rules.delay),
                "default_queue_policy": {"max_queue_size": self.rules.max_queue},
            },
            "version_policy": {"specific": {"versions": [int(self.version)]}},
            "parameters": {
                "vitdeploy_artifact": {"string_value": self.facts.artifact},
                "vitdeploy_bundle": {"string_value": self.bundle.manifest.digest},
            },
        }


def _tensor(name: str, dtype: str, shape: Sequence[int | str]) -> dict[str, Any]:
    sizes = [-1 if isinstance(size, str) else size for size in shape]
    return {"name": name, "datatype": DATATYPES[dtype], "shape": sizes}


def _runner(session: Session) -> Callable[[Mapping[str, Array]], Mapping[str, Array]]:
    def run(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        outputs = session.run(inputs)
        if {len(array) for array in outputs.values()} != {len(next(iter(inputs.values())))}:
            raise BundleError(f"{session.facts.artifact} gives another number of rows than it was given")
        return outputs

    return run
