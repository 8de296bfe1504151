"""Ray Serve: an application that takes an image file and gives labels. What ``package --target ray`` starts.

Beside ``data.py``, the only file that imports ray.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vitdeploy.backends.base import Array, Options
from vitdeploy.bundle.manifest import first_problem
from vitdeploy.config import Size, size_name
from vitdeploy.errors import ImageError, MissingDependency, ParityError, UsageError, VitdeployError
from vitdeploy.images.decode import load_image
from vitdeploy.images.fitting import parse_rule
from vitdeploy.predictor import Predictor
from vitdeploy.verification.parity import check_session

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

DEPLOYMENT = "Classifier"
"""What the deployment is called in a Serve config."""

_ROUTE = re.compile(r"/v1/models/(?P<name>[^/:]+)(/versions/(?P<version>[^/:]+))?(?P<verb>:predict)?/?")


class DeploymentSettings(BaseModel):
    """The ``args`` of the application in ``serve_config.yaml``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """The model's, in its address."""
    version: str = "1"
    backend: str | None = None
    artifact: str | None = None
    provider: str | None = None
    threads: int = Field(default=1, ge=1)
    """CPU threads of each replica; its ``num_cpus`` should be the same."""
    max_batch: int = Field(default=8, ge=1)
    """Images that are computed together."""
    max_delay_ms: float = Field(default=5.0, ge=0, le=60_000)
    """How long an image waits for others."""
    top_k: int = Field(default=5, ge=1)
    """Classes per image, where the request does not say."""
    max_body_mb: float = Field(default=16.0, gt=0)
    """Larger requests are refused."""
    fit: str = "aspect"
    """Which of several image sizes an image gets: aspect, area, or HxW for all."""


def application(bundle: str | Path, args: Mapping[str, Any]) -> Any:
    """The application, as Ray Serve runs it.

    Args:
        bundle: a folder that every machine of the cluster sees under this path.
        args: what ``DeploymentSettings`` has.

    Raises:
        MissingDependency: Ray Serve is not installed.
        UsageError: an argument is not known, or has no such value.
    """
    try:
        from ray import serve
    except ImportError as error:
        raise MissingDependency("ray", extra="ray", purpose="Ray Serve") from error
    deployment = serve.deployment(name=DEPLOYMENT)(Replica)
    return deployment.bind(str(bundle), _settings(args).model_dump())


def _settings(args: Mapping[str, Any]) -> DeploymentSettings:
    try:
        settings = DeploymentSettings.model_validate(dict(args))
    except ValidationError as error:
        raise UsageError(f"args: {first_problem(error)}") from error
    parse_rule(settings.fit)
    return settings


