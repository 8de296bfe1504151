"""One round of live verification: everything that can be compared with a live server, in order."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from vitdeploy.backends.base import Array
from vitdeploy.bundle.folder import Bundle
from vitdeploy.bundle.golden import reference_of
from vitdeploy.errors import UsageError, VitdeployError
from vitdeploy.predictor import Predictor
from vitdeploy.progress import Progress
from vitdeploy.verification.live.client import AnswerError, Client, parse_address
from vitdeploy.verification.live.diagnosis import explain_images, explain_tensors, relative
from vitdeploy.verification.live.discovery import (
    ExpectedPrecision,
    LiveModel,
    expected_precision,
    find_model,
)
from vitdeploy.verification.live.image_endpoints import ImageEndpoint, find_endpoint
from vitdeploy.verification.live.images import Expected, ImageCheck, check_images, expect, image_files
from vitdeploy.verification.live.report import Latency, LiveReport
from vitdeploy.verification.live.signature import (
    LabelCheck,
    SignatureCheck,
    check_labels,
    compare_signature,
    model_signature,
)
from vitdeploy.verification.live.tensors import (
    Encoding,
    LiveSession,
    Replay,
    measure_latency,
    plan_batches,
    replay,
)
from vitdeploy.verification.live.triton_client import connect
from vitdeploy.verification.parity import TOLERANCES

LATENCY_CALLS = 100
"""For the latency of a single verification."""
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
    calls: int = LATENCY_CALLS
    """For the latency."""

    def __post_init__(self) -> None:
        if not 0 < self.timeout < float("inf"):
            raise UsageError(f"a timeout of {self.timeout:g} s makes no sense", hint="--timeout 30")


class LiveVerification:
    """Holds a live server against a bundle, as often as asked; a context manager.

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
        self.signature = model_signature(self.bundle)
        self._local: Predictor | VitdeployError | None = None
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
            ParityError: the bundle has no golden data to compare with.
        """
        with self._connect() as client:
            return _Round(self, client, progress or Progress()).run()

    def local(self) -> Predictor | VitdeployError:
        """The bundle run here, or the reason why it does not."""
        if self._local is None:
            try:
                self._local = Predictor.open_most_exact(self.bundle)
            except VitdeployError as error:
                self._local = error
        return self._local

    def local_error(self, local: Predictor) -> float:
        """The largest relative error of the logits of the bundle run here, of the golden tensors."""
        if self._local_error is None:
            logits = local.outputs(self.golden["pixel_values"])["logits"]
            self._local_error = relative(reference_of(self.golden, "logits"), logits)
        return self._local_error

    def expected(self, local: Predictor) -> list[Expected]:
        """What the image files give here."""
        if self._expected is None:
            self._expected = expect(local, image_files(self.bundle))
        return self._expected

    def close(self) -> None:
        """Free what the runtime holds."""
        if isinstance(self._local, Predictor):
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
    """One comparison: what it finds wrong, why that may be, and what else there is to say."""

    def __init__(self, verification: LiveVerification, client: Client, progress: Progress) -> None:
        self.verification, self.client, self.progress = verification, client, progress
        self.bundle, self.request = verification.bundle, verification.request
        self.golden = verification.golden
        self.failures: list[str] = []
        self.causes: list[str] = []
        self.notes: list[str] = []

    def run(self) -> LiveReport:
        with self.progress.stage("connect") as stage:
            model = find_model(self.client, self.bundle, self.request.model, self.request.version)
            stage.detail = f"{model.server.name} {model.server.version}, {model.title}".replace(" ,", ",")
        precision = expected_precision(self.bundle, model, self.request.artifact)
        check = compare_signature(model.facts, self.verification.signature)
        self.failures += [f"{model.title}: {reason}" for reason in check.failures]
        self.notes += [*check.notes, *filter(None, [precision.note])]
        replayed, labels, latency = Replay(), LabelCheck(), None
        if check.images:
            self.notes.append(f"{model.name} takes image files, so no golden tensors were sent")
        elif check.failures:
            self.notes.append("no golden tensors were sent, as the model does not take or give what they are")
        else:
            replayed, labels, latency = self._tensors(model, precision, check)
        explain = not replayed.failures and not check.failures
        images = self._images(model, precision, replayed, explain=explain)
        self._compare_digests(model)
        return LiveReport(
            bundle=self.bundle.root,
            url=str(self.client.address),
            server=model.server,
            model=model.name,
            version=_version(model, replayed),
            precision=precision.precision,
            fits=replayed.fits,
            parity=tuple(replayed.records),
            labels=labels.compared,
            images=tuple(images.records),
            latency=latency,
            failures=tuple(self.failures),
            causes=tuple(dict.fromkeys(self.causes)),
            notes=tuple(self.notes),
        )

    def _tensors(
        self, model: LiveModel, precision: ExpectedPrecision, check: SignatureCheck
    ) -> tuple[Replay, LabelCheck, Latency | None]:
        signature = self.verification.signature
        image_bytes = max(1, self.golden["pixel_values"][:1].nbytes if self.golden else 1)
        batches = plan_batches(self.bundle, precision, model, check.batch, self.request.batches, image_bytes)

        def session(encoding: Encoding, model: LiveModel = model) -> LiveSession:
            return LiveSession(self.client, model, signature, precision.precision, batches.served, encoding)

        encodings: tuple[Encoding, ...] = ("binary", "json")
        if self.client.address.protocol == "grpc":
            encodings = ("protobuf",)
        max_abs = self.bundle.manifest.max_abs
        replayed = replay(session, encodings, batches.sizes, self.golden, max_abs, self.progress)
        self.failures += replayed.failures
        self.notes += replayed.notes
        if len(replayed.versions) > 1:
            self.notes.append(f"versions {' and '.join(sorted(replayed.versions))} answered in turn")
        if replayed.session is None:
            return replayed, LabelCheck(), None
        if replayed.failures:
            others = [v for v in model.facts.versions if v not in replayed.versions and v != model.asked]
            encoding = replayed.session.encoding
            versions = {v: session(encoding, replace(model, asked=v)) for v in others[:_OTHER_VERSIONS]}
            self._explain(model, precision, replayed, replayed.session, versions)
        inputs = self.golden["pixel_values"][: batches.served.min]
        labels = LabelCheck()
        if len(inputs) == batches.served.min:
            labels = check_labels(self.client, model, signature, self.bundle, inputs)
        self.failures += labels.failures
        self.causes += labels.causes
        self.notes += labels.notes
        return replayed, labels, self._latency(model, replayed.session)

    def _latency(self, model: LiveModel, session: LiveSession) -> Latency | None:
        try:
            with self.progress.stage("latency") as stage:
                latency = measure_latency(session, self.golden["pixel_values"], self.request.calls)
                stage.detail = f"{latency.calls} calls, median {latency.median_ms:.3g} ms"
        except AnswerError as error:
            self.failures.append(f"{model.title}, one call after the other: {error.message}")
            return None
        return latency

    def _explain(
        self,
        model: LiveModel,
        precision: ExpectedPrecision,
        replayed: Replay,
        session: LiveSession,
        versions: Mapping[str, LiveSession],
    ) -> None:
        """Look for what makes the golden tensors' answers wrong; ``versions`` are the model's others."""
        local = self.verification.local()
        predictor = local if isinstance(local, Predictor) else None
        tolerance = TOLERANCES[precision.precision].relative
        tolerance += _tolerance(predictor) if predictor else 0.0
        wrong = next((record.output for record in replayed.records if record.failures), None)
        output = wrong or self.bundle.manifest.output
        inputs, reference = self.golden["pixel_values"], reference_of(self.golden, output)

        def right(answers: Array) -> bool:
            return answers.shape == reference.shape and relative(reference, answers) <= tolerance

        with self.progress.stage("diagnosis"):
            if replayed.fits is not None and not any(r.metrics.nonfinite for r in replayed.records):
                self.causes.append(
                    f"the numbers are as exact as {replayed.fits}, not as {precision.precision}"
                )
            try:
                answers = session.answer_all(inputs, output)
            except AnswerError:
                return  # said already
            if not right(answers):
                text = explain_tensors(self.bundle, predictor, self.golden, answers, output, tolerance)
                self.causes += [text] if text else []
                for version, other in versions.items():
                    with contextlib.suppress(AnswerError, VitdeployError):
                        if right(other.answer_all(inputs, output)):
                            self.causes.append(
                                f"version {version} on the server gives the right answers: "
                                "the wrong one is asked"
                            )
            if not self.causes and model.facts.digest in (None, self.bundle.manifest.digest):
                self.notes.append("no common mistake explains the numbers: other weights, perhaps")

    def _images(
        self, model: LiveModel, precision: ExpectedPrecision, replayed: Replay, *, explain: bool
    ) -> ImageCheck:
        endpoint = self._image_endpoint(model)
        if isinstance(endpoint, str):
            self.notes.append(f"no image files were sent: {endpoint}")
            return ImageCheck()
        local = self.verification.local()
        if isinstance(local, VitdeployError):
            reason = f"nothing here runs the bundle to compare with ({local.message})"
            self.notes.append(f"no image files were sent: {reason}")
            return ImageCheck()
        tolerance = self._image_tolerance(precision, replayed, local)
        with self.progress.stage("images") as stage:
            expected = self.verification.expected(local)
            check = check_images(endpoint, expected, self.bundle.manifest.labels, tolerance)
            errors = [record.error for record in check.records if record.error is not None]
            worst = f", relative error {max(errors):.1e}" if errors else ""
            stage.detail = f"{len(check.records)} sent to {endpoint.title}{worst}"
        self.failures += check.failures
        self.causes += check.causes
        if check.failures and explain and errors:
            with self.progress.stage("diagnosis"):
                text = explain_images(self.bundle, local, check.answers, tolerance)
            self.causes += [text] if text else []
        return check

    def _image_tolerance(self, precision: ExpectedPrecision, replayed: Replay, local: Predictor) -> float:
        """What both sides' precisions may do to an image's logits.

        Where the golden tensors have shown what the two lose in fact, a few times that: a wrong resize filter
        changes less than the tolerances of fp16 allow.
        """
        allowed = TOLERANCES[precision.precision].relative + _tolerance(local)
        worst = [r.metrics.relative for r in replayed.records if r.output in (None, "logits")]
        if replayed.failures or not worst or None in worst:
            return allowed
        seen = max(filter(None, worst), default=0.0) + self.verification.local_error(local)
        return min(allowed, max(_MARGIN * seen, 2 * TOLERANCES["fp32"].relative))

    def _image_endpoint(self, model: LiveModel) -> ImageEndpoint | str:
        manifest, request = self.bundle.manifest, self.request
        if not manifest.classifies:
            return f"the model gives {manifest.gives}, which are no classes"
        if manifest.refuses_images:
            return f"the bundle {manifest.refuses_images}"
        return find_endpoint(self.client, model, request.timeout, request.headers, request.ca)

    def _compare_digests(self, model: LiveModel) -> None:
        """What it means that the server names another bundle than this one."""
        theirs, ours = model.facts.digest, self.bundle.manifest.digest
        if theirs is None or theirs == ours:
            return
        digests = f"digest {theirs[:12]}, not {ours[:12]}"
        if self.failures:
            self.causes.append(f"the server serves another bundle ({digests})")
        else:
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
        ParityError: the bundle has no golden data to compare with.
    """
    with LiveVerification(bundle, request) as verification:
        return verification.round(progress)


def _tolerance(predictor: Predictor) -> float:
    """The relative error that its precision allows."""
    return TOLERANCES[predictor.session.facts.precision].relative


def _version(model: LiveModel, replayed: Replay) -> str:
    if replayed.versions:
        return sorted(replayed.versions)[-1]
    return model.asked or (model.facts.versions[0] if len(model.facts.versions) == 1 else "")
