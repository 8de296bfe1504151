"""``vitdeploy verify``: prove a bundle on this machine, or hold a live server against it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitdeploy.cli import live, output, parse, summary
from vitdeploy.errors import UsageError

if TYPE_CHECKING:
    from vitdeploy.verification.local import VerifyReport

SUMMARY = "Prove a bundle on this machine, or a live server with it."
EXAMPLES = (
    "vitdeploy verify vit.bundle",
    "vitdeploy verify vit.bundle --backend onnxruntime,openvino --batch 1,8",
    "vitdeploy verify vit.bundle --backend triton",
    "vitdeploy verify vit.bundle --data held_out/ --json",
    "vitdeploy verify vit.bundle --url http://127.0.0.1:8000",
    "vitdeploy verify vit.bundle --url grpc://127.0.0.1:8001 --model vit --watch 60 --metrics-port 9100",
)


def command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle.", show_default=False)],
    backend: Annotated[
        str | None, typer.Option(metavar="B,...", help="Backends.  [default: all here that run artifacts]")
    ] = None,
    batch: Annotated[
        str | None, typer.Option(metavar="N,...", help="Batch sizes.  [default: each artifact's MIN,OPT,MAX]")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Labelled images: LABEL/*.png or LABEL_*.png; adds accuracy."),
    ] = None,
    threads: Annotated[int | None, typer.Option(metavar="N", help="CPU threads.")] = None,
    provider: Annotated[
        str | None, typer.Option(metavar="P", help="ONNX Runtime's: cpu, cuda, tensorrt, tensorrt-rtx.")
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="A live server: http[s]://HOST:PORT, grpc[s]://HOST:PORT."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Its name on the server.  [default: the bundle's]")
    ] = None,
    version: Annotated[
        str | None, typer.Option(metavar="V", help="Its version there.  [default: the server's choice]")
    ] = None,
    artifact: Annotated[
        str | None,
        typer.Option(metavar="A", help="Whose tolerances judge the server.  [default: the one it names]"),
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(metavar="S", help="Seconds for each call to the server.  [default: 30]")
    ] = None,
    header: Annotated[
        list[str] | None, typer.Option(metavar="H", help='"Name: value" for every call; may be repeated.')
    ] = None,
    ca_cert: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Certificates to trust with TLS (PEM).")
    ] = None,
    watch: Annotated[
        float | None, typer.Option(metavar="S", help="Ask the server every S seconds until Ctrl-C.")
    ] = None,
    metrics_port: Annotated[
        int | None, typer.Option(metavar="PORT", help="Of --watch: metrics for Prometheus.", min=0, max=65535)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> int:
    """Prove a bundle on this machine; exit with 5 if anything does not hold.

    Checks every byte, the preprocessing, and every artifact on every backend against the float64
    reference. An artifact that no backend here can run is not proven, and fails too; with --backend,
    what the named ones cannot run is only listed.

    With --url, a live server of the Open Inference Protocol v2 (vitdeploy's, Triton, KServe) is asked
    instead: the golden tensors and images are sent to it, and what it answers is compared. Exits with 2
    if it cannot be asked; of --watch, with 5 if any round failed.
    """
    here = {"--backend": backend, "--data": data, "--threads": threads, "--provider": provider}
    there = {
        "--model": model,
        "--version": version,
        "--artifact": artifact,
        "--timeout": timeout,
        "--header": header or None,
        "--ca-cert": ca_cert,
        "--watch": watch,
        "--metrics-port": metrics_port,
    }
    if url is None:
        live.only_with_url(there)
        return _here(bundle, backend, batch, data, threads, provider, as_json)
    live.not_with_url(here)
    return _live(bundle, url, batch, there, as_json)


def _live(bundle: Path, url: str, batch: str | None, options: dict[str, Any], as_json: bool) -> int:
    from vitdeploy.verification.live.round import CALLS, LiveRequest
    from vitdeploy.verification.live.watch import CALLS as FEWER

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
        headers=live.headers(options["--header"]),
        ca=options["--ca-cert"],
        calls=CALLS if seconds is None else FEWER,
    )
    if seconds is None:
        return live.once(bundle, request, as_json=as_json)
    return live.repeatedly(bundle, request, seconds, options["--metrics-port"], as_json=as_json)


def _here(
    bundle: Path,
    backend: str | None,
    batch: str | None,
    data: Path | None,
    threads: int | None,
    provider: str | None,
    as_json: bool,
) -> int:
    from vitdeploy.backends.base import Options
    from vitdeploy.verification.local import verify_bundle

    named = parse.backends(backend, provider)
    sizes = parse.integers(batch, "--batch") if batch is not None else None
    options = Options(threads=threads, provider=provider)
    with output.Stages() as stages, output.stdout_is_ours():
        report = verify_bundle(
            bundle, backends=named, batches=sizes, data=data, options=options, progress=stages
        )
    if not as_json:
        _print(report)
        report.check()
        return 0
    return summary.json_verdict(report)


def _print(report: VerifyReport) -> None:
    summary.print_parity(report.parity)
    for skipped in report.skipped:
        output.line(f"not run: {skipped.artifact} on {skipped.backend}: {skipped.reason}")
    if report.accuracy:
        output.heading(f"accuracy on {report.accuracy[0].images} images")
        rows = [
            (a.model, a.backend, f"{100 * a.correct / a.images:.2f} %", f"{a.agree}/{a.images}")
            for a in report.accuracy
        ]
        output.table(("model", "backend", ">accuracy", ">as the reference"), rows)
    for fusion in report.fusion:
        output.heading(f"fusion of {fusion.artifact} on {fusion.backend}")
        for text in fusion.lines:
            output.line(text)
    for text in report.notes:
        output.line(f"note: {text}")
    if report.passed:
        compared = f"{len(report.parity)} comparisons"
        output.line()
        if report.unproven:
            output.line(f"not proven, as no named backend runs it: {', '.join(report.unproven)}")
        output.line(
            f"{report.bundle}: proven: {report.files} files intact, preprocessing equal, {compared} passed"
        )
