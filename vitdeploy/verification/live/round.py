"""One round of live verification: everything that can be compared with a live server, in order."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from vitdeploy.bundle.folder import Bundle
from vitdeploy.errors import UsageError, VitdeployError
from vitdeploy.progress import Progress
from vitdeploy.verification.live.address import parse_address
from vitdeploy.verification.live.client import AnswerError, Client
from vitdeploy.verification.live.diagnosis import explain_images, explain_tensors, relative
from vitdeploy.verification.live.image_endpoints import ImageEndpoint, find_endpoint
from vitdeploy.verification.live.images import Expected, ImageCheck, check_images, expect, image_files
from vitdeploy.verification.live.labels import LabelCheck, check_labels
from vitdeploy.verification.live.local import LocalModel
from vitdeploy.verification.live.report import Latency, LiveReport
from vitdeploy.verification.live.signature import SignatureCheck, check_signature, signature_of
from vitdeploy.verification.live.target import Judged, Target, find_target, judged_by
from vitdeploy.verification.live.tensors import (
    Batches,
    Replay,
    answers,
    measure_latency,
    plan_batches,
    replay,
)
from vitdeploy.verification.live.triton_client import connect
from vitdeploy.verification.parity import TOLERANCES

CALLS = 100
"""For the latency."""
_MARGIN = 4.0
"""Times the error seen on golden tensors: what an image may differ by."""
_OTHER_VERSIONS = 4
"""That are asked when the right one is wrong."""


@dataclass(frozen=True)
class LiveRequest:
    """What to compare a bundle with, and how."""

    url: str
    """``http://host:port``, ``grpc://host:port``; https and grpcs with TLS."""
    model: str | None = None
    """Its name there; None looks for the bundle's."""
    version: str = ""
    """Empty is the server's choice."""
    artifact: str | None = None
    """Whose precision the server's numbers are judged by; None is what the server says, else the loosest."""
    batches: Sequence[int] | None = None
    timeout: float = 30.0
    """Seconds for each call."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Sent with every call; of gRPC its metadata."""
    ca: Path | None = None
    """A PEM file with the certificates to trust."""
    calls: int = CALLS

    def __post_init__(self) -> None:
        if not 0 < self.timeout < float("inf"):
            raise UsageError(f"a timeout of {self.timeout:g} s makes no sense", hint="--timeout 30")


class LiveVerification:
    """Holds a live server against a bundle, as often as wanted; a context manager.

    What does not depend on the server is read and computed once.

    Raises:
        BundleError: there is no bundle, or it is damaged.
        UsageError: the URL or the artifact makes no sense.
        MissingDependency: tritonclient is not installed.
    """

    def __init__(self, bundle: str | os.PathLike[str] | Bundle, request: LiveRequest) -> None:
        self.address = parse_address(request.url)
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(Path(bundle))
        self.request = request
        self.golden = self.bundle.golden()
        self.signature = signature_of(self.bundle)
        self._local: LocalModel | VitdeployError | None = None
        self._expected: list[Expected] | None = None
        self._local_error: float | None = None
        if request.artifact is not None:
            self.bundle.artifact(request.artifact)
        self._connect().close()  # what is missing here is said before anything is waited for

    def round(self, progress: Progress | None = None) -> LiveReport:
        """Compare once.

        Raises:
            ServerError: the server cannot be asked.
            UsageError: it does not know the model or version, or does not take a batch size asked for.
            ParityError: the bundle has no golden data that proves anything.
        """
        with self._connect() as client:
            return _Round(self, client, progress or Progress()).run()

    def local(self) -> LocalModel | VitdeployError:
        """The bundle run here, or the reason why it does not."""
        if self._local is None:
            try:
                self._local = LocalModel.open(self.bundle)
            except VitdeployError as error:
                self._local = error
        return self._local

    def local_error(self, local: LocalModel) -> float:
        """The largest relative error of the bundle run here, of the golden tensors."""
        if self._local_error is None:
            self._local_error = relative(self.golden["reference"], local.run(self.golden["pixel_values"]))
        return self._local_error

    def expected(self, local: LocalModel) -> list[Expected]:
        """What the image files give here."""
        if self._expected is None:
            self._expected = expect(local, image_files(self.bundle))
        return self._expected

    def close(self) -> None:
        """Free what the runtime holds."""
        if isinstance(self._local, LocalModel):
            self._local.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _connect(self) -> Client:
        request = self.request
        return connect(self.address, timeout=request.timeout, headers=request.headers, ca=request.ca)


