"""The Open Inference Protocol v2 over gRPC: the same service, from the published protocol definition.

The message and service classes are those that NVIDIA's tritonclient carries, generated from that definition.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import numpy as np

from vitdeploy._version import __version__
from vitdeploy.errors import MissingDependency, UsageError, VitdeployError
from vitdeploy.server.codec import (
    WIRE,
    checked_shape,
    from_bytes,
    image_size,
    length_prefixed,
    little_endian,
    protocol_dtype,
    requested_output,
    timeout_seconds,
)
from vitdeploy.server.messages import Array, ErrorKind, InferRequest, InferResponse, RequestError
from vitdeploy.server.service import EXTENSIONS, Service

_CODES: Mapping[ErrorKind, str] = {
    "invalid": "INVALID_ARGUMENT",
    "not found": "NOT_FOUND",
    "too slow": "DEADLINE_EXCEEDED",
    "timeout": "DEADLINE_EXCEEDED",
    "too large": "RESOURCE_EXHAUSTED",
    "overloaded": "RESOURCE_EXHAUSTED",
    "unavailable": "UNAVAILABLE",
    "internal": "INTERNAL",
}
_TYPED = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}
"""The field of ``InferTensorContents`` that each datatype has."""


@contextlib.asynccontextmanager
async def listening(host: str, port: int, service: Service) -> AsyncIterator[str]:
    """Serve gRPC; yields its address.

    Raises:
        MissingDependency: tritonclient[grpc] is not installed.
        UsageError: the port is not free.
    """
    try:
        import grpc
        from tritonclient.grpc import service_pb2, service_pb2_grpc
    except ImportError as error:
        raise MissingDependency("tritonclient[grpc]", extra="grpc", purpose="gRPC") from error
    limit = service.limits.body_bytes
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", limit),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),
        ]
    )
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(_servicer(service, service_pb2), server)
    address = f"[{host}]" if ":" in host else host
    try:
        taken = server.add_insecure_port(f"{address}:{port}")
    except RuntimeError as error:
        raise UsageError(
            f"cannot listen on {host} port {port} for gRPC", hint="--grpc-port 0 takes any free one"
        ) from error
    await server.start()
    try:
        yield f"{address}:{taken}"
    finally:
        await server.stop(grace=5.0)


def _servicer(service: Service, messages: Any) -> Any:
    """An object with a method per call of the protocol."""
    calls = {
        "ServerLive": _server_live,
        "ServerReady": _server_ready,
        "ModelReady": _model_ready,
        "ServerMetadata": _server_metadata,
        "ModelMetadata": _model_metadata,
        "ModelConfig": _model_config,
        "ModelStatistics": _model_statistics,
        "ModelInfer": _model_infer,
        "RepositoryIndex": _repository_index,
        "RepositoryModelLoad": _repository_load,
        "RepositoryModelUnload": _repository_unload,
    }
    from tritonclient.grpc import service_pb2_grpc

    methods = {name: _guarded(call, service, messages) for name, call in calls.items()}
    methods["ModelStreamInfer"] = _stream(service, messages)
    return type("Servicer", (service_pb2_grpc.GRPCInferenceServiceServicer,), methods)()


_Call = Callable[[Any, Service, Any], Awaitable[Any]]


def _guarded(call: _Call, service: Service, messages: Any) -> Any:
    """The call, with refusals as statuses."""

    async def method(self: Any, request: Any, context: Any) -> Any:
        import grpc

        try:
            return await call(request, service, messages)
        except RequestError as error:
            await context.abort(getattr(grpc.StatusCode, _CODES[error.kind]), error.message)
        except VitdeployError as error:
            await context.abort(grpc.StatusCode.INTERNAL, error.message)

    return method


def _stream(service: Service, messages: Any) -> Any:
    """Requests on one stream, answered in their order; a refusal is an answer, not the stream's end."""

    async def method(self: Any, requests: Any, context: Any) -> AsyncIterator[Any]:
        async for request in requests:
            try:
                answer = await _model_infer(request, service, messages)
                yield messages.ModelStreamInferResponse(infer_response=answer)
            except (RequestError, VitdeployError) as error:
                empty = messages.ModelInferResponse(id=request.id)
                yield messages.ModelStreamInferResponse(error_message=error.message, infer_response=empty)

    return method


async def _server_live(request: Any, service: Service, messages: Any) -> Any:
    return messages.ServerLiveResponse(live=True)


async def _server_ready(request: Any, service: Service, messages: Any) -> Any:
    return messages.ServerReadyResponse(ready=service.repository.ready and not service.draining)


async def _model_ready(request: Any, service: Service, messages: Any) -> Any:
    try:
        service.repository.get(request.name, request.version)
    except RequestError as error:
        if error.kind != "unavailable":
            raise
        return messages.ModelReadyResponse(ready=False)
    return messages.ModelReadyResponse(ready=True)


async def _server_metadata(request: Any, service: Service, messages: Any) -> Any:
    return messages.ServerMetadataResponse(name="vitdeploy", version=__version__, extensions=EXTENSIONS)


async def _model_metadata(request: Any, service: Service, messages: Any) -> Any:
    document = service.repository.metadata(request.name, request.version)
    tensor = messages.ModelMetadataResponse.TensorMetadata
    return messages.ModelMetadataResponse(
        name=document["name"],
        versions=document["versions"],
        platform=document["platform"],
        inputs=[tensor(**spec) for spec in document["inputs"]],
        outputs=[tensor(**spec) for spec in document["outputs"]],
    )


