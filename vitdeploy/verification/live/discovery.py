"""Finds the model that a live server serves from a bundle, and says what it is."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vitdeploy.bundle.dtypes import ArtifactPrecision
from vitdeploy.bundle.folder import Bundle
from vitdeploy.bundle.manifest import Artifact, TensorSpec
from vitdeploy.config import Size, size_name
from vitdeploy.errors import ServerError, UsageError, did_you_mean
from vitdeploy.verification.live.client import AnswerError, Client, IndexEntry, ModelFacts, ServerFacts
from vitdeploy.verification.parity import TOLERANCES

IMAGE_SUFFIX = "_image"
"""A packaged model's companion that takes image files is named after it, with this behind."""


@dataclass(frozen=True)
class LiveModel:
    """A model on a live server."""

    server: ServerFacts
    facts: ModelFacts
    asked: str
    """The version asked for; empty is the server's choice."""
    index: tuple[IndexEntry, ...] | None
    """Everything the server has, where it says so."""
    size: Size | None = None
    """The image size that is asked for, of several."""

    @property
    def name(self) -> str:
        return self.facts.name

    @property
    def title(self) -> str:
        """``digits``, or ``digits version 2`` where a version was asked for; ``digits at 384x384`` of several
        image sizes."""
        return f"{self.name}{f' version {self.asked}' if self.asked else ''}{self.at}"

    @property
    def at(self) -> str:
        """`` at 384x384``, of several image sizes."""
        return f" at {size_name(self.size)}" if self.size else ""


@dataclass(frozen=True)
class ExpectedPrecision:
    """The precision by whose tolerances the server's numbers are judged, and why."""

    precision: ArtifactPrecision
    artifact: Artifact | None
    note: str = ""


def find_model(client: Client, bundle: Bundle, name: str | None, version: str) -> LiveModel:
    """Ask the server for the model of a bundle.

    Args:
        name: the model's name there; None looks for the bundle's.
        version: empty is the server's choice.

    Raises:
        ServerError: no v2 server, or the model is not ready.
        UsageError: an unknown model or version (with a suggestion), or the name is not clear.
    """
    try:
        server = client.server()
    except AnswerError as error:
        raise ServerError(
            f"{client.address}: is no server of the Open Inference Protocol v2: {error.message}",
            hint="is a path missing in the URL? the server's metadata is at /v2",
        ) from error
    index = client.index()
    chosen = name or _name_of(bundle, index, str(client.address))
    if index is not None:
        _check_index(index, chosen, version, str(client.address))
    try:
        model = client.model(chosen, version)
    except AnswerError as error:
        what = f"{chosen} version {version}" if version else chosen
        raise UsageError(
            f"{client.address}: does not serve {what}: {error.message}", hint="--model NAME, --version V"
        ) from error
    if version and model.versions and version not in model.versions:
        raise _unknown_version(str(client.address), chosen, version, model.versions)
    if not model.name:
        raise ServerError(f"{client.address}: its metadata of {chosen} has no name")
    return LiveModel(server, model, version, index)


def model_at(client: Client, model: LiveModel, given: TensorSpec, size: Size) -> LiveModel | str:
    """What answers tensors of one image size: the model itself where its input varies, else ``NAME_HxW``.

    Args:
        given: the input at this size.

    Returns:
        The model, or the reason why there is none.

    Raises:
        ServerError: the server cannot be asked.
    """
    if any(_takes(tensor.shape, given) for tensor in model.facts.inputs if tensor.name == given.name):
        return replace(model, size=size)
    name = f"{model.name}_{size_name(size)}"
    if model.index is None or any(entry.name == name for entry in model.index):
        try:
            return replace(model, facts=client.model(name, model.asked), size=size)
        except AnswerError as error:
            return f"{name} does not work: {error.message}"
    return f"{model.name} takes other images, and the server has no {name}"


def _takes(shape: Sequence[int], given: TensorSpec) -> bool:
    """Whether an input's shape is that of a tensor, or varies where they differ; the batch aside."""
    wanted = given.shape[1:]
    return len(shape) == len(given.shape) and all(
        mine in (-1, theirs) for mine, theirs in zip(shape[1:], wanted, strict=True)
    )


def expected_precision(bundle: Bundle, model: LiveModel, asked: str | None) -> ExpectedPrecision:
    """Whose tolerances hold: of the artifact named, else of the one the server names, else the loosest.

    Raises:
        UsageError: the bundle has no artifact ``asked``.
    """
    if asked is not None:
        artifact = bundle.artifact(asked)
        return ExpectedPrecision(artifact.precision, artifact)
    artifacts = bundle.manifest.artifacts
    if model.facts.artifact is not None:
        with contextlib.suppress(UsageError):
            artifact = bundle.artifact(model.facts.artifact)
            return ExpectedPrecision(artifact.precision, artifact)
    if not artifacts:
        return ExpectedPrecision("fp32", None)
    loosest = max(artifacts, key=lambda artifact: TOLERANCES[artifact.precision].relative)
    if len({TOLERANCES[artifact.precision].relative for artifact in artifacts}) == 1:
        return ExpectedPrecision(loosest.precision, loosest if len(artifacts) == 1 else None)
    note = (
        f"the server does not say which artifact it runs, so {loosest.precision} decides, the bundle's least "
        f"exact (--artifact {artifacts[0].name} is stricter)"
    )
    return ExpectedPrecision(loosest.precision, None, note)


def _name_of(bundle: Bundle, index: Sequence[IndexEntry] | None, where: str) -> str:
    """What a bundle's model is called on a server, when nobody says."""
    title = bundle.manifest.name
    if index is None:
        return title
    served = list(dict.fromkeys(entry.name for entry in index))
    for candidate in (title, bundle.root.resolve().stem):
        for name in served:
            if _plain(name) == _plain(candidate):
                return name
    alone = [name for name in served if not any(name.startswith(f"{other}_") for other in served)]
    if len(alone) == 1:
        return alone[0]
    if not served:
        raise ServerError(f"{where}: serves no model at all")
    raise UsageError(
        f"{where}: none of its models is named {title!r}, as the bundle is{did_you_mean(title, served)}",
        hint=f"--model says which; it has {_listed(served)}",
    )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.casefold())


def _check_index(index: Sequence[IndexEntry], name: str, version: str, where: str) -> None:
    served = list(dict.fromkeys(entry.name for entry in index))
    entries = [entry for entry in index if entry.name == name]
    if not entries:
        raise UsageError(
            f"{where}: has no model {name!r}{did_you_mean(name, served)}",
            hint=f"it has {_listed(served)}" if served else "it serves no model at all",
        )
    versions = [entry.version for entry in entries if entry.version]
    if version and versions and version not in versions:
        raise _unknown_version(where, name, version, versions)
    asked = [entry for entry in entries if not version or entry.version in ("", version)]
    if not any(entry.ready for entry in asked):
        reason = next((entry.reason for entry in asked if entry.reason), "")
        raise ServerError(f"{where}: {name} is not ready{f': {reason}' if reason else ''}")


def _unknown_version(where: str, name: str, version: str, versions: Sequence[str]) -> UsageError:
    hint = f"it has {_listed(list(dict.fromkeys(versions)))}"
    return UsageError(f"{where}: {name} has no version {version!r}", hint=hint)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"{', '.join(names[:8])}{more}"
