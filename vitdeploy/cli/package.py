"""``vitdeploy package``: a bundle as a folder that another server loads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitdeploy.cli import output

if TYPE_CHECKING:
    from vitdeploy.packaging.write import Package

SUMMARY = "Write a folder that another server loads."
EXAMPLES = (
    "vitdeploy package vit.bundle --target triton-server -o triton/",
    "vitdeploy package vit.bundle --target triton-server -o triton/ --artifact fp16 --device gpu",
    "vitdeploy package vit.bundle --target kserve -o kserve/ --storage-uri s3://models/vit",
    "vitdeploy package vit.bundle --target docker -o image/ --threads 4",
    "vitdeploy package vit.bundle --target ray -o ray/",
    "vitdeploy package vit.bundle --target hub -o vit/ --license apache-2.0",
)


_Device = Annotated[
    str | None,
    typer.Option(metavar="D", help="Device to run on: cpu or gpu.  [default: cpu; gpu for an engine]"),
]
_Backend = Annotated[
    str | None,
    typer.Option(
        metavar="B",
        help="Runtime inside of a docker or ray package.  [default: the first that reads the artifact]",
    ),
]
_Threads = Annotated[int | None, typer.Option(metavar="N", help="How many CPU threads each instance uses.")]
_Instances = Annotated[
    int | None, typer.Option(metavar="N", help="How many copies of the model a server runs.  [default: 1]")
]
_MaxBatch = Annotated[
    int | None,
    typer.Option(metavar="N", help="Largest batch that is computed together.  [default: the artifact's MAX]"),
]
_MaxDelay = Annotated[
    float | None,
    typer.Option(
        metavar="MS",
        help="Longest time that a request waits for others to share a batch.  [default: 2; docker: 0]",
    ),
]
_TopK = Annotated[
    int | None, typer.Option(metavar="K", help="How many labels an image request gets.  [default: 5]")
]
_TensorsOnly = Annotated[
    bool, typer.Option("--tensors-only", help="Leave out the models that take image files.")
]
_MinReplicas = Annotated[
    int | None, typer.Option(metavar="N", help="Fewest replicas that kserve or ray keeps.  [default: 1]")
]
_MaxReplicas = Annotated[
    int | None, typer.Option(metavar="N", help="Most replicas that kserve or ray starts.")
]
_StorageUri = Annotated[
    str | None, typer.Option(metavar="URI", help="Where a cluster with KServe will find the models.")
]
_Namespace = Annotated[str | None, typer.Option(metavar="NAME", help="Namespace of the service in KServe.")]
_Fit = Annotated[
    str | None,
    typer.Option(
        metavar="RULE",
        help="How an image gets one of a bundle's sizes: aspect, area, or HxW for all.  [default: aspect]",
    ),
]
_Image = Annotated[
    str | None, typer.Option(metavar="IMAGE", help="The container image to use, or to build upon.")
]
_Wheel = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Wheel of vitdeploy to install in the docker image, not the package index's."
    ),
]


_Push = Annotated[
    str | None,
    typer.Option(
        metavar="OWNER/NAME",
        help="Upload a hub folder to this repository, which is made where there is none.",
    ),
]
_Private = Annotated[
    bool, typer.Option("--private", help="Make the repository that --push names a private one.")
]
_License = Annotated[
    str | None, typer.Option(metavar="ID", help="Licence that the model card states, by the hub's name.")
]
_BaseModel = Annotated[
    str | None,
    typer.Option(
        metavar="OWNER/NAME", help="Model on the hub that this one is made from, for the model card."
    ),
]


def command(
    bundle: Annotated[
        Path, typer.Argument(metavar="BUNDLE", help="The bundle to package.", show_default=False)
    ],
    target: Annotated[
        str,
        typer.Option(
            metavar="T",
            help="What will load the folder: triton-server, kserve, docker, ray or hub.",
            show_default=False,
        ),
    ],
    folder: Annotated[
        Path, typer.Option("-o", "--output-dir", metavar="DIR", help="Folder to write.", show_default=False)
    ],
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Name of the model in the package.  [default: the bundle's]"),
    ] = None,
    model_version: Annotated[int, typer.Option(metavar="N", help="Version of the model in the package.")] = 1,
    artifact: Annotated[
        str | None,
        typer.Option(
            metavar="A", help="Name or precision of the artifact to package.  [default: the most precise]"
        ),
    ] = None,
    backend: _Backend = None,
    device: _Device = None,
    threads: _Threads = None,
    instances: _Instances = None,
    max_batch: _MaxBatch = None,
    max_delay_ms: _MaxDelay = None,
    top_k: _TopK = None,
    tensors_only: _TensorsOnly = False,
    min_replicas: _MinReplicas = None,
    max_replicas: _MaxReplicas = None,
    storage_uri: _StorageUri = None,
    namespace: _Namespace = None,
    image: _Image = None,
    wheel: _Wheel = None,
    fit: _Fit = None,
    push: _Push = None,
    private: _Private = False,
    license: _License = None,
    base_model: _BaseModel = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier package.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Write a folder that another server loads, from a bundle whose every hash is checked.

    triton-server: a model repository for NVIDIA's Triton Inference Server. kserve: the same, and an
    InferenceService. docker: our own server in an image. ray: a Ray Serve application. hub: what
    transformers, transformers.js and ONNX Runtime load, with a model card; --push uploads it.
    """
    from vitdeploy.images.fitting import parse_rule
    from vitdeploy.packaging.target import PackageSettings, checked_device
    from vitdeploy.packaging.write import write_package

    settings = PackageSettings(
        backend=backend,
        device=checked_device(device),
        threads=threads,
        instances=instances,
        max_batch=max_batch,
        max_delay_ms=max_delay_ms,
        top_k=top_k,
        min_replicas=min_replicas,
        max_replicas=max_replicas,
        storage_uri=storage_uri,
        namespace=namespace,
        image=image,
        wheel=str(wheel) if wheel else None,
        tensors_only=tensors_only or None,
        fit=None if fit is None else parse_rule(fit),
        push=push,
        private=private or None,
        license=license,
        base_model=base_model,
    )
    with output.stdout_is_ours():
        package = write_package(
            bundle,
            target,
            folder,
            name=name,
            version=model_version,
            artifact=artifact,
            settings=settings,
            force=force,
        )
    if as_json:
        output.json_document(package.as_dict())
    else:
        _print(package)


def _print(package: Package) -> None:
    output.heading(f"{package.folder}")
    output.table(
        ("file", ">size", "what"),
        [(file.path, output.size(file.size), file.what) for file in package.files],
    )
    for text in package.notes:
        output.line(f"note: {text}")
    output.heading("next")
    for text in package.next:
        output.line(f"  {text}")