class HttpError(Exception):
    """A request that gets an error for an answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class Replica:
    """One process with one session for each image size. Images of several requests are computed together.

    It does not start where its answers are not the reference's, and asks to be replaced when its session
    fails.
    """

    def __init__(self, bundle: str, args: Mapping[str, Any]) -> None:
        from ray import serve

        self._settings = settings = _settings(args)
        self._predictor = Predictor.open(
            bundle,
            backend=settings.backend,
            artifact=settings.artifact,
            options=Options(threads=settings.threads, provider=settings.provider),
            fit=parse_rule(settings.fit),
        )
        self._decoder = ThreadPoolExecutor(2, "decode")
        self._runner = ThreadPoolExecutor(1, "session")
        self._failure: str | None = None
        several = len(self._predictor.sizes) > 1
        self._sizes = self._predictor.sizes if several else ()
        self._together: dict[Size | None, Callable[[Array], Awaitable[Array]]] = {}
        for size in self._sizes or (None,):
            one = self._predictor if size is None else self._predictor.at(size)
            most = _batch(one, settings.max_batch)
            _check_parity(one, most)
            gather = serve.batch(max_batch_size=most, batch_wait_timeout_s=settings.max_delay_ms / 1000)
            self._together[size] = gather(self._runs(one))

    async def __call__(self, request: Request) -> Response:
        from starlette.responses import JSONResponse

        try:
            return JSONResponse(await self._answer(request))
        except HttpError as error:
            return JSONResponse({"error": error.message}, error.status)
        except ImageError as error:
            return JSONResponse({"error": error.message}, 400)
        except VitdeployError as error:
            return JSONResponse({"error": error.message}, 500)

    def check_health(self) -> None:
        """Called by Serve now and then; an exception has the replica replaced."""
        if self._failure is not None:
            raise RuntimeError(self._failure)

    async def _answer(self, request: Request) -> dict[str, Any]:
        settings = self._settings
        model = {"model_name": settings.name, "model_version": settings.version}
        route = _ROUTE.fullmatch(request.url.path.removeprefix(request.scope.get("root_path", "")))
        if not route:
            raise HttpError(404, f"no such address; images go to /v1/models/{settings.name}:predict")
        if route["name"] != settings.name or route["version"] not in (None, settings.version):
            raise HttpError(404, f"no such model; this is {settings.name!r}, version {settings.version!r}")
        method = "POST" if route["verb"] else "GET"
        if request.method != method:
            raise HttpError(405, f"{request.method} is not for this address, {method} is")
        if not route["verb"]:
            return {**model, "ready": self._failure is None}
        top_k = _top_k(request.query_params.get("top_k"), settings.top_k)
        size, predictions = await self._classify(await self._body(request), top_k)
        sizes = {"image_sizes": [size_name(size)]} if size is not None else {}
        return {**model, "predictions": [predictions], **sizes}

    async def _body(self, request: Request) -> bytes:
        """The image file, which must not be longer than is allowed, whatever its header says."""
        if request.headers.get("content-type", "").startswith("multipart/"):
            raise HttpError(415, "send the image file itself as the body, not a form")
        limit = int(self._settings.max_body_mb * 1e6)
        said = request.headers.get("content-length", "")
        body = bytearray()
        if not said.isdecimal() or int(said) <= limit:
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    break
            else:
                return bytes(body)
        raise HttpError(413, f"the body has more than {self._settings.max_body_mb:g} MB")

    async def _classify(self, image: bytes, top_k: int) -> tuple[Size | None, list[dict[str, Any]]]:
        """The image size that was taken, where there are several, and the classes."""
        loop = asyncio.get_running_loop()
        size, pixels = await loop.run_in_executor(self._decoder, self._decode, image)
        best = self._predictor.best(await self._together[size](pixels), top_k)
        return size, [{"label": p.label, "index": p.index, "score": p.score} for p in best]

    def _decode(self, image: bytes) -> tuple[Size | None, Array]:
        picture = load_image(image)  # with the decoders that are for clients' images
        one, pixels = self._predictor.prepared(picture)
        return one.sizes[0] if self._sizes else None, pixels

    def _runs(self, one: Predictor) -> Callable[[list[Array]], Coroutine[Any, Any, list[Array]]]:
        async def run(tensors: list[Array]) -> list[Array]:
            """Logits (classes,) of each of some images."""
            loop = asyncio.get_running_loop()
            try:
                work = loop.run_in_executor(self._runner, lambda: one.run_batch(np.stack(tensors)))
                return list((await work)["logits"])
            except VitdeployError as error:
                self._failure = error.message
                raise

        return run


def _batch(predictor: Predictor, max_batch: int) -> int:
    """How many images are computed together at most.

    Raises:
        UsageError: the artifact does not take so many, or no images, or gives no classes.
    """
    manifest, facts = predictor.bundle.manifest, predictor.session.facts
    if not manifest.classifies:
        raise UsageError(f"{predictor.bundle.root}: gives {manifest.gives}, which are no classes")
    if manifest.refuses_images:
        raise UsageError(f"{predictor.bundle.root}: {manifest.refuses_images}, so it cannot take images")
    if facts.batch is not None and max_batch > facts.batch.max:
        raise UsageError(f"max_batch {max_batch}: {facts.artifact} takes at most {facts.batch.max}")
    return max_batch


def _check_parity(predictor: Predictor, most: int) -> None:
    """Hold the session against the reference, which warms it up, too.

    Raises:
        ParityError: it computes something else.
    """
    bundle, facts = predictor.bundle, predictor.session.facts
    least = facts.batch.min if facts.batch else 1
    sizes = sorted({least, max(least, most)})
    max_abs = bundle.manifest.max_abs
    golden = bundle.golden(facts.artifact)
    for record in check_session(predictor.session, golden, batches=sizes, max_abs=max_abs):
        if not record.passed:
            raise ParityError(
                f"{bundle.root}: {record.artifact} on {record.backend} gives wrong outputs at "
                f"{record.place}: {record.failures[0]}",
                hint=f"vitdeploy verify {bundle.root}",
            )


def _top_k(text: str | None, default: int) -> int:
    if text is None:
        return default
    if not re.fullmatch("[1-9][0-9]{0,6}", text):
        raise HttpError(400, f"top_k {text!r} is not a positive whole number")
    return int(text)
