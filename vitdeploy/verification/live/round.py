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
from vitdeploy.bundle.dtypes import ArtifactPrecision
from vitdeploy.bundle.folder import Bundle
from vitdeploy.bundle.golden import reference_of
from vitdeploy.config import Output, size_name
from vitdeploy.errors import UsageError, VitdeployError
from vitdeploy.images.fitting import DEFAULT_RULE, Rule, parse_rule, require_size
from vitdeploy.predictor import Predictor
from vitdeploy.progress import Progress
from vitdeploy.verification.live.client import AnswerError, Client, parse_address
from vitdeploy.verification.live.diagnosis import explain_images, explain_size, explain_tensors, relative
from vitdeploy.verification.live.discovery import (
    ExpectedPrecision,
    LiveModel,
    expected_precision,
    find_model,
    model_at,
)
from vitdeploy.verification.live.image_endpoints import ImageEndpoint, find_endpoint
from vitdeploy.verification.live.images import ImageCheck, ImageFile, check_images, fitted, image_files
from vitdeploy.verification.live.report import ImageRecord, Latency, LiveReport
from vitdeploy.verification.live.signature import (
    LabelCheck,
    SignatureCheck,
    check_labels,
    compare_signature,
)
from vitdeploy.verification.live.subject import Subject, subjects_of
from vitdeploy.verification.live.tensors import (
    Encoding,
    LiveSession,
    Replay,
    fits,
    measure_latency,
    plan_batches,
    replay,
)
from vitdeploy.verification.live.triton_client import connect
from vitdeploy.verification.parity import TOLERANCES, passes

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
        self.subjects = subjects_of(self.bundle)
        self._files: dict[Rule, list[ImageFile]] = {}
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

    def files(self, rule: Rule) -> list[ImageFile]:
        """The image files that are sent to a server that fits them by this rule."""
        if rule not in self._files:
            self._files[rule] = image_files(self.bundle, rule)
        return self._files[rule]

    def close(self) -> None:
        """Free what the runtime holds."""
        for subject in self.subjects:
            subject.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _connect(self) -> Client:
        request = self.request
        return connect(self.address, timeout=request.timeout, headers=request.headers, ca=request.ca)


@dataclass
class _Sized:
    """What one image size is held against, and what that gave."""

    subject: Subject
    model: LiveModel
    precision: ExpectedPrecision
    comparable: bool = True
    """Whether the model takes and gives what the bundle does."""
    replayed: Replay = field(default_factory=Replay)

    @property
    def golden(self) -> Mapping[str, Array]:
        """The tensors that are sent, and what is right for them."""
        return self.subject.golden_of(self.precision.precision)

    @property
    def right(self) -> bool:
        """Whether the answers to tensors are."""
        return self.comparable and not self.replayed.failures


