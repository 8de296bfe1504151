"""Of a bundle with several image sizes, what belongs to one: its part of the manifest, its files' names.

The first size is the one that the manifest itself speaks of. Each further one has a record, artifacts that
name it, and files that carry it in their names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from vitdeploy.bundle.manifest import Artifact, Choice, Manifest, TensorSpec, input_spec
from vitdeploy.config import Size, size_name
from vitdeploy.errors import UsageError
from vitdeploy.images.fitting import require_size

_NAMED = 12
"""Sizes in a sentence, at most."""


def sized(name: str, size: Size | None) -> str:
    """A file's name for a further size: of ``model.fp16.onnx``, ``model.384x384.fp16.onnx``.

    Args:
        size: height and width; None is the first size, whose files have plain names.
    """
    if size is None:
        return name
    folder, slash, file = name.rpartition("/")
    stem, dot, suffixes = file.partition(".")
    return f"{folder}{slash}{stem}.{size_name(size)}{dot}{suffixes}"


def named(name: str, size: Size | None) -> str:
    """An artifact's name for a further size: of ``onnx-fp16``, ``onnx-fp16-384x384``."""
    return name if size is None else f"{name}-{size_name(size)}"


def unsized(name: str, size: Size | None) -> str:
    """The name that an artifact of this size would have at the first size."""
    return name if size is None else name.removesuffix(f"-{size_name(size)}")


def sizes_of(manifest: Manifest) -> tuple[Size, ...]:
    """All sizes, the first one first; none where the manifest does not tell the only one."""
    first = manifest.image_size
    return () if first is None else (first, *(record.image_size for record in manifest.sizes))


def further(manifest: Manifest, size: Size) -> Size | None:
    """The size as artifacts name it: None where it is the first.

    Raises:
        UsageError: the bundle has no such size.
    """
    sizes = sizes_of(manifest)
    return None if require_size(size, sizes) == sizes[0] else size


def of_size(manifest: Manifest, size: Size) -> Manifest:
    """The manifest as it would be of this one size; its files and digest are those of the whole bundle.

    Raises:
        UsageError: the bundle has no such size.
    """
    place = further(manifest, size)
    artifacts = tuple(artifact for artifact in manifest.artifacts if artifact.image_size == place)
    names = {artifact.name for artifact in artifacts}
    update: dict[str, Any] = {
        "artifacts": artifacts,
        "parity": tuple(record for record in manifest.parity if record.artifact in names),
        "choices": tuple(_choices(manifest, artifacts, place)),
        "sizes": (),
    }
    for record in manifest.sizes:
        if record.image_size == place:
            update |= {"preprocess": record.preprocess, "flops": record.flops}
            update |= {"model": manifest.model and manifest.model.at_size(size)}
    return manifest.model_copy(update=update)


def varying(several: Sequence[TensorSpec]) -> TensorSpec:
    """An input or output of several sizes as one; a dimension in which they differ is a string."""
    shapes = zip(*(spec.shape for spec in several), strict=True)
    shape = tuple(axis[0] if len(set(axis)) == 1 else "varies" for axis in shapes)
    return several[0].model_copy(update={"shape": shape})


def input_of(manifest: Manifest, size: Size) -> TensorSpec | None:
    """What goes in at a size, the batch as its first axis; None where nothing here tells it.

    Raises:
        UsageError: the bundle has no such size.
    """
    place = further(manifest, size)
    for artifact in manifest.artifacts:
        if artifact.image_size == place:
            return artifact.inputs[0]
    return input_spec(manifest.model.at_size(size), manifest.input) if manifest.model else None


def size_of_shape(manifest: Manifest, shape: Sequence[int]) -> Size:
    """The size that a tensor is for, by the shape of one input, without the batch.

    Raises:
        UsageError: it is for none, or for several; names the sizes.
    """
    sizes = sizes_of(manifest)
    inputs = {size: input_of(manifest, size) for size in sizes}
    fitting = [size for size, spec in inputs.items() if spec and spec.shape[1:] == tuple(shape)]
    if len(fitting) == 1:
        return fitting[0]
    what = f"an input of the shape ({', '.join(map(str, shape))})"
    if fitting:
        raise UsageError(f"{what} may be of {_listed(fitting, ' or ')}", hint="name the size")
    raise UsageError(f"no image size takes {what}", hint=f"the sizes are {_listed(sizes, ', ')}")


def _listed(sizes: Sequence[Size], between: str) -> str:
    more = f" and {len(sizes) - _NAMED} more" if len(sizes) > _NAMED else ""
    return between.join(map(size_name, sizes[:_NAMED])) + more


def counterpart(artifact: Artifact, others: Sequence[Artifact]) -> Artifact | None:
    """Among the artifacts of another size, what was asked for as this one was; None where there is none."""
    same = [
        other
        for other in others
        if (other.format, other.requested, other.targets)
        == (artifact.format, artifact.requested, artifact.targets)
    ]
    return min(same, key=lambda other: other.precision != artifact.precision, default=None)


def _choices(manifest: Manifest, artifacts: Sequence[Artifact], place: Size | None) -> Iterator[Choice]:
    """What was picked for this size; on a machine where nothing was, what was for the first, of its own. A
    plan for serving is of its own size only."""
    own = [choice for choice in manifest.choices if choice.image_size == place]
    yield from (choice.model_copy(update={"image_size": None}) for choice in own)
    machines = {choice.machine for choice in own if choice.goal != "serving"}
    by_name = {artifact.name: artifact for artifact in manifest.artifacts}
    for choice in manifest.choices:
        if choice.image_size is not None or choice.machine in machines or choice.goal == "serving":
            continue
        picked = by_name.get(choice.artifact or "")
        if picked is None:
            yield choice
        elif same := counterpart(picked, artifacts):
            yield choice.model_copy(update={"artifact": same.name})
