"""What each actor of a job runs: one session; pieces of work in, rows of results out."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from vitdeploy.backends.base import Options, get_backend
from vitdeploy.bundle.folder import Bundle
from vitdeploy.config import size_name
from vitdeploy.errors import BundleError, ImageError, VitdeployError
from vitdeploy.predictor import Predictor
from vitdeploy.ray import tables
from vitdeploy.ray.work import ActorPlan, Item, Result

_Image = tuple[int, str | None, bytes | str]
"""Row number (-1 without), name, and bytes or path."""


class Classifier:
    """A session that is opened at the first piece of work, and then stays.

    What ends the job is returned, not raised: an exception of ours would arrive wrapped in Ray's, and in
    another form with each of its versions.
    """

    def __init__(self, plan: ActorPlan) -> None:
        self._plan = plan
        self._predictor: Predictor | None = None

    def __call__(self, pieces: tables.Table) -> Iterator[tables.Table]:
        try:
            self._predictor = self._predictor or open_predictor(self._plan)
            for rows in self._work(list(tables.items_of(pieces)), self._predictor):
                yield tables.results(rows, self._plan.vector, sized=self._plan.fit is not None)
        except VitdeployError as error:
            reason, sized = json.dumps(error.as_dict()), self._plan.fit is not None
            yield tables.failure(reason, self._plan.vector, sized=sized)

    def _work(self, items: Sequence[Item], predictor: Predictor) -> Iterator[list[Result]]:
        files = [item for item in items if item.group < 0]
        for chunk in _chunks(files, predictor.chunk):
            images = [(-1, item.source, item.source) for item in chunk]
            yield self._classify(predictor, chunk, images)
        for item in items:
            if item.group >= 0:
                yield from self._row_group(predictor, item)

    def _row_group(self, predictor: Predictor, item: Item) -> Iterator[list[Result]]:
        assert self._plan.column is not None
        left = sorted({*range(item.first, item.first + item.rows)}.difference(item.done), reverse=True)
        try:
            for images in filter(None, tables.read_images(item, self._plan.column, predictor.chunk)):
                yield self._classify(predictor, [item] * len(images), images)
                del left[len(left) - len(images) :]
        except ImageError as error:
            yield [Result(item.source, item.stamp, row, error=error.message) for row in reversed(left)]

    def _classify(
        self, predictor: Predictor, items: Sequence[Item], images: Sequence[_Image]
    ) -> list[Result]:
        pictures, plan = [image for _, _, image in images], self._plan
        ask = predictor.logit_answers if plan.vector is None else predictor.vector_answers
        results = []
        for item, (row, name, _), answer in zip(items, images, ask(pictures), strict=True):
            result = Result(item.source, item.stamp, row, name)
            if isinstance(answer, ImageError):
                results.append(replace(result, error=answer.message))
                continue
            if plan.fit is not None and answer.size is not None:
                result = replace(result, image_size=size_name(answer.size))
            if plan.vector is None:
                results.append(replace(result, predictions=predictor.best(answer.row, plan.top_k)))
            else:
                results.append(replace(result, embedding=answer.row))
        return results


def open_predictor(plan: ActorPlan) -> Predictor:
    """The bundle as the plan says.

    Raises:
        BundleError: it is damaged, or another one than the job began with.
        VitdeployError: whatever its backend says.
    """
    bundle = Bundle.open(plan.bundle)
    if bundle.manifest.digest != plan.digest:
        raise BundleError(f"{plan.bundle}: is another bundle than the one this job began with")
    options = Options(threads=plan.threads, provider=plan.provider)
    if plan.fit is not None:
        return Predictor.open(
            bundle,
            backend=plan.backend,
            artifact=plan.artifact,
            options=options,
            fit=plan.fit,
            batch=plan.batch,
        )
    artifact = bundle.artifact(plan.artifact) if plan.artifact is not None else None
    session = get_backend(plan.backend).load(bundle, artifact, options)
    return Predictor(bundle, session, batch=plan.batch)


def _chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk
