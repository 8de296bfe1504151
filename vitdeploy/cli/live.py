"""``vitdeploy verify --url``: what of it is parsing and printing."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vitdeploy.cli import output, summary
from vitdeploy.errors import ParityError, UsageError, VitdeployError

if TYPE_CHECKING:
    from pathlib import Path

    from vitdeploy.verification.live.report import LiveReport
    from vitdeploy.verification.live.round import LiveRequest
    from vitdeploy.verification.live.watch import Round, Watch


def only_with_url(options: Mapping[str, object]) -> None:
    """Raise a UsageError for the first option given that is about a live server."""
    for flag, value in options.items():
        if value is not None:
            raise UsageError(
                f"{flag} is about a live server, and no --url names one", hint="--url http://127.0.0.1:8000"
            )


def not_with_url(options: Mapping[str, object]) -> None:
    """Raise a UsageError for the first option given that is about this machine."""
    for flag, value in options.items():
        if value is not None:
            raise UsageError(
                f"{flag} is about how this machine runs the bundle, but --url asks a server",
                hint="verify the bundle here first, without --url",
            )


def headers(texts: Sequence[str] | None) -> dict[str, str]:
    """``["Authorization: Bearer x"]`` as names and values.

    Raises:
        UsageError: one is no header.
    """
    found = {}
    for text in texts or ():
        name, colon, value = text.partition(":")
        name, value = name.strip(), value.strip()
        plain = name.isascii() and name.replace("-", "").replace("_", "").isalnum()
        if not colon or not plain or not value.isprintable():
            raise UsageError(f"--header {name}: is not NAME: VALUE", hint='--header "Host: vit.example.org"')
        found[name] = value
    return found


def once(bundle: Path, request: LiveRequest, *, as_json: bool) -> int:
    """Verify a live server and print what came out."""
    from vitdeploy.verification.live.round import verify_live
    from vitdeploy.verification.live.watch import in_a_thread

    with output.Stages() as stages, output.stdout_is_ours():
        report: LiveReport = in_a_thread(lambda: verify_live(bundle, request, stages))
    if not as_json:
        _print(report)
        report.check()
        return 0
    return summary.json_verdict(report)


def repeatedly(
    bundle: Path, request: LiveRequest, seconds: float, metrics_port: int | None, *, as_json: bool
) -> int:
    """Verify a live server until Ctrl-C or SIGTERM, one line per round, and print a summary."""
    from vitdeploy.verification.live.metrics import WatchMetrics
    from vitdeploy.verification.live.round import LiveVerification
    from vitdeploy.verification.live.watch import Watch, watch

    total = Watch()
    say = output.note if as_json else output.line

    def ended(done: Round) -> None:
        say(_round_line(done))
        sys.stdout.flush()

    with contextlib.ExitStack() as stack:
        whole = LiveVerification(bundle, request)  # never closed: a round may be under way at the end
        metrics = None
        if metrics_port is not None:
            metrics = WatchMetrics(metrics_port, bundle=whole.bundle.manifest.digest, url=str(whole.address))
            stack.callback(metrics.close)
            output.note(f"metrics: http://127.0.0.1:{metrics.port}/metrics")
        output.note(f"every {seconds:g} s until Ctrl-C: {whole.address}")
        try:
            watch(whole, seconds, ended=ended, metrics=metrics, total=total)
        except KeyboardInterrupt:
            output.note("")
    return _sum_up(total, as_json=as_json)


def _sum_up(total: Watch, *, as_json: bool) -> int:
    document = total.as_dict()
    problem: VitdeployError | None = None
    try:
        total.check()
    except ParityError as error:
        problem = error
        document["error"] = error.as_dict()
    if as_json:
        output.json_document(document)
    elif problem is None:
        output.line(f"{output.count(total.rounds, 'round')}, all passed; {_extremes(total)}")
    else:
        output.line(
            f"{output.count(total.rounds, 'round')}: {total.rounds - total.failures} passed, "
            f"{total.mismatches} mismatched, {total.unreachable} unreachable; {_extremes(total)}"
        )
    if problem is not None:
        output.error(problem.message, problem.hint)
    return 0 if problem is None else ParityError.exit_code


def _extremes(total: Watch) -> str:
    text = f"relative error at most {output.small(total.worst)}"
    if total.medians_ms:
        text += f", median latency {min(total.medians_ms):.3g} to {max(total.medians_ms):.3g} ms"
    return text


def _round_line(done: Round) -> str:
    head = f"{done.time}  round {done.number:<4}"
    if done.report is None:
        return f"{head} UNREACHABLE  {done.reason}"
    report = done.report
    latency = report.latency
    times = f"  p50 {latency.median_ms:.3g} ms  p99 {latency.p99_ms:.3g} ms" if latency else ""
    verdict = "ok" if report.passed else "FAILED"
    facts = f"{verdict:<11}  relative error {output.small(report.worst)}{times}"
    return f"{head} {facts}" if report.passed else f"{head} {facts}  {report.reason}"


def _print(report: LiveReport) -> None:
    if report.parity:
        summary.print_parity(report.parity)
    if report.images:
        output.heading("image files")
        rows = [
            (
                image.image,
                image.format,
                output.small(image.error),
                output.small(image.bound),
                image.expected,
                image.answered,
                "ok" if image.passed else "FAILED",
            )
            for image in report.images
        ]
        columns = ("image", "format", ">relative", ">allowed", "expected", "answered", "")
        output.table(columns, rows)
    output.line()
    for name, value in _facts(report):
        output.line(f"{name}: {value}")
    for text in report.notes:
        output.line(f"note: {text}")
    for text in report.causes:
        output.line(f"likely cause: {text}")
    if report.passed:
        output.line(f"{report.url}: answers as {report.bundle} does: {_proven(report)}")


def _facts(report: LiveReport) -> list[tuple[str, str]]:
    server = f"{report.server.name} {report.server.version}".strip()
    version = f" version {report.version}" if report.version else ""
    found = [("server", f"{server}, model {report.model}{version}")]
    if report.parity:
        fits = f"; the numbers fit {report.fits}" if report.fits else ""
        found.append(("tolerance", f"{report.precision}{fits}"))
    if report.latency is not None:
        latency = report.latency
        what = "one image" if latency.batch == 1 else f"{latency.batch} images"
        times = f"{latency.median_ms:.3g} ms median, {latency.p90_ms:.3g} ms p90, {latency.p99_ms:.3g} ms p99"
        found.append(("latency", f"{times} ({latency.calls} calls of {what}, {latency.encoding})"))
    return found


def _proven(report: LiveReport) -> str:
    parts = [output.count(len(report.parity), "comparison")]
    if report.labels:
        parts.append(f"{report.labels} labels")
    if report.images:
        parts.append(output.count(len(report.images), "image file"))
    return ", ".join(parts)
