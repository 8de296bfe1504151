"""Which of the checkpoint's tensors are in a file bit for bit, and which are there with other numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from vitdeploy.backends.base import one_line
from vitdeploy.errors import BundleError
from vitdeploy.verification.foreign.onnx_file import OnnxFile, shown

Array = np.ndarray[Any, Any]
_Digest = tuple[str, int, bytes]

_MERGED = "attn.qkv."
_SAMPLE = 256
"""Elements that are looked at first."""

_ROUNDING = {"float64": 1e-6, "float32": 1e-6, "float16": 2e-3}
"""Of a dtype: a share of a tensor's largest element that converters and folding change unasked."""


@dataclass(frozen=True)
class Difference:
    """A tensor of the checkpoint that the file has with other numbers."""

    name: str
    initializer: str
    elements: int
    differing: int
    certain: bool
    """False where the checkpoint's tensor is in the file as well: others of its are the same, bit for bit."""

    def __str__(self) -> str:
        other = "" if self.initializer == self.name else f" ({shown(self.initializer)})"
        return f"{self.name}{other}, {self.differing} of {self.elements} elements"


@dataclass(frozen=True)
class Match:
    """The checkpoint's tensors, as far as a file has them."""

    tensors: int
    found: int
    """Bit for bit, rounded to the file's dtype; as they are, transposed, or reshaped."""
    differences: tuple[Difference, ...]
    """The likeliest first."""


def match_weights(file: OnnxFile, state: Mapping[str, Tensor]) -> Match:
    """Look for each tensor of a checkpoint in a file.

    Exporters fold, merge and cut tensors up, so one that is not found says nothing. One of whose elements at
    least half are there was changed, or folded with something small: what the file computes tells which.

    Raises:
        BundleError: a tensor of the file cannot be read.
    """
    theirs, ours = dict(_read(file)), _named(state)
    dtypes = {array.dtype for array in theirs.values()}
    digests = {name: _digest(array) for name, array in theirs.items()}
    there, matched, used = set(digests.values()), set[str](), set[_Digest]()
    for name, array in ours.items():
        forms = {_digest(_rounded(form, dtype)) for form in _forms(array) for dtype in dtypes}
        if hits := forms & there:
            used |= hits
            matched |= {name, *_parts(name)}
    left = {name: array for name, array in theirs.items() if digests[name] not in used}
    found = [best for name, array in left.items() if (best := _closest(name, array, ours, matched))]
    found.sort(key=_rank)
    return Match(len(state), len(matched & state.keys()), tuple(found))


def _read(file: OnnxFile) -> Iterator[tuple[str, Array]]:
    """The floating-point tensors of a file by name; one number alone tells nothing."""
    import onnx

    for position, tensor in enumerate(file.tensors()):
        try:
            array = onnx.numpy_helper.to_array(tensor, str(file.path.parent))
        except Exception as error:  # of onnx, numpy or the file system
            raise BundleError(f"{file.path}: its weight {tensor.name!r}: {one_line(error)}") from error
        if str(array.dtype) in _ROUNDING and array.size > 1:
            yield tensor.name or f"constant {position}", array


def _named(state: Mapping[str, Tensor]) -> dict[str, Array]:
    """Our tensors, and queries, keys and values merged into one, as timm has them."""
    arrays: dict[str, Array] = {}
    for name, tensor in state.items():
        if tensor.is_floating_point() and tensor.numel() > 1:
            wide = tensor.detach().double() if tensor.element_size() == 8 else tensor.detach().float()
            arrays[name] = wide.cpu().numpy()
    for name in [name for name in arrays if name.endswith(("attn.q.weight", "attn.q.bias"))]:
        merged = name.replace("attn.q.", _MERGED)
        if all(part in arrays for part in _parts(merged)):
            arrays[merged] = np.concatenate([arrays[part] for part in _parts(merged)])
    return arrays


def _parts(name: str) -> list[str]:
    """The names of what was merged into one; none where nothing was."""
    return [name.replace(_MERGED, f"attn.{part}.") for part in "qkv"] if _MERGED in name else []


def _forms(array: Array) -> Iterator[Array]:
    yield array
    if array.ndim > 1:
        yield array.reshape(len(array), -1).T


def _rounded(array: Array, dtype: np.dtype[Any]) -> Array:
    with np.errstate(over="ignore"):
        return array.astype(dtype)


def _digest(array: Array) -> _Digest:
    """The same for the same numbers in the same order, whatever their shape."""
    data = np.ascontiguousarray(array)
    content = hashlib.blake2b(data.tobytes(), digest_size=16)
    return str(array.dtype), array.size, content.digest()


def _closest(
    initializer: str, theirs: Array, ours: Mapping[str, Array], matched: set[str]
) -> Difference | None:
    """The tensor that most of an initialiser's elements are from; those not found elsewhere come first."""
    best: Difference | None = None
    flat = theirs.reshape(-1).astype(np.float64)
    sample = np.linspace(0, theirs.size - 1, min(_SAMPLE, theirs.size)).astype(np.int64)
    for name, array in ours.items():
        if array.size != theirs.size:
            continue
        bound = _ROUNDING[str(theirs.dtype)] * max(float(np.abs(array).max()), np.finfo(np.float64).tiny)
        for form in _forms(array):
            some = form[np.unravel_index(sample, form.shape)]
            if _differing(some, flat[sample], bound) > 0.9 * len(sample):
                continue
            differing = _differing(form.reshape(-1), flat, bound)
            if not 0 < differing <= array.size // 2:
                continue
            found = Difference(name, initializer, array.size, differing, name not in matched)
            if best is None or _rank(found) < _rank(best):
                best = found
    return best


def _rank(difference: Difference) -> tuple[bool, float]:
    return not difference.certain, difference.differing / difference.elements


def _differing(one: Array, other: Array, bound: float) -> int:
    """How many elements are further apart; NaN is, from everything."""
    return int((~(np.abs(one.astype(np.float64) - other) <= bound)).sum())
