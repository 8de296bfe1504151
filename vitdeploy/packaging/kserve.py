"""``--target kserve``: a model repository for the cluster's storage, an InferenceService that loads it."""

from __future__ import annotations

import importlib
import math
import re
import shlex
from dataclasses import replace
from typing import Any

from vitdeploy.errors import MissingDependency, UsageError
from vitdeploy.packaging.target import MAX_LABEL, Job, Outcome, fill_template, label, write_text
from vitdeploy.packaging.triton_network import device_of
from vitdeploy.packaging.triton_repository import (
    IMAGE,
    MODELS,
    TritonRepository,
    why_tensors_only,
)
from vitdeploy.packaging.triton_server import shared_weights, sizes_readme, write_dockerfile

SETTINGS = (
    "device",
    "threads",
    "instances",
    "max_batch",
    "max_delay_ms",
    "top_k",
    "min_replicas",
    "max_replicas",
    "storage_uri",
    "namespace",
    "image",
    "tensors_only",
    "fit",
)

SERVICE = "inferenceservice.yaml"
SCHEMES = ("s3", "gs", "hf", "https", "http", "pvc", "hdfs", "webhdfs", "oci", "abfs")
"""What KServe's storage initialiser fetches from."""

_MIN_REPLICAS, _MAX_REPLICAS = 1, 3
_CPUS = 2
_GIB = 2**30
_DNS = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")


def write(job: Job) -> Outcome:
    """Write the repository, the service and a README.

    Raises:
        UsageError: no usable storage, or as ``triton-server``.
        MissingDependency: tritonclient or PyYAML is not installed.
    """
    uri = _checked_uri(job.settings.storage_uri)
    _check_namespace(job.settings.namespace)
    job = _with_threads(job)
    refused = why_tensors_only(job)
    images = refused is None and job.settings.image is not None and not job.settings.tensors_only
    repository = TritonRepository(job, images=images)
    repository.write()
    service = label(job.name)
    write_text(job.folder / SERVICE, _yaml(inference_service(job, repository, uri)))
    notes = [*_notes(job, service, refused), *shared_weights(job, repository)]
    what = {**repository.what, SERVICE: "the service", "README.md": "how to upload, start and verify it"}
    if images:
        write_dockerfile(job, IMAGE)
        what["Dockerfile"] = f"the server with Pillow: to be pushed as {job.settings.image}"
    write_text(job.folder / "README.md", _readme(job, repository, service, uri))
    yaml = shlex.quote(str(job.output / SERVICE))
    return Outcome(
        what,
        next=(f"copy what is in {job.output / MODELS} to {uri}", f"kubectl apply -f {yaml}"),
        notes=tuple(notes),
    )


def _with_threads(job: Job) -> Job:
    """The job with a number of threads on the CPU: what the service asks for is what the server starts."""
    if job.settings.threads is not None or device_of(job) == "gpu":
        return job
    return replace(job, settings=replace(job.settings, threads=_CPUS))


def inference_service(job: Job, repository: TritonRepository, uri: str) -> dict[str, Any]:
    """The InferenceService (``serving.kserve.io/v1beta1``)."""
    settings, batching = job.settings, repository.batching
    low = _MIN_REPLICAS if settings.min_replicas is None else settings.min_replicas
    high = settings.max_replicas or max(_MAX_REPLICAS, low)
    # As many requests in flight as fill a replica's batches: more wait in its queue.
    busy = max(job.artifact.batch.opt if batching.max else 1, 1) * (settings.instances or 1)
    metadata: dict[str, Any] = {
        "name": label(job.name),
        "labels": {"app.kubernetes.io/managed-by": "vitdeploy"},
        "annotations": {
            "vitdeploy-bundle": job.bundle.manifest.digest,
            "vitdeploy-artifact": job.artifact.name,
            "autoscaling.knative.dev/metric": "concurrency",
            "autoscaling.knative.dev/target": str(min(busy, batching.max or busy)),
        },
    }
    if settings.namespace:
        metadata["namespace"] = settings.namespace
    predictor: dict[str, Any] = {
        "minReplicas": low,
        "maxReplicas": high,
        "model": _model(job, repository, uri),
    }
    if repository.images:  # tensors travel to the Python steps through shared memory
        predictor["volumes"] = [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}}]
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": metadata,
        "spec": {"predictor": predictor},
    }


def _model(job: Job, repository: TritonRepository, uri: str) -> dict[str, Any]:
    """The predictor's model: KServe's own Triton runtime, at the version whose runtimes read the artifact."""
    model: dict[str, Any] = {
        "modelFormat": {"name": "triton", "version": "2"},
        "runtime": "kserve-tritonserver",
        "protocolVersion": "v2",
        "storageUri": uri,
        "resources": _resources(job, repository),
        "env": [{"name": name, "value": value} for name, value in _environment(job).items()],
    }
    if job.settings.image:
        model["image"] = job.settings.image
    else:
        model["runtimeVersion"] = IMAGE.rpartition(":")[2]
    if repository.images:
        model["volumeMounts"] = [{"name": "shm", "mountPath": "/dev/shm"}]
    return model


