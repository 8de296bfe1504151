"""One image size of a served model: its sessions, its queue, its pixels."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image

from vitdeploy.backends.base import Session, check_inputs
from vitdeploy.errors import BundleError, UsageError
from vitdeploy.predictor import Prediction
from vitdeploy.server.batcher import Batcher, RequestOutputs
from vitdeploy.server.loading import LoadedSize
from vitdeploy.server.messages import Array, RequestError
from vitdeploy.server.statistics import SizeStatistics


class Lane:
    """Runs what is of one size. Create it on the event loop; ``close`` it there."""

    def __init__(self, loaded: LoadedSize, statistics: SizeStatistics) -> None:
        self.size = loaded.view.manifest.image_size
        """None where the bundle does not tell its only one."""
        self.facts = loaded.predictors[0].session.facts
        self.note = loaded.predictors[0].note
        self.instances = len(loaded.predictors)
        self.rules = loaded.rules
        self._predictors = loaded.predictors
        self._statistics = statistics
        self._any_batch = dataclasses.replace(self.facts, batch=None)
        runs = [_runner(predictor.session) for predictor in loaded.predictors]
        self._batcher = Batcher(runs, loaded.rules, statistics)

    @property
    def waiting(self) -> int:
        """Images in the queue."""
        return self._batcher.waiting

    def busy_for(self) -> float:
        """Seconds that what waits now will take."""
        return self._batcher.busy_for()

    def abandon(self) -> None:
        """Refuse the requests that wait for a session."""
        self._batcher.abandon()

    async def close(self) -> None:
        """Finish what was accepted, then free the sessions."""
        await self._batcher.close()
        for predictor in self._predictors:
            await asyncio.to_thread(predictor.close)

    def check(self, inputs: Mapping[str, Array]) -> None:
        """Hold tensors against what the session takes.

        Raises:
            RequestError: names what does not fit.
        """
        try:
            check_inputs(self._any_batch, inputs)
        except UsageError as error:
            raise RequestError("invalid", error.message) from error
        for name, array in inputs.items():
            if not len(array):
                raise RequestError("invalid", f"{name} has no rows")
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise RequestError("invalid", f"{name} has NaN or infinite values")

    async def run(self, inputs: Mapping[str, Array], timeout: float | None = None) -> Mapping[str, Array]:
        """All outputs of checked inputs, which wait for the session together with others'.

        Raises:
            RequestError: the queue is full, the time is over, or the run failed.
        """
        answer: RequestOutputs = await self._batcher.submit(inputs, timeout)
        self._statistics.answered(answer)
        if not answer.finite:
            raise RequestError("internal", "the model gives NaN or infinite values for these inputs")
        return answer.outputs

    async def run_image(self, pixels: Array, output: str) -> Array:
        """One output of one image's pixels; raises as ``run``."""
        outputs = await self.run({self.facts.inputs[0].name: pixels[None]})
        row: Array = outputs[output][0]
        return row

    def preprocess(self, picture: Image.Image) -> Array:
        """The pixels of a decoded image; in any thread.

        Raises:
            ImageError: they cannot be made.
        """
        return self._predictors[0].preprocess(picture)

    def best(self, logits: Array, top_k: int) -> list[Prediction]:
        """The likeliest classes of one image's logits, (classes,), the likeliest first."""
        return self._predictors[0].best(logits, top_k)


def _runner(session: Session) -> Callable[[Mapping[str, Array]], Mapping[str, Array]]:
    def run(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        outputs = session.run(inputs)
        if {len(array) for array in outputs.values()} != {len(next(iter(inputs.values())))}:
            raise BundleError(f"{session.facts.artifact} gives another number of rows than it was given")
        return outputs

    return run
