"""Which bundles are served under which names and versions; loading, and reloading without a gap."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitdeploy.backends.base import one_line
from vitdeploy.bundle.folder import Bundle
from vitdeploy.bundle.manifest import MANIFEST
from vitdeploy.config import size_name
from vitdeploy.errors import BundleError, UsageError, VitdeployError, did_you_mean
from vitdeploy.progress import Progress
from vitdeploy.server.loading import ModelSettings, Plans, load_bundle
from vitdeploy.server.messages import RequestError
from vitdeploy.server.served_model import InHand, ServedModel
from vitdeploy.server.statistics import Metrics, Statistics

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_FileState = tuple[int, int, int] | None


@dataclass(frozen=True)
class NamedBundle:
    """A bundle on disk and what it is called."""

    name: str
    version: str
    path: Path


def parse_named_bundles(texts: Sequence[str]) -> list[NamedBundle]:
    """Read ``[NAME[@VERSION]=]BUNDLE`` as the command line has it.

    Without a name, the folder's name up to its last dot; without a version, the next number after those
    of the same name before it.

    Raises:
        UsageError: a name or version that cannot be part of a URL, or one given twice.
    """
    bundles: dict[tuple[str, str], NamedBundle] = {}
    for text in texts:
        head, equals, tail = text.partition("=")
        if not equals or os.sep in head:
            head, tail = "", text
        name, at, version = head.partition("@")
        path = Path(tail)
        name = name or path.absolute().stem
        taken = [int(v) for n, v in bundles if n == name]
        version = version if at else str(max(taken, default=0) + 1)
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"{name!r} cannot name a model",
                hint=f"letters, digits and _ . - only: NAME={tail}",
            )
        if not re.fullmatch(r"[1-9][0-9]{0,17}", version):
            raise UsageError(f"{text}: version {version!r} is not a positive number")
        if (name, version) in bundles:
            raise UsageError(f"two bundles are {name} version {version}", hint=f"{name}@2={tail}")
        bundles[name, version] = NamedBundle(name, version, path)
    return list(bundles.values())


@dataclass
class _Entry:
    bundle: NamedBundle
    model: ServedModel | None = None
    reason: str = ""
    """Why it is not ready; empty if it is."""
    manifest: _FileState = None
    """Of the manifest that was loaded, or that could not be."""
    plans: Plans = field(default_factory=dict)
    """How it has been sharing out the processors."""


class ModelRepository:
    """The models of a server. Lives on the event loop."""

    def __init__(
        self,
        bundles: Sequence[NamedBundle],
        settings: ModelSettings,
        metrics: Metrics,
        workers: Executor,
        progress: Progress,
    ) -> None:
        self._entries = {(b.name, b.version): _Entry(b, reason="not loaded") for b in bundles}
        self._by_name: dict[str, list[_Entry]] = {}
        for entry in sorted(self._entries.values(), key=lambda e: int(e.bundle.version), reverse=True):
            self._by_name.setdefault(entry.bundle.name, []).append(entry)
        self._settings, self._metrics, self._workers, self._progress = settings, metrics, workers, progress
        self._changing = asyncio.Lock()
        self._retiring: set[asyncio.Task[None]] = set()

    async def load_all(self) -> None:
        """Load every bundle.

        Raises:
            VitdeployError: the first that cannot be; nothing is served then.
        """
        for entry in self._entries.values():
            await self._load(entry)

    def get(self, name: str, version: str = "") -> ServedModel:
        """The model to ask; the highest version that is ready where none is named.

        Raises:
            RequestError: there is none, or it is not ready.
        """
        entries = self._versions(name)
        if version:
            entry = self._entries.get((name, version))
            if entry is None:
                raise RequestError(
                    "not found", f"Request for unknown model: '{name}' version {version} is not found"
                )
            entries = [entry]
        for entry in entries:
            if entry.model is not None:
                return entry.model
        raise RequestError("unavailable", f"Request for unavailable model: '{name}': {entries[0].reason}")

    def using(self, name: str, version: str = "") -> InHand:
        """The model to ask, which stays open meanwhile, its statistics counting; raises as ``get``."""
        return self.get(name, version).in_hand()

    @property
    def ready(self) -> bool:
        """Whether every model is."""
        return all(entry.model is not None for entry in self._entries.values())

    @property
    def models(self) -> list[ServedModel]:
        """Those that are ready."""
        return [entry.model for entry in self._entries.values() if entry.model is not None]

    @property
    def busy(self) -> int:
        """Requests in hand, of all models."""
        return sum(model.busy for model in self.models)

    def abandon(self) -> None:
        """Refuse every request that waits for a session."""
        for model in self.models:
            model.abandon()

    def metadata(self, name: str, version: str = "") -> dict[str, Any]:
        """A model's metadata, with all its versions that are ready."""
        document = self.get(name, version).metadata()
        versions = [e.bundle.version for e in reversed(self._versions(name)) if e.model is not None]
        return {**document, "versions": versions}

    def index(self, *, ready: bool = False) -> list[dict[str, str]]:
        """Every model and version with its state, as the repository extension has it."""
        return [
            {
                "name": entry.bundle.name,
                "version": entry.bundle.version,
                "state": "UNAVAILABLE" if entry.model is None else "READY",
                "reason": entry.reason,
            }
            for entry in self._entries.values()
            if entry.model is not None or not ready
        ]

    async def load(self, name: str) -> None:
        """Load, or load again, every version of a model; until then requests go to the one there was.

        Raises:
            RequestError: unknown, or it cannot be loaded; what was served before still is.
        """
        for entry in self._versions(name):
            try:
                await self._load(entry)
            except VitdeployError as error:
                raise RequestError("invalid", f"failed to load '{name}': {error.message}") from error

    async def unload(self, name: str) -> None:
        """Stop serving every version of a model; requests in hand are finished.

        Raises:
            RequestError: unknown.
        """
        entries = self._versions(name)
        async with self._changing:
            for entry in entries:
                self._retire(entry.model)
                entry.model, entry.reason = None, "unloaded"

    async def watch(self, seconds: float) -> None:
        """Load again whatever changed on disk, looking every so many seconds, for ever; 0 is never.

        What does not load leaves the old one in service.
        """
        while seconds:
            await asyncio.sleep(seconds)
            for entry in self._entries.values():
                now = _manifest_state(entry.bundle.path)
                if entry.reason == "unloaded" or now is None or now == entry.manifest:
                    continue
                try:
                    await self._load(entry)
                except Exception as error:  # whatever it is, the others are looked after
                    what = f"{entry.bundle.name} version {entry.bundle.version}"
                    self._progress.note(f"{what} stays as it was: {_reason(error)}")

    async def close(self) -> None:
        """Finish what is in hand and free everything."""
        for entry in self._entries.values():
            self._retire(entry.model)
            entry.model, entry.reason = None, "the server is shutting down"
        await asyncio.gather(*self._retiring)

    def _versions(self, name: str) -> list[_Entry]:
        """The highest first."""
        if name not in self._by_name:
            raise RequestError(
                "not found",
                f"Request for unknown model: '{name}' is not found{did_you_mean(name[:200], self._by_name)}",
            )
        return self._by_name[name]

    async def _load(self, entry: _Entry) -> None:
        bundle = entry.bundle
        async with self._changing:
            entry.manifest = _manifest_state(bundle.path)
            with self._progress.stage(f"load {bundle.name}") as stage:
                try:
                    loaded = await asyncio.to_thread(load_bundle, bundle.path, self._settings, entry.plans)
                    entry.manifest = await asyncio.to_thread(_state_of, loaded.bundle, entry.manifest)
                except Exception as error:
                    self._count(bundle, "failed")
                    if entry.model is None:
                        entry.reason = _reason(error)
                    raise
                statistics = Statistics(self._metrics, bundle.name, bundle.version)
                before = entry.model
                entry.model = ServedModel(loaded, statistics, self._settings, self._workers)
                entry.reason, entry.plans = "", loaded.plans
                self._count(bundle, "ok")
                self._retire(before)
                facts, sizes = entry.model.facts, ", ".join(map(size_name, entry.model.sizes))
                what = f"{facts.artifact} on {facts.backend}{f' at {sizes}' if sizes else ''}"
                stage.detail = f"version {bundle.version}, {what}, parity passed"
            for note in loaded.notes:
                self._progress.note(f"{bundle.name}: {note}")

    def _count(self, bundle: NamedBundle, outcome: str) -> None:
        self._metrics.reloads.labels(bundle.name, bundle.version, outcome).inc()

    def _retire(self, model: ServedModel | None) -> None:
        """Close a model beside its successor's work."""
        if model is not None:
            task = asyncio.create_task(model.close())
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)


def _reason(error: Exception) -> str:
    return error.message if isinstance(error, VitdeployError) else one_line(error)


def _manifest_state(bundle: Path) -> _FileState:
    """What changes when a bundle is replaced; None where there is none."""
    try:
        status = (bundle / MANIFEST).stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _state_of(loaded: Bundle, before: _FileState) -> _FileState:
    """What the manifest on disk is, if it is the one that was loaded, in which a plan may have been kept;
    else what it was before."""
    now = _manifest_state(loaded.root)
    if now == before:
        return before
    try:
        same = Bundle.open(loaded.root).manifest.digest == loaded.manifest.digest
    except BundleError:
        same = False
    return now if same else before
