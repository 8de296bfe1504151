"""Image files in, where the model looks out: ``POST /v1/models/{model}:explain``, as KServe's protocol v1."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from vitdeploy.errors import ImageError
from vitdeploy.server.http_images import images_of
from vitdeploy.server.http_io import json_response, until_disconnect
from vitdeploy.server.messages import RequestError
from vitdeploy.server.service import Service


async def _explain(request: Request, service: Service) -> Response:
    """The attention rollout of one image file, or of several."""
    service.require_open()
    model = service.repository.get(request.path_params["model"], request.path_params.get("version", ""))
    model.hold()  # not as a request of its sessions: its statistics are of those
    try:
        images = await images_of(request, service)
        found = await until_disconnect(request, service.explain(model, [data for _, data in images]))
        explanations = []
        for (title, _), explained in zip(images, found, strict=True):
            if isinstance(explained, ImageError):
                raise RequestError("invalid", f"{title}: {explained.message}")
            rollout, picture, size = explained.rollout, explained.picture, explained.size
            explanations.append({"rollout": rollout, "picture": picture, "image_size": size})
    finally:
        model.release()
    document = {"model_name": model.name, "model_version": model.version, "explanations": explanations}
    return json_response(document)


ROUTES = [
    ("POST", "/v1/models/{model:name}:explain", _explain),
    ("POST", "/v1/models/{model:name}/versions/{version:name}:explain", _explain),
]