async def _model_config(request: Any, service: Service, messages: Any) -> Any:
    from google.protobuf import json_format
    from tritonclient.grpc import model_config_pb2

    document = json.dumps(service.repository.get(request.name, request.version).config())
    return messages.ModelConfigResponse(config=json_format.Parse(document, model_config_pb2.ModelConfig()))


async def _model_statistics(request: Any, service: Service, messages: Any) -> Any:
    from google.protobuf import json_format

    repository = service.repository
    models = [repository.get(request.name, request.version)] if request.name else repository.models
    document = json.dumps({"model_stats": [model.statistics.as_dict() for model in models]})
    response = messages.ModelStatisticsResponse()  # which has no room for those of each image size
    return json_format.Parse(document, response, ignore_unknown_fields=True)


async def _repository_index(request: Any, service: Service, messages: Any) -> Any:
    index = service.repository.index(ready=request.ready)
    entry = messages.RepositoryIndexResponse.ModelIndex
    return messages.RepositoryIndexResponse(models=[entry(**model) for model in index])


async def _repository_load(request: Any, service: Service, messages: Any) -> Any:
    service.require_open()
    service.require_control()
    if request.parameters:
        raise RequestError(
            "invalid", "load takes no parameters: a model is loaded from where the server has it"
        )
    await service.repository.load(request.model_name)
    return messages.RepositoryModelLoadResponse()


async def _repository_unload(request: Any, service: Service, messages: Any) -> Any:
    service.require_control()
    await service.repository.unload(request.model_name)
    return messages.RepositoryModelUnloadResponse()


async def _model_infer(request: Any, service: Service, messages: Any) -> Any:
    if request.raw_input_contents:
        parsed = _parse(request)
    else:  # typed contents are slow to read
        parsed = await asyncio.to_thread(_parse, request)
    answer = await service.infer(request.model_name, request.model_version, parsed)
    return _render(answer, messages)


def _parse(request: Any) -> InferRequest:
    """Read a ``ModelInferRequest``.

    Raises:
        RequestError: says what is wrong and where.
    """
    raw = request.raw_input_contents
    if not request.inputs:
        raise RequestError("invalid", "the request has no inputs")
    if raw and len(raw) != len(request.inputs):
        raise RequestError("invalid", f"{len(raw)} raw contents for {len(request.inputs)} inputs")
    inputs: dict[str, Array] = {}
    for index, tensor in enumerate(request.inputs):
        where = f"input '{tensor.name[:200]}'"
        if tensor.name in inputs:
            raise RequestError("invalid", f"{where} is given twice")
        if "shared_memory_region" in tensor.parameters:
            raise RequestError("invalid", f"{where}: shared memory is not supported")
        dtype, shape = protocol_dtype(tensor.datatype, where), checked_shape(list(tensor.shape), where)
        if raw and tensor.HasField("contents"):
            raise RequestError("invalid", f"{where}: has both contents and raw contents")
        if raw:
            inputs[tensor.name] = from_bytes(memoryview(raw[index]), dtype, shape, where)
        else:
            inputs[tensor.name] = _typed(tensor, dtype, shape, where)
    requested = [
        requested_output(output.name, _plain(output.parameters), binary=True) for output in request.outputs
    ]
    parameters = _plain(request.parameters)
    return InferRequest(
        inputs=inputs,
        requested=tuple(requested),
        binary=True,
        id=request.id,
        timeout=timeout_seconds(parameters.get("timeout")),
        image_size=image_size(parameters),
    )


def _typed(tensor: Any, dtype: np.dtype[Any], shape: tuple[int, ...], where: str) -> Array:
    """A tensor from the protocol's typed fields."""
    if tensor.datatype not in _TYPED:
        raise RequestError("invalid", f"{where}: {tensor.datatype} has to be sent as raw contents")
    numbers = getattr(tensor.contents, _TYPED[tensor.datatype])
    size = int(np.prod(shape, dtype=np.int64))
    if len(numbers) != size:
        raise RequestError("invalid", f"{where}: {len(numbers)} elements, but the shape is {list(shape)}")
    wide = np.array(numbers)
    narrow = wide.astype(dtype)
    if dtype.kind in "iu" and (narrow != wide).any():
        raise RequestError("invalid", f"{where}: data is outside the range of {tensor.datatype}")
    return narrow.reshape(shape)


def _plain(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Protocol parameters as plain values."""
    return {name: getattr(p, p.WhichOneof("parameter_choice") or "", None) for name, p in parameters.items()}


def _render(response: InferResponse, messages: Any) -> Any:
    outputs, raw = [], []
    for name, array in response.outputs.items():
        text = array.dtype == object
        datatype = "BYTES" if text else WIRE[array.dtype]
        tensor = messages.ModelInferResponse.InferOutputTensor
        outputs.append(tensor(name=name, datatype=datatype, shape=array.shape))
        raw.append(length_prefixed(array) if text else little_endian(array))
    parameter = messages.InferParameter
    return messages.ModelInferResponse(
        model_name=response.model,
        model_version=response.version,
        id=response.request.id,
        parameters={name: parameter(string_param=text) for name, text in response.parameters.items()},
        outputs=outputs,
        raw_output_contents=raw,
    )
