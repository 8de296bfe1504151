"""The bytes of the double's engines: a header like the real ones', and behind it what the double needs.

TensorRT for RTX writes 64 bytes: ``vtrt``, a format number, the size of the whole (u64 at 16), the version
(four bytes at 24), and a mask of compute capabilities (u64 at 32); tests/fakes/test_tensorrt.py holds this
against a real engine. Of TensorRT's own header only the magic word and the version are public
(https://github.com/NVIDIA/TensorRT/issues/3073): the rest stays zero.
"""

from __future__ import annotations

import base64
import json
import struct
from dataclasses import asdict, dataclass
from typing import Any

HEADER = struct.Struct("<4sIQQ4B4sQ24x")
MAGIC = {True: b"vtrt", False: b"ftrt"}
CAPABILITY_BITS = {75: 1, 80: 2, 86: 4, 89: 8, 120: 16, 121: 32}
Profile = dict[str, list[list[int]]]
"""The smallest, best and largest shape of each input."""


class BadPlan(Exception):
    """Not an engine, or not a whole one."""


@dataclass(frozen=True)
class Plan:
    """What an engine carries."""

    rtx: bool
    version: tuple[int, ...]
    model: bytes
    """The ONNX graph; without its weights if the plan is stripped of them."""
    profiles: list[Profile]
    flags: list[str]
    verbosity: str
    compatibility: str
    gpu: tuple[int, int] | None
    """Compute capability of the GPU it was built on; TensorRT for RTX does not look at it."""
    targets: list[int]

    @property
    def stripped(self) -> bool:
        return "STRIP_PLAN" in self.flags

    def to_bytes(self) -> bytes:
        fields: dict[str, Any] = asdict(self) | {"model": base64.b64encode(self.model).decode()}
        body = json.dumps(fields, sort_keys=True).encode()
        if not self.rtx:
            return HEADER.pack(MAGIC[False], 0, 0, 0, *self.version, bytes(4), 0) + body
        mask = sum(CAPABILITY_BITS[target] for target in self.targets)
        size = HEADER.size + len(body)
        return HEADER.pack(MAGIC[True], 0, 2, size, *self.version, MAGIC[True], mask) + body

    @classmethod
    def from_bytes(cls, data: bytes, *, rtx: bool) -> Plan:
        """Read it back.

        Raises:
            BadPlan: it is of the other TensorRT, truncated, or something else.
        """
        if not data.startswith(MAGIC[rtx]):
            raise BadPlan("Serialization assertion plan->header.magicTag == rt::kPLAN_MAGIC_TAG failed.")
        try:
            fields = json.loads(data[HEADER.size :])
        except ValueError as error:
            raise BadPlan("Serialization assertion size <= remaining failed.") from error
        fields["model"] = base64.b64decode(fields["model"])
        fields["version"] = tuple(fields["version"])
        fields["gpu"] = tuple(fields["gpu"]) if fields["gpu"] else None
        return cls(**fields)
