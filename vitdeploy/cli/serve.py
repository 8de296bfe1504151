"""``vitdeploy serve``: bundles as a running service."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from vitdeploy.cli import output, parse

if TYPE_CHECKING:
    from vitdeploy.server.process import RunningServer

SUMMARY = "Serve bundles over HTTP and gRPC."
EXAMPLES = (
    "vitdeploy serve vit.bundle",
    "vitdeploy serve vit.bundle --port 8000 --grpc-port 8001 --max-batch 16 --max-delay-ms 2",
    "vitdeploy serve cats=old.bundle cats=new.bundle dogs=dogs.bundle --host 0.0.0.0",
    "vitdeploy serve vit.bundle --max-latency-ms 100",
    "vitdeploy serve vit.bundle --instances 2 --threads 1 --plan-seconds 0",
    "vitdeploy serve sizes.bundle --fit area",
    "curl --data-binary @cat.jpg localhost:8000/v1/models/vit:predict",
)


def command(
    bundles: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME[@VERSION]=]BUNDLE...",
            help="Bundles to serve. NAME is the folder's name without its suffix where none is given.",
            show_default=False,
        ),
    ],
    host: Annotated[
        str, typer.Option(metavar="H", help="Address to listen on; 0.0.0.0 is every network.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="P", help="Port for HTTP; 0 is any free one.")
    ] = 8000,
    grpc_port: Annotated[
        int | None,
        typer.Option(
            min=0, max=65535, metavar="P", help="Port for gRPC; 0 is any free one.  [default: no gRPC]"
        ),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="B", help="Runtime to serve with.  [default: what `bench --pick` chose, else onnxruntime]"
        ),
    ] = None,
    artifact: Annotated[
        str | None,
        typer.Option(
            metavar="A", help="Artifact to serve, by name or precision.  [default: the most precise]"
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(metavar="N", help="CPU threads of each session.")] = None,
    provider: Annotated[
        str | None,
        typer.Option(
            metavar="P", help="Execution provider of ONNX Runtime: cpu, cuda, tensorrt, tensorrt-rtx."
        ),
    ] = None,
    instances: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Number of sessions per model and image size.  [default: what was found best, else 1]",
        ),
    ] = None,
    plan_seconds: Annotated[
        float,
        typer.Option(
            min=0,
            max=3600,
            metavar="S",
            help="Time for measuring which sessions, threads and batch serve most here, of each model whose "
            "bundle has no plan for this machine; 0 measures nothing.",
        ),
    ] = 10.0,
    max_latency_ms: Annotated[
        float | None,
        typer.Option(min=0, metavar="MS", help="Longest 99th percentile of a run that a plan may have."),
    ] = None,
    max_batch: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Largest number of images that run together.  [default: the artifact's]"
        ),
    ] = None,
    max_delay_ms: Annotated[
        float,
        typer.Option(
            min=0, max=60000, metavar="MS", help="Longest time that a free session waits for more requests."
        ),
    ] = 0.0,
    buckets: Annotated[
        str | None, typer.Option(metavar="N,...", help="Fill batches up to these sizes.  [default: any size]")
    ] = None,
    max_queue: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Largest number of images that wait in the queue; more are refused with 429.",
        ),
    ] = 256,
    timeout: Annotated[
        str, typer.Option(metavar="T", help="Longest time that a request waits in the queue.")
    ] = "30s",
    max_body: Annotated[
        str, typer.Option(metavar="SIZE", help="Largest size of a request's body.")
    ] = "64MiB",
    max_pixels: Annotated[
        int, typer.Option(min=1, metavar="N", help="Largest number of pixels of an image.")
    ] = 50_000_000,
    max_images: Annotated[
        int, typer.Option(min=1, metavar="N", help="Largest number of image files in a request.")
    ] = 64,
    fit: Annotated[
        str,
        typer.Option(
            metavar="RULE",
            help="How an image gets one of a bundle's sizes: aspect (nearest aspect ratio, then area), area, "
            "or HxW for all.",
        ),
    ] = "aspect",
    drain: Annotated[
        str, typer.Option(metavar="T", help="Longest time that the end waits for accepted requests.")
    ] = "30s",
    reload_seconds: Annotated[
        float,
        typer.Option(
            min=0,
            max=86400,
            metavar="S",
            help="Time between two checks whether a bundle changed; 0 is never.",
        ),
    ] = 2.0,
    fixed_models: Annotated[
        bool, typer.Option("--fixed-models", help="Clients may not load and unload models.")
    ] = False,
    no_explain: Annotated[
        bool,
        typer.Option(
            "--no-explain", help="Clients may not ask where a model looks, for which PyTorch is started."
        ),
    ] = False,
) -> int:
    """Serve bundles over HTTP and gRPC until Ctrl-C or SIGTERM, which loses no request.

    The Open Inference Protocol v2 (tritonclient works unchanged), image files at
    /v1/models/NAME:predict, or for vectors at /v1/embeddings (openai's client works unchanged), where
    the model looks at /v1/models/NAME:explain, Prometheus metrics at /metrics, a page to try images at
    /. Each bundle is checked against its golden outputs before it takes requests; one that is replaced
    on disk is loaded anew without a gap. What shares out the processors best is measured once
    (--plan-seconds) and kept in the bundle for this machine; flags that say it win. Requests of all
    clients are batched together. A bundle with several image sizes is one model: tensors go to the size
    that they have, images to the one that --fit chooses, and the answer says which.
    """
    from vitdeploy.backends.base import Options
    from vitdeploy.explanation.answering import COMMAND as explaining
    from vitdeploy.images.fitting import parse_rule
    from vitdeploy.server.loading import ModelSettings
    from vitdeploy.server.process import Endpoint, run_server
    from vitdeploy.server.repository import parse_named_bundles
    from vitdeploy.server.service import RequestLimits

    options = Options(threads=threads, provider=provider)
    sizes = parse.integers(buckets, "--buckets") if buckets is not None else ()
    wait, delay = parse.duration(timeout, "--timeout"), max_delay_ms / 1000
    settings = ModelSettings(
        backend=backend,
        artifact=artifact,
        options=options,
        instances=instances,
        plan_seconds=plan_seconds,
        max_latency_ms=max_latency_ms,
        max_batch=max_batch,
        max_delay=delay,
        max_queue=max_queue,
        timeout=wait,
        buckets=sizes,
        max_pixels=max_pixels,
        fit=parse_rule(fit),
    )
    body = parse.byte_count(max_body, "--max-body") or RequestLimits.body_bytes
    limits, ending = RequestLimits(body_bytes=body, images=max_images), parse.duration(drain, "--drain")
    looking = () if no_explain else explaining
    endpoint = Endpoint(host, port, grpc_port, reload_seconds, ending, not fixed_models, looking, limits)
    with output.Stages() as stages:
        end = run_server(parse_named_bundles(bundles), settings, endpoint, started=_started, progress=stages)
    answered = "every accepted request answered" if end.complete else f"not all was answered within {drain}"
    output.note(f"stopped by signal {end.signal}, {answered}")
    return 0


def _started(server: RunningServer) -> None:
    for model in server.repository.models:
        if model.note:
            output.note(f"{model.name}: {model.note}")
        takes = f"tensors at {server.url}/v2/models/{model.name}/infer"
        if model.bundle.manifest.classifies_images:
            takes = f"curl --data-binary @IMAGE {server.url}/v1/models/{model.name}:predict"
        elif model.bundle.manifest.embeds_images:
            takes = (
                "curl -H Content-Type:image/jpeg --data-binary @IMAGE "
                f"{server.url}/v1/embeddings?model={model.name}"
            )
        output.note(f"  {model.name} version {model.version}: {takes}")
    output.note(f"serving {server.url}" + (f", gRPC {server.grpc}" if server.grpc else ""))
