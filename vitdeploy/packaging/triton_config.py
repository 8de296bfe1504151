"""The ``config.pbtxt`` of a model repository, written through the server's own protobuf.

What the fields mean: https://github.com/triton-inference-server/server/blob/main/docs/user_guide/model_configuration.md
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vitdeploy.bundle.dtypes import DATATYPES
from vitdeploy.bundle.manifest import TensorSpec
from vitdeploy.config import BatchRange
from vitdeploy.errors import ExportError, MissingDependency, UsageError

Document = dict[str, Any]
"""A part of a configuration, in protobuf's JSON form."""


@dataclass(frozen=True)
class Batching:
    """How an artifact's batch sizes become the server's.

    The server puts a batch dimension of 1 to ``max`` in front of ``dims``. For an artifact of one fixed batch
    size it does not: there ``max`` is 0, and the batch stands in ``dims``.
    """

    max: int
    fixed: int | None
    preferred: tuple[int, ...]

    @classmethod
    def of(cls, batch: BatchRange, most: int | None, artifact: str) -> Batching:
        """From what an artifact serves and the ``--max-batch`` that was asked for.

        Raises:
            UsageError: the artifact does not serve that, or serves no single image.
        """
        if batch.fixed:
            if most not in (None, batch.min):
                raise UsageError(
                    f"--max-batch {most}: {artifact} has the fixed batch size {batch.min}",
                    hint="export with --batch MIN,OPT,MAX",
                )
            return cls(0, batch.min, ())
        if batch.min > 1:
            raise UsageError(
                f"{artifact} serves batches from {batch.min} on, but requests of one image arrive, too",
                hint=f"export with --batch 1,{batch.opt},{batch.max}",
            )
        if most is not None and most > batch.max:
            raise UsageError(
                f"--max-batch {most}: {artifact} is verified up to {batch.max}",
                hint=f"export with --batch 1,{min(batch.opt, most)},{most}",
            )
        limit = most or batch.max
        preferred = sorted({size for size in (batch.opt, limit) if 1 < size <= limit})
        return cls(limit, None, tuple(preferred))

    def dims(self, shape: Sequence[int | str]) -> list[int]:
        """The dimensions of a tensor whose first one is the batch; -1 is one that varies."""
        rest = [size if isinstance(size, int) else -1 for size in shape[1:]]
        return [self.fixed, *rest] if self.fixed else rest

    def scheduling(self, max_delay_ms: float) -> Document:
        """Requests of several clients computed together, where the batch may vary."""
        if not self.max:
            return {}
        batching: Document = {"max_queue_delay_microseconds": round(max_delay_ms * 1000)}
        if self.preferred:
            batching["preferred_batch_size"] = list(self.preferred)
        return {"dynamic_batching": batching}


def tensor(name: str, data_type: str, dims: Sequence[int], **more: Any) -> Document:
    """An input or output; one that is a plain number per image has the dimension 1 for the server only."""
    shape: Document = {"dims": list(dims)} if dims else {"dims": [1], "reshape": {"shape": []}}
    return {"name": name, "data_type": data_type, **shape, **more}


def tensor_of(spec: TensorSpec, batching: Batching, **more: Any) -> Document:
    """An artifact's input or output.

    Raises:
        UsageError: a type that requests cannot carry.
    """
    if spec.dtype == "bfloat16":
        raise UsageError(f"{spec.name} is {spec.dtype}, which requests to Triton cannot carry here")
    return tensor(spec.name, f"TYPE_{DATATYPES[spec.dtype]}", batching.dims(spec.shape), **more)


def warm_up(inputs: Sequence[TensorSpec], batching: Batching, images: Sequence[int]) -> list[Document]:
    """Requests of zeros that the server computes before it says that it is ready."""
    return [
        {
            "name": f"batch {size}",
            "batch_size": size,
            "inputs": {
                spec.name: {
                    "data_type": f"TYPE_{DATATYPES[spec.dtype]}",
                    "dims": batching.dims(spec.shape) or [1],
                    "zero_data": True,
                }
                for spec in inputs
            },
        }
        for size in images
    ]


def config_text(document: Document) -> str:
    """A configuration as ``config.pbtxt``; every name and type in it is one the server knows.

    Raises:
        MissingDependency: tritonclient is not installed.
        ExportError: the configuration has a field or a value that the server's protobuf does not.
    """
    protobuf = _protobuf()
    message = protobuf.ModelConfig()
    json_format = importlib.import_module("google.protobuf.json_format")
    text_format = importlib.import_module("google.protobuf.text_format")
    try:
        json_format.ParseDict(document, message)
    except json_format.ParseError as error:
        raise ExportError(f"Triton's configuration cannot hold this: {error}") from error
    return str(text_format.MessageToString(message, as_utf8=True))


def parse_config(text: str) -> Any:
    """The ``ModelConfig`` message of a ``config.pbtxt``.

    Raises:
        MissingDependency: tritonclient is not installed.
        google.protobuf.text_format.ParseError: it is none.
    """
    text_format = importlib.import_module("google.protobuf.text_format")
    return text_format.Parse(text, _protobuf().ModelConfig())


def _protobuf() -> Any:
    try:
        return importlib.import_module("tritonclient.grpc.model_config_pb2")
    except ImportError as error:
        raise MissingDependency(
            "tritonclient[grpc]", extra="package", purpose="a Triton model repository"
        ) from error
