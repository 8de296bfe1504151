"""The same over gRPC, from the protocol's published definition: metadata, configuration, index and infer."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import grpc
import numpy as np
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

from tests.fakes.v2_server import EXTENSIONS, Served, classes, read_tensor, write_tensor


@dataclass
class GrpcServer:
    """A server in threads of this process; a context manager."""

    models: dict[str, Served]
    name: str = "some-server"
    code: Any = None
    """With which every infer fails."""
    tls: tuple[Path, Path] | None = None
    """Certificate and key."""
    batches: list[tuple[str, int]] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._server = grpc.server(ThreadPoolExecutor(2))
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(_Servicer(self), self._server)
        if self.tls is None:
            self.port = self._server.add_insecure_port("127.0.0.1:0")
        else:
            pair = self.tls[1].read_bytes(), self.tls[0].read_bytes()
            self.port = self._server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(None).wait()

    @property
    def url(self) -> str:
        return f"grpc{'s' * bool(self.tls)}://127.0.0.1:{self.port}"


class _Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    def __init__(self, app: GrpcServer) -> None:
        self.app = app

    def ServerMetadata(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerMetadataResponse(
            name=self.app.name, version="1.0", extensions=list(EXTENSIONS)
        )

    def RepositoryIndex(self, request: Any, context: Any) -> Any:
        rows = [
            service_pb2.RepositoryIndexResponse.ModelIndex(name=name, version=version, state="READY")
            for name, model in self.app.models.items()
            for version in model.versions
        ]
        return service_pb2.RepositoryIndexResponse(models=rows)

    def ModelMetadata(self, request: Any, context: Any) -> Any:
        model = self._find(request.name, request.version, context)
        tensor = service_pb2.ModelMetadataResponse.TensorMetadata
        inputs, outputs = (
            [tensor(name=name, datatype=kind, shape=shape)]
            for name, kind, shape in (model.input, model.output)
        )
        return service_pb2.ModelMetadataResponse(
            name=request.name, versions=list(model.versions), platform="x", inputs=inputs, outputs=outputs
        )

    def ModelConfig(self, request: Any, context: Any) -> Any:
        model = self._find(request.name, request.version, context)
        config = model_config_pb2.ModelConfig(name=request.name, max_batch_size=model.max_batch or 0)
        for key, value in model.parameters.items():
            config.parameters[key].string_value = value
        return service_pb2.ModelConfigResponse(config=config)

    def ModelInfer(self, request: Any, context: Any) -> Any:
        model = self._find(request.model_name, request.model_version, context)
        if self.app.code is not None:
            context.abort(self.app.code, "the model is on fire")
        said = request.inputs[0]
        array = read_tensor(
            {"shape": list(said.shape), "datatype": said.datatype}, request.raw_input_contents[0]
        )
        self.app.batches.append(("protobuf", len(array)))
        answered, function = model.function(request.model_version)
        outputs = function(array)
        outputs = outputs if isinstance(outputs, dict) else {model.output[0]: outputs}
        count = request.outputs[0].parameters["classification"].int64_param if request.outputs else 0
        made = service_pb2.ModelInferResponse(model_name=request.model_name, model_version=answered)
        for key, value in outputs.items():
            given = classes(value, count, model.labels) if count else np.asarray(value)
            kind, raw = write_tensor(given)
            made.outputs.add(name=key, datatype=kind, shape=list(given.shape))
            made.raw_output_contents.append(raw)
        return made

    def _find(self, name: str, version: str, context: Any) -> Served:
        model = self.app.models.get(name)
        if model is None or (version and version not in model.versions):
            context.abort(grpc.StatusCode.NOT_FOUND, f"unknown model {name} {version}")
        assert model is not None
        return model