class _Round:
    """One comparison: what it finds wrong, why that may be, and what else there is to say."""

    def __init__(self, verification: LiveVerification, client: Client, progress: Progress) -> None:
        self.verification, self.client, self.progress = verification, client, progress
        self.bundle, self.request = verification.bundle, verification.request
        self.failures: list[str] = []
        self.causes: list[str] = []
        self.notes: list[str] = []
        self.labels: list[LabelCheck] = []
        self.latency: Latency | None = None

    def run(self) -> LiveReport:
        with self.progress.stage("connect") as stage:
            model = find_model(self.client, self.bundle, self.request.model, self.request.version)
            stage.detail = f"{model.server.name} {model.server.version}, {model.title}".replace(" ,", ",")
        first, *further = self.verification.subjects
        sizes = [self._at_size(first, model, replace(model, size=first.size))]
        if model.facts.takes_image_files:
            self.notes.append(f"{model.name} takes image files, so no golden tensors were sent")
        for subject in further:
            sizes.append(self._at_size(subject, model, self._model_at(model, subject)))
        images = self._images(model, sizes, explain=all(size.right for size in sizes))
        self._compare_digests(model)
        replayed = [size.replayed for size in sizes]
        return LiveReport(
            bundle=self.bundle.root,
            url=str(self.client.address),
            server=model.server,
            model=model.name,
            version=_version(model, replayed),
            precision=sizes[0].precision.precision,
            fits=fits(replayed),
            parity=tuple(record for one in replayed for record in one.records),
            labels=max((check.compared for check in self.labels), default=0),
            images=tuple(images),
            latency=self.latency,
            failures=tuple(self.failures),
            causes=tuple(dict.fromkeys(self.causes)),
            notes=tuple(dict.fromkeys(self.notes)),
        )

    def _model_at(self, model: LiveModel, subject: Subject) -> LiveModel | str:
        if model.facts.takes_image_files or subject.size is None:
            return replace(model, size=subject.size)
        return model_at(self.client, model, subject.signature.input, subject.size)

    def _at_size(self, subject: Subject, base: LiveModel, found: LiveModel | str) -> _Sized:
        """Hold one image size against the model that is there for it, or say why there is none."""
        model = base if isinstance(found, str) else found
        sized = _Sized(subject, model, expected_precision(subject.view, model, self.request.artifact))
        if isinstance(found, str):
            title = replace(base, size=subject.size).title
            self.failures.append(f"{title}: {found}")
            sized.comparable = False
            return sized
        check = compare_signature(model.facts, subject.signature)
        self.failures += [f"{model.title}: {reason}" for reason in check.failures]
        self.notes += [*check.notes, *filter(None, [sized.precision.note])]
        if check.failures:
            sized.comparable = False
            self.notes.append("no golden tensors were sent, as the model does not take or give what they are")
        elif not check.images:
            self._tensors(sized, check)
        return sized

    def _tensors(self, sized: _Sized, check: SignatureCheck) -> None:
        subject, model, precision = sized.subject, sized.model, sized.precision
        signature, golden = subject.signature, sized.golden
        image_bytes = max(1, golden["pixel_values"][:1].nbytes if golden else 1)
        batches = plan_batches(subject.view, precision, model, check.batch, self.request.batches, image_bytes)

        def session(encoding: Encoding, model: LiveModel = model) -> LiveSession:
            return LiveSession(self.client, model, signature, precision.precision, batches.served, encoding)

        encodings: tuple[Encoding, ...] = ("binary", "json")
        if self.client.address.protocol == "grpc":
            encodings = ("protobuf",)
        max_abs = self.bundle.manifest.max_abs
        replayed = replay(session, encodings, batches.sizes, golden, max_abs, self.progress)
        sized.replayed = replayed
        self.failures += replayed.failures
        self.notes += replayed.notes
        if len(replayed.versions) > 1:
            self.notes.append(f"versions {' and '.join(sorted(replayed.versions))} answered in turn")
        if replayed.session is None:
            return
        if replayed.failures:
            others = [v for v in model.facts.versions if v not in replayed.versions and v != model.asked]
            encoding = replayed.session.encoding
            versions = {v: session(encoding, replace(model, asked=v)) for v in others[:_OTHER_VERSIONS]}
            self._explain(sized, replayed.session, versions)
        inputs = golden["pixel_values"][: batches.served.min]
        if len(inputs) == batches.served.min:
            labels = check_labels(self.client, model, signature, subject.view, inputs)
            self.labels.append(labels)
            self.failures += labels.failures
            self.causes += labels.causes
            self.notes += labels.notes
        if subject is self.verification.subjects[0]:
            self.latency = self._measure(sized, replayed.session)

    def _measure(self, sized: _Sized, session: LiveSession) -> Latency | None:
        try:
            with self.progress.stage("latency") as stage:
                inputs = sized.golden["pixel_values"]
                latency = measure_latency(session, inputs, self.request.calls)
                stage.detail = f"{latency.calls} calls, median {latency.median_ms:.3g} ms"
        except AnswerError as error:
            self.failures.append(f"{sized.model.title}, one call after the other: {error.message}")
            return None
        return latency

    def _explain(self, sized: _Sized, session: LiveSession, versions: Mapping[str, LiveSession]) -> None:
        """Look for what makes the golden tensors' answers wrong; ``versions`` are the model's others."""
        subject, precision, replayed = sized.subject, sized.precision, sized.replayed
        local = subject.local()
        predictor = local if isinstance(local, Predictor) else None
        tolerance = TOLERANCES[precision.precision].relative
        tolerance += _tolerance(predictor) if predictor else 0.0
        wrong = next((record.output for record in replayed.records if record.failures), None)
        output = wrong or self.bundle.manifest.output
        inputs, reference = sized.golden["pixel_values"], reference_of(sized.golden, output)

        def right(answers: Array) -> bool:
            return answers.shape == reference.shape and relative(reference, answers) <= tolerance

        with self.progress.stage("diagnosis"):
            fitting = fits([replayed]) or self._quantised(subject, session, output)
            if fitting is not None and not any(r.metrics.nonfinite for r in replayed.records):
                self.causes.append(f"the numbers are as exact as {fitting}, not as {precision.precision}")
            try:
                answers = session.answer_all(inputs, output)
            except AnswerError:
                return  # said already
            if not right(answers):
                text = explain_tensors(subject.view, predictor, sized.golden, answers, output, tolerance)
                self.causes += [text] if text else []
                for version, other in versions.items():
                    with contextlib.suppress(AnswerError, VitdeployError):
                        if right(other.answer_all(inputs, output)):
                            self.causes.append(
                                f"version {version} on the server gives the right answers: "
                                "the wrong one is asked"
                            )
            if not self.causes and sized.model.facts.digest in (None, self.bundle.manifest.digest):
                self.notes.append("no common mistake explains the numbers: other weights, perhaps")

    def _quantised(self, subject: Subject, session: LiveSession, output: Output) -> ArtifactPrecision | None:
        """That of a quantised artifact whose tolerances the answers keep, on images of the user's own."""
        artifacts = subject.view.manifest.artifacts
        for precision in dict.fromkeys(one.precision for one in artifacts if one.is_quantised):
            golden = subject.golden_of(precision)
            with contextlib.suppress(AnswerError, KeyError):
                answers = session.answer_all(golden["pixel_values"], output)
                if passes(reference_of(golden, output), answers, TOLERANCES[precision], output):
                    return precision
        return None

    def _images(self, model: LiveModel, sizes: Sequence[_Sized], *, explain: bool) -> list[ImageRecord]:
        """Send image files, each held against the size that the server's rule chooses for it."""
        records: list[ImageRecord] = []
        endpoint = self._image_endpoint(model)
        if isinstance(endpoint, str):
            self.notes.append(f"no image files were sent: {endpoint}")
            return records
        rule = self._rule(model)
        files = self.verification.files(rule)
        groups = fitted(files, self.bundle, rule) if len(sizes) > 1 else {}
        for sized in sizes:
            size = sized.subject.size
            if chosen := files if size is None else groups.get(size):
                records += self._images_at_size(endpoint, sized, chosen, explain=explain)
        return records

    def _rule(self, model: LiveModel) -> Rule:
        """How the server says that it fits images to sizes."""
        if model.facts.fit is None:
            return DEFAULT_RULE
        try:
            rule = parse_rule(model.facts.fit)
            return rule if isinstance(rule, str) else require_size(rule, self.bundle.sizes)
        except UsageError:
            self.notes.append(f"the server fits images by {model.facts.fit!r:.40}, which is not known here")
            return DEFAULT_RULE

    def _images_at_size(
        self, endpoint: ImageEndpoint, sized: _Sized, files: Sequence[ImageFile], *, explain: bool
    ) -> list[ImageRecord]:
        subject = sized.subject
        local = subject.local()
        if isinstance(local, VitdeployError):
            reason = f"nothing here runs the bundle to compare with ({local.message})"
            self.notes.append(f"no image files were sent: {reason}")
            return []
        tolerance = self._image_tolerance(sized, local)
        with self.progress.stage("images") as stage:
            expected = subject.expected(local, files)
            check = check_images(endpoint, expected, self.bundle.manifest.labels, tolerance)
            errors = [record.error for record in check.records if record.error is not None]
            worst = f", relative error {max(errors):.1e}" if errors else ""
            at = f" at {size_name(subject.size)}" if subject.size else ""
            stage.detail = f"{len(check.records)} sent to {endpoint.title}{at}{worst}"
        self.failures += check.failures
        self.causes += check.causes
        if check.failures and explain and errors:
            with self.progress.stage("diagnosis"):
                text = self._at_another_size(subject, check, tolerance)
                text = text or explain_images(subject.view, local, check.answers, tolerance)
            self.causes += [text] if text else []
        return check.records

    def _at_another_size(self, subject: Subject, check: ImageCheck, tolerance: float) -> str | None:
        """Whether the server takes another image size than its rule says."""
        others = [other for other in self.verification.subjects if other is not subject]
        found = {other.size: local for other in others if isinstance(local := other.local(), Predictor)}
        sizes = {size: local for size, local in found.items() if size is not None}
        return explain_size(sizes, check.answers, self.bundle.manifest.labels, tolerance)

    def _image_tolerance(self, sized: _Sized, local: Predictor) -> float:
        """What both sides' precisions may do to an image's logits.

        Where the golden tensors have shown what the two lose in fact, a few times that: a wrong resize filter
        changes less than the tolerances of fp16 allow.
        """
        replayed = sized.replayed
        allowed = TOLERANCES[sized.precision.precision].relative + _tolerance(local)
        worst = [r.metrics.relative for r in replayed.records if r.output in (None, "logits")]
        if replayed.failures or not worst or None in worst:
            return allowed
        seen = max(filter(None, worst), default=0.0) + sized.subject.local_error(local)
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


def _version(model: LiveModel, replayed: Sequence[Replay]) -> str:
    if versions := set[str]().union(*(one.versions for one in replayed)):
        return sorted(versions)[-1]
    return model.asked or (model.facts.versions[0] if len(model.facts.versions) == 1 else "")
