"""``vitdeploy verify``: a bundle on this machine, any ONNX file, or a live server, against the reference."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitdeploy.cli import output, parse, summary
from vitdeploy.cli.verify_file import verify_file
from vitdeploy.errors import ParityError, UsageError, VitdeployError

if TYPE_CHECKING:
    from vitdeploy.verification.live.report import LiveReport
    from vitdeploy.verification.live.round import LiveRequest
    from vitdeploy.verification.live.watch import WatchRound, WatchSummary
    from vitdeploy.verification.local import VerifyReport

SUMMARY = "Verify a bundle, anybody's ONNX file against its checkpoint, or a live server."
EXAMPLES = (
    "vitdeploy verify vit.bundle",
    "vitdeploy verify vit.bundle --backend onnxruntime,openvino --batch 1,8",
    "vitdeploy verify vit.bundle --backend triton",
    "vitdeploy verify vit.bundle --data held_out/ --max-drop 0.5 --json",
    "vitdeploy verify model.onnx -m my-vit/",
    "vitdeploy verify vit.bundle --url http://127.0.0.1:8000",
    "vitdeploy verify vit.bundle --url grpc://127.0.0.1:8001 --model vit --watch 60 --metrics-port 9100",
)


def command(
    bundle: Annotated[
        Path,
        typer.Argument(
            metavar="BUNDLE|FILE.onnx|FILE.plan|FOLDER",
            help="The bundle to verify; with -m, an ONNX file, an engine, or a folder with ONNX files.",
            show_default=False,
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help="Hold an ONNX file against this checkpoint, which is named as for `export`; with --url, the "
            "model's name on the server.  [default there: the bundle's]",
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="The weights of the named variant that -m says, to hold a file against."
        ),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="B,...", help="Backends to run.  [default: all that run its artifacts on this machine]"
        ),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(metavar="N,...", help="Batch sizes to run.  [default: each artifact's MIN,OPT,MAX]"),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Measure accuracy on labelled images: LABEL/*.png or LABEL_*.png."),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            metavar="P", help="Fail where top-1 on --data is more than P points below the reference's."
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(metavar="N", help="Number of CPU threads to use.  [default: the runtime's choice]"),
    ] = None,
    provider: Annotated[
        str | None,
        typer.Option(
            metavar="P", help="ONNX Runtime's execution provider: cpu, cuda, tensorrt or tensorrt-rtx."
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Verify the live server at http[s]://HOST:PORT or grpc[s]://HOST:PORT, not this machine.",
        ),
    ] = None,
    version: Annotated[
        str | None,
        typer.Option(metavar="V", help="The model's version on the server.  [default: the server's choice]"),
    ] = None,
    artifact: Annotated[
        str | None,
        typer.Option(
            metavar="A",
            help="The artifact whose tolerances judge the server.  [default: the one that it names]",
        ),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(metavar="S", help="Longest time, in seconds, for a call to the server.  [default: 30]"),
    ] = None,
    header: Annotated[
        list[str] | None,
        typer.Option(metavar="H", help='Send the header "Name: value" with every call; may be repeated.'),
    ] = None,
    ca_cert: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A PEM file with the certificates to trust with TLS."),
    ] = None,
    watch: Annotated[
        float | None, typer.Option(metavar="S", help="Verify the server every S seconds until Ctrl-C.")
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            metavar="PORT", help="With --watch, serve metrics for Prometheus on this port.", min=0, max=65535
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> int:
    """Verify a bundle on this machine; exit with 5 if anything does not hold.

    Checks every byte, the preprocessing, and the parity of every artifact on every backend with the float64
    reference. An artifact that no backend here can run is not verified, and fails too; with --backend, what
    the named ones cannot run is only listed.

    With -m, anybody's ONNX file, or a folder with some, is held against its checkpoint: parity, the dtype of
    every GEMM, weights, labels, preprocessing. What could not be checked is said.

    With --url, a live server of the Open Inference Protocol v2 (vitdeploy's, Triton, KServe) is asked
    instead: the golden tensors and images are sent to it, and what it answers is compared. Exits with 2
    if it cannot be asked; of --watch, with 5 if any round failed.
    """
    local = {
        "--backend": backend,
        "--data": data,
        "--max-drop": max_drop,
        "--threads": threads,
        "--provider": provider,
        "--checkpoint": checkpoint,
    }
    live = {
        "--version": version,
        "--artifact": artifact,
        "--timeout": timeout,
        "--header": header or None,
        "--ca-cert": ca_cert,
        "--watch": watch,
        "--metrics-port": metrics_port,
    }
    if url is None:
        _refuse(live, "is about a live server, and no --url names one", "--url http://127.0.0.1:8000")
        sizes = parse.integers(batch, "--batch") if batch is not None else None
        if model is not None or checkpoint is not None:
            of_bundles = {"--backend": backend, "--provider": provider}
            _refuse(
                of_bundles, "is about a bundle; a file is run by ONNX Runtime on the CPU", "leave {flag} out"
            )
            return verify_file(
                bundle,
                model,
                checkpoint,
                batches=sizes,
                data=data,
                max_drop=max_drop,
                threads=threads,
                as_json=as_json,
            )
        if bundle.is_file() or (bundle.is_dir() and _holds_files(bundle)):
            raise UsageError(
                f"{bundle} is no bundle; a file is held against the checkpoint that it was made from",
                hint=f"vitdeploy verify {shlex.quote(str(bundle))} -m CHECKPOINT",
            )
        return _verify_local(bundle, backend, sizes, data, max_drop, threads, provider, as_json)
    why = "is about how this machine runs the bundle, but --url asks a server"
    _refuse(local, why, "verify the bundle here first, without --url")
    return _verify_live(bundle, url, batch, {**live, "--model": model}, as_json)


def _refuse(flags: Mapping[str, object], why: str, hint: str) -> None:
    """Raise a UsageError for the first of the flags that is given; ``{flag}`` in the hint is its name."""
    if given := next((flag for flag, value in flags.items() if value is not None), None):
        raise UsageError(f"{given} {why}", hint=hint.format(flag=given))


def _holds_files(folder: Path) -> bool:
    """Whether a folder is no bundle, but one with ONNX files."""
    files = (path for pattern in ("*.onnx", "onnx/*.onnx") for path in folder.glob(pattern))
    return not (folder / "manifest.json").exists() and any(files)


def _verify_local(
    bundle: Path,
    backend: str | None,
    sizes: tuple[int, ...] | None,
    data: Path | None,
    max_drop: float | None,
    threads: int | None,
    provider: str | None,
    as_json: bool,
) -> int:
    from vitdeploy.backends.base import Options
    from vitdeploy.verification.local import verify_bundle

    named = parse.backends(backend, provider)
    options = Options(threads=threads, provider=provider)
    with output.Stages() as stages, output.stdout_is_ours():
        report = verify_bundle(
            bundle,
            backends=named,
            batches=sizes,
            data=data,
            max_drop=max_drop,
            options=options,
            progress=stages,
        )
    if not as_json:
        _print_local(report)
        report.check()
        return 0
    return summary.json_verdict(report)


def _print_local(report: VerifyReport) -> None:
    summary.print_parity(report.parity)
    for skipped in report.skipped:
        output.line(f"not run: {skipped.artifact} on {skipped.backend}: {skipped.reason}")
    if report.accuracy:
        summary.print_accuracy(report.accuracy)
    for fusion in report.fusion:
        output.heading(f"fusion of {fusion.artifact} on {fusion.backend}")
        for text in fusion.lines:
            output.line(text)
    for text in report.notes:
        output.line(f"note: {text}")
    if report.passed:
        compared = output.count(len(report.parity), "comparison")
        output.line()
        if report.unproven:
            output.line(f"not verified, as no named backend runs it: {', '.join(report.unproven)}")
        equal = "preprocessing equal, " if report.preprocess.images else ""
        output.line(f"{report.bundle}: verified: {report.files} files intact, {equal}{compared} passed")


def _verify_live(bundle: Path, url: str, batch: str | None, options: dict[str, Any], as_json: bool) -> int:
    from vitdeploy.verification.live.round import LATENCY_CALLS, LiveRequest
    from vitdeploy.verification.live.watch import WATCH_LATENCY_CALLS

    seconds = options["--watch"]
    if seconds is None and options["--metrics-port"] is not None:
        raise UsageError("--metrics-port goes with --watch", hint="--watch 60")
    if seconds is not None and not 0 < seconds < float("inf"):
        raise UsageError(f"--watch {seconds:g}: not a number of seconds", hint="--watch 60")
    timeout = options["--timeout"]
    request = LiveRequest(
        url=url,
        model=options["--model"],
        version=options["--version"] or "",
        artifact=options["--artifact"],
        batches=None if batch is None else parse.integers(batch, "--batch"),
        timeout=30.0 if timeout is None else timeout,
        headers=_headers(options["--header"]),
        ca=options["--ca-cert"],
        calls=LATENCY_CALLS if seconds is None else WATCH_LATENCY_CALLS,
    )
    if seconds is None:
        return _verify_once(bundle, request, as_json=as_json)
    return _watch(bundle, request, seconds, options["--metrics-port"], as_json=as_json)


def _headers(texts: Sequence[str] | None) -> dict[str, str]:
    """``["Authorization: Bearer x"]`` as names and values.

    Raises:
        UsageError: one is no header.
    """
    headers = {}
    for text in texts or ():
        name, colon, value = text.partition(":")
        name, value = name.strip(), value.strip()
        plain = name.isascii() and name.replace("-", "").replace("_", "").isalnum()
        if not colon or not plain or not value.isprintable():
            raise UsageError(f"--header {name}: is not NAME: VALUE", hint='--header "Host: vit.example.org"')
        headers[name] = value
    return headers


def _verify_once(bundle: Path, request: LiveRequest, *, as_json: bool) -> int:
    """Verify a live server and print what came out."""
    from vitdeploy.verification.live.round import verify_live
    from vitdeploy.verification.live.watch import in_a_thread

    with output.Stages() as stages, output.stdout_is_ours():
        report: LiveReport = in_a_thread(lambda: verify_live(bundle, request, stages))
    if not as_json:
        _print_live(report)
        report.check()
        return 0
    return summary.json_verdict(report)


def _watch(
    bundle: Path, request: LiveRequest, seconds: float, metrics_port: int | None, *, as_json: bool
) -> int:
    """Verify a live server until Ctrl-C or SIGTERM, one line per round, and print a summary."""
    from vitdeploy.verification.live.round import LiveVerification
    from vitdeploy.verification.live.watch import WatchMetrics, WatchSummary, watch

    total = WatchSummary()
    say = output.note if as_json else output.line

    def ended(done: WatchRound) -> None:
        say(_round_line(done))
        sys.stdout.flush()

    with contextlib.ExitStack() as stack:
        verification = LiveVerification(bundle, request)  # never closed: a round may be under way at the end
        metrics = None
        if metrics_port is not None:
            metrics = WatchMetrics(
                metrics_port, bundle=verification.bundle.manifest.digest, url=str(verification.address)
            )
            stack.callback(metrics.close)
            output.note(f"metrics: http://127.0.0.1:{metrics.port}/metrics")
        output.note(f"every {seconds:g} s until Ctrl-C: {verification.address}")
        try:
            watch(verification, seconds, ended=ended, metrics=metrics, total=total)
        except KeyboardInterrupt:
            output.note("")
    return _sum_up(total, as_json=as_json)


def _sum_up(total: WatchSummary, *, as_json: bool) -> int:
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


def _extremes(total: WatchSummary) -> str:
    text = f"relative error at most {output.small(total.worst)}"
    if total.medians_ms:
        text += f", median latency {min(total.medians_ms):.3g} to {max(total.medians_ms):.3g} ms"
    return text


def _round_line(done: WatchRound) -> str:
    head = f"{done.time}  round {done.number:<4}"
    if done.report is None:
        return f"{head} UNREACHABLE  {done.reason}"
    report = done.report
    latency = report.latency
    times = f"  p50 {latency.median_ms:.3g} ms  p99 {latency.p99_ms:.3g} ms" if latency else ""
    verdict = "ok" if report.passed else "FAILED"
    numbers = f"{verdict:<11}  relative error {output.small(report.worst)}{times}"
    return f"{head} {numbers}" if report.passed else f"{head} {numbers}  {report.reason}"


def _print_live(report: LiveReport) -> None:
    if report.parity:
        summary.print_parity(report.parity)
    if report.images:
        output.heading("image files")
        several = any(image.size for image in report.images)
        rows = [
            (
                image.image,
                image.format,
                *((image.size or "",) if several else ()),
                output.small(image.error),
                output.small(image.bound),
                image.expected,
                image.answered,
                "ok" if image.passed else "FAILED",
            )
            for image in report.images
        ]
        size = ("size",) if several else ()
        columns = ("image", "format", *size, ">relative", ">allowed", "expected", "answered", "")
        output.table(columns, rows)
    output.line()
    for name, value in _facts(report):
        output.line(f"{name}: {value}")
    for text in report.notes:
        output.line(f"note: {text}")
    for text in report.causes:
        output.line(f"likely cause: {text}")
    if report.passed:
        output.line(f"{report.url}: answers as {report.bundle} does: {_compared(report)}")


def _facts(report: LiveReport) -> list[tuple[str, str]]:
    server = f"{report.server.name} {report.server.version}".strip()
    version = f" version {report.version}" if report.version else ""
    facts = [("server", f"{server}, model {report.model}{version}")]
    if report.parity:
        fits = f"; the numbers fit {report.fits}" if report.fits else ""
        facts.append(("tolerance", f"{report.precision}{fits}"))
    if report.latency is not None:
        latency = report.latency
        what = "one image" if latency.batch == 1 else f"{latency.batch} images"
        times = f"{latency.median_ms:.3g} ms median, {latency.p90_ms:.3g} ms p90, {latency.p99_ms:.3g} ms p99"
        facts.append(("latency", f"{times} ({latency.calls} calls of {what}, {latency.encoding})"))
    return facts


def _compared(report: LiveReport) -> str:
    parts = [output.count(len(report.parity), "comparison")]
    if report.labels:
        parts.append(f"{report.labels} labels")
    if report.images:
        parts.append(output.count(len(report.images), "image file"))
    return ", ".join(parts)