def _environment(job: Job) -> dict[str, str]:
    """Of the server: ONNX Runtime tells nobody that it runs; no library starts more threads than it has."""
    threads = job.settings.threads
    return {"ORT_DISABLE_TELEMETRY": "1", **({"OMP_NUM_THREADS": str(threads)} if threads else {})}


def _resources(job: Job, repository: TritonRepository) -> dict[str, Any]:
    """Requests and limits: the cores that the threads keep busy, memory for three copies of the weights."""
    instances = job.settings.instances or 1
    cpus = (job.settings.threads or _CPUS) * instances + int(repository.images)
    weights = sum(network.artifact.size for network in repository.networks)
    memory = 1 + math.ceil(3 * instances * weights / _GIB) + 2 * int(repository.images)
    amounts = {"cpu": str(cpus), "memory": f"{memory}Gi"}
    if repository.device == "gpu":
        amounts["nvidia.com/gpu"] = "1"
    return {"requests": amounts, "limits": dict(amounts)}


def _checked_uri(uri: str | None) -> str:
    example = "--storage-uri s3://BUCKET/PATH, or gs://, hf://, https://, pvc://CLAIM/PATH"
    if uri is None:
        raise UsageError("kserve needs --storage-uri: where the cluster will find the models", hint=example)
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme not in SCHEMES or not re.fullmatch(r"[^\s/][^\s]*", rest):
        raise UsageError(f"--storage-uri {uri!r}: not an address that KServe fetches from", hint=example)
    archive = rest.endswith((".tar.gz", ".tgz", ".zip")) or re.search(
        r"\.(blob|file)\.core\.windows\.net/", rest
    )
    if scheme in ("http", "https") and not archive:
        raise UsageError(
            f"--storage-uri {uri}: over {scheme}, KServe fetches one archive",
            hint="name a .tar.gz or .zip of what is in models/",
        )
    if not uri.isprintable() or uri.rstrip("/").endswith(("/..", "/.")) or "/../" in uri:
        raise UsageError(f"--storage-uri {uri!r}: not a plain address", hint=example)
    return uri.rstrip("/")


def _check_namespace(namespace: str | None) -> None:
    if namespace is not None and not _DNS.fullmatch(namespace):
        raise UsageError(
            f"--namespace {namespace!r}: no name of a namespace", hint="lower-case letters, digits and -"
        )


def _notes(job: Job, service: str, refused: str | None) -> list[str]:
    notes = []
    if service != job.name:
        notes.append(f"the service is named {service}: clusters allow a-z, 0-9 and -, up to {MAX_LABEL}")
    if refused is not None:
        notes.append(f"tensors in, tensors out only: {refused}")
    elif job.settings.image is None and not job.settings.tensors_only:
        notes.append(
            "tensors in, tensors out only: decoding images needs a server with Pillow, which --image names"
        )
    return notes


def _yaml(content: dict[str, Any]) -> str:
    try:
        yaml = importlib.import_module("yaml")
    except ImportError as error:
        raise MissingDependency("pyyaml", extra="package", purpose="an InferenceService") from error
    return str(yaml.safe_dump(content, sort_keys=False, default_flow_style=False, allow_unicode=True))


def _readme(job: Job, repository: TritonRepository, service: str, uri: str) -> str:
    text = fill_template(
        "kserve.md",
        name=job.name,
        service=service,
        bundle=job.bundle.root.resolve().name,
        artifact=f"{job.artifact.name} ({job.artifact.precision})",
        models=MODELS,
        uri=uri,
        copy=_copy_command(uri),
        yaml=SERVICE,
        namespace=f" -n {job.settings.namespace}" if job.settings.namespace else "",
        input=job.artifact.inputs[0].name,
        outputs=", ".join(f"`{spec.name}`" for spec in job.artifact.outputs),
    )
    text += sizes_readme(job, repository)
    if repository.images:
        text += fill_template("kserve_images.md", image=job.settings.image, name=job.name)
    return text


def _copy_command(uri: str) -> str:
    """How the repository gets to its storage, where one command does it."""
    scheme = uri.partition("://")[0]
    target = shlex.quote(uri)
    commands = {
        "s3": f"aws s3 sync {MODELS} {target}",
        "gs": f"gcloud storage rsync --recursive {MODELS} {target}",
        "pvc": f"kubectl cp {MODELS}/. POD:/mnt/{uri.partition('://')[2].partition('/')[2]}"
        "  # POD mounts the claim at /mnt",
    }
    if uri.endswith((".tar.gz", ".tgz")):
        return f"tar -czf models.tar.gz -C {MODELS} .  # and publish it as {uri}"
    return commands.get(scheme, f"# copy what is in {MODELS}/ to {uri}")