class _Round:
    def __init__(self, whole: LiveVerification, client: Client, progress: Progress) -> None:
        self.whole, self.client, self.progress = whole, client, progress
        self.bundle, self.request = whole.bundle, whole.request
        self.failures: list[str] = []
        self.causes: list[str] = []
        self.notes: list[str] = []

    def run(self) -> LiveReport:
        with self.progress.stage("connect") as stage:
            target = find_target(self.client, self.bundle, self.request.model, self.request.version)
            stage.detail = f"{target.server.name} {target.server.version}, {target.title}".replace(" ,", ",")
        judged = judged_by(self.bundle, target, self.request.artifact)
        check = check_signature(target.model, self.whole.signature)
        self.failures += [f"{target.title}: {reason}" for reason in check.failures]
        self.notes += [*check.notes, *filter(None, [judged.note])]
        done, labels, latency = Replay(), LabelCheck(), None
        if check.images:
            self.notes.append(f"{target.name} takes image files, so no golden tensors were sent")
        elif check.failures:
            self.notes.append("no golden tensors were sent, as the model does not take or give what they are")
        else:
            done, labels, latency = self._tensors(target, judged, check)
        images = self._images(target, judged, done, explain=not done.failures and not check.failures)
        self._other_build(target)
        return LiveReport(
            bundle=self.bundle.root,
            url=str(self.client.address),
            server=target.server,
            model=target.name,
            version=_version(target, done),
            precision=judged.precision,
            fits=done.fits,
            parity=tuple(done.records),
            labels=labels.compared,
            images=tuple(images.records),
            latency=latency,
            failures=tuple(self.failures),
            causes=tuple(dict.fromkeys(self.causes)),
            notes=tuple(self.notes),
        )

    def _tensors(
        self, target: Target, judged: Judged, check: SignatureCheck
    ) -> tuple[Replay, LabelCheck, Latency | None]:
        whole, client = self.whole, self.client
        image_bytes = whole.golden["pixel_values"][:1].nbytes if whole.golden else 1
        batches = plan_batches(
            self.bundle, judged, target, check.batch, self.request.batches, max(1, image_bytes)
        )
        done = replay(
            client,
            target,
            whole.signature,
            judged,
            batches,
            whole.golden,
            self.bundle.manifest.max_abs,
            self.progress,
        )
        self.failures += done.failures
        self.notes += done.notes
        if len(done.versions) > 1:
            self.notes.append(f"versions {' and '.join(sorted(done.versions))} answered in turn")
        if done.encoding is None:
            return done, LabelCheck(), None
        if done.failures:
            self._explain(target, judged, batches, done)
        inputs = whole.golden["pixel_values"][: batches.served.min]
        labels = LabelCheck()
        if len(inputs) == batches.served.min:
            labels = check_labels(client, target, whole.signature, self.bundle, inputs)
        self.failures += labels.failures
        self.causes += labels.causes
        self.notes += labels.notes
        return done, labels, self._latency(target, batches, done)

    def _latency(self, target: Target, batches: Batches, done: Replay) -> Latency | None:
        assert done.encoding is not None
        inputs, calls = self.whole.golden["pixel_values"], self.request.calls
        try:
            with self.progress.stage("latency") as stage:
                found = measure_latency(
                    self.client, target, self.whole.signature, batches, done.encoding, inputs, calls
                )
                stage.detail = f"{found.calls} calls, median {found.median_ms:.3g} ms"
        except AnswerError as error:
            self.failures.append(f"{target.title}, one call after the other: {error.message}")
            return None
        return found

    def _explain(self, target: Target, judged: Judged, batches: Batches, done: Replay) -> None:
        """Look for what makes the golden tensors' answers wrong."""
        assert done.encoding is not None
        local = self.whole.local()
        model = local if isinstance(local, LocalModel) else None
        tolerance = TOLERANCES[judged.precision].relative + (model.tolerance if model else 0.0)
        golden = self.whole.golden
        with self.progress.stage("diagnosis"):
            if done.fits is not None and not any(r.metrics.nonfinite for r in done.records):
                self.causes.append(f"the numbers are as exact as {done.fits}, not as {judged.precision}")
            try:
                found = answers(
                    self.client,
                    target,
                    self.whole.signature,
                    batches,
                    done.encoding,
                    golden["pixel_values"],
                )
            except AnswerError:
                return  # said already
            same = found.shape == golden["reference"].shape
            if not (same and relative(golden["reference"], found) <= tolerance):
                text = explain_tensors(self.bundle, model, golden, found, tolerance)
                self.causes += [text] if text else []
                self._other_versions(target, batches, done, tolerance)
            if not self.causes:
                self._say_unknown(target)

    def _say_unknown(self, target: Target) -> None:
        if target.model.digest in (None, self.bundle.manifest.digest):
            self.notes.append("no common mistake explains the numbers: other weights, perhaps")

    def _other_versions(self, target: Target, batches: Batches, done: Replay, tolerance: float) -> None:
        """Whether another version on the server gives the right answers."""
        assert done.encoding is not None
        golden = self.whole.golden
        others = [v for v in target.model.versions if v not in done.versions and v != target.asked]
        for version in others[:_OTHER_VERSIONS]:
            other = Target(target.server, target.model, version, target.index)
            try:
                found = answers(
                    self.client, other, self.whole.signature, batches, done.encoding, golden["pixel_values"]
                )
            except (AnswerError, VitdeployError):
                continue
            if found.shape == golden["reference"].shape and relative(golden["reference"], found) <= tolerance:
                self.causes.append(
                    f"version {version} on the server gives the right answers: the wrong one is asked"
                )

    def _images(self, target: Target, judged: Judged, done: Replay, *, explain: bool) -> ImageCheck:
        manifest = self.bundle.manifest
        place = self._image_endpoint(target)
        if isinstance(place, str):
            self.notes.append(f"no image files were sent: {place}")
            return ImageCheck()
        local = self.whole.local()
        if isinstance(local, VitdeployError):
            reason = f"nothing here runs the bundle to compare with ({local.message})"
            self.notes.append(f"no image files were sent: {reason}")
            return ImageCheck()
        tolerance = self._image_tolerance(judged, done, local)
        with self.progress.stage("images") as stage:
            check = check_images(place, self.whole.expected(local), manifest.labels, tolerance)
            errors = [record.error for record in check.records if record.error is not None]
            worst = f", relative error {max(errors):.1e}" if errors else ""
            stage.detail = f"{len(check.records)} sent to {place.title}{worst}"
        self.failures += check.failures
        self.causes += check.causes
        if check.failures and explain and any(record.error is not None for record in check.records):
            with self.progress.stage("diagnosis"):
                text = explain_images(self.bundle, local, check.answers, tolerance)
            self.causes += [text] if text else []
        return check

    def _image_tolerance(self, judged: Judged, done: Replay, local: LocalModel) -> float:
        """What both sides' precisions may do to an image's logits.

        Where the golden tensors have shown what the two lose in fact, a few times that: a wrong resize filter
        changes less than the tolerances of fp16 allow.
        """
        allowed = TOLERANCES[judged.precision].relative + local.tolerance
        worst = [r.metrics.relative for r in done.records]
        if done.failures or not worst or None in worst:
            return allowed
        seen = max(filter(None, worst), default=0.0) + self.whole.local_error(local)
        return min(allowed, max(_MARGIN * seen, 2 * TOLERANCES["fp32"].relative))

    def _image_endpoint(self, target: Target) -> ImageEndpoint | str:
        manifest, request = self.bundle.manifest, self.request
        if manifest.output != "logits":
            return f"the model gives {manifest.output}, which are no classes"
        if manifest.preprocess is None:
            return "the bundle says nothing of preprocessing"
        return find_endpoint(self.client, target, request.timeout, request.headers, request.ca)

    def _other_build(self, target: Target) -> None:
        """What it means that the server names another bundle than this one."""
        theirs, ours = target.model.digest, self.bundle.manifest.digest
        if theirs is None or theirs == ours:
            return
        if self.failures:
            self.causes.append(f"the server serves another bundle (digest {theirs[:12]}, not {ours[:12]})")
        else:
            digests = f"digest {theirs[:12]}, not {ours[:12]}"
            self.notes.append(f"the server's bundle is another build ({digests}) with the same answers")


def verify_live(
    bundle: str | os.PathLike[str] | Bundle, request: LiveRequest, progress: Progress | None = None
) -> LiveReport:
    """Hold a live server against a bundle once.

    Raises:
        BundleError: there is no bundle, or it is damaged.
        UsageError: the URL, the artifact, the model, its version or a batch size makes no sense.
        MissingDependency: tritonclient is not installed.
        ServerError: the server cannot be asked.
        ParityError: the bundle has no golden data that proves anything.
    """
    with LiveVerification(bundle, request) as whole:
        return whole.round(progress)


def _version(target: Target, done: Replay) -> str:
    if done.versions:
        return sorted(done.versions)[-1]
    return target.asked or (target.model.versions[0] if len(target.model.versions) == 1 else "")
