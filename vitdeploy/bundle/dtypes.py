"""The dtypes of tensors, by every name they go by outside of the libraries that compute with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from vitdeploy.config import Precision

Quantised = Literal["int8", "fp8"]
"""What GEMMs may be quantised to."""

ArtifactPrecision = Literal[Precision, "mixed", Quantised]
"""What an artifact computes in; ``mixed``: in fp16 or bf16, with islands in fp32; quantised: but for some of
its GEMMs."""

DType = Literal["float64", "float32", "float16", "bfloat16", "uint8", "int8", "int32", "int64"]
"""Of a tensor at the border of a model, by numpy's name."""

OpDType = DType | Literal["float8e4m3fn", "undefined"]
"""Of what an operation computes in."""

PRECISION_DTYPES: Mapping[ArtifactPrecision, DType] = {
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
}
"""The dtype of each precision that has only one."""

QUANTISED_DTYPES: Mapping[Quantised, OpDType] = {"int8": "int8", "fp8": "float8e4m3fn"}
"""What a quantised GEMM reads."""

DATATYPES: Mapping[str, str] = {
    "bool": "BOOL",
    "uint8": "UINT8",
    "uint16": "UINT16",
    "uint32": "UINT32",
    "uint64": "UINT64",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
    "bfloat16": "BF16",
}
"""The Open Inference Protocol's names by numpy's (which itself has no bfloat16)."""

_ONNX: Mapping[str, OpDType] = {"float": "float32", "double": "float64", "": "undefined"}


def from_onnx(name: str) -> str:
    """numpy's name of what ONNX calls ``FLOAT`` or ``tensor(float)``."""
    short = name.removeprefix("tensor(").removesuffix(")").lower()
    return _ONNX.get(short, short)
