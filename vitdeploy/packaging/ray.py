"""``--target ray``: a Ray Serve application, its config, and the bundle beside it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from vitdeploy.backends.base import Traits
from vitdeploy.errors import UsageError
from vitdeploy.packaging.target import (
    Job,
    Outcome,
    copy_bundle,
    fill_template,
    sizes_text,
    template,
    write_text,
)

SETTINGS = (
    "backend",
    "device",
    "threads",
    "max_batch",
    "max_delay_ms",
    "top_k",
    "min_replicas",
    "max_replicas",
    "fit",
)
BUNDLE = "model.bundle"
_MOST_REPLICAS = 4


def write(job: Job) -> Outcome:
    """Write the application.

    Raises:
        UsageError: the bundle gives no classes, or a setting does not fit the artifact.
    """
    manifest = job.bundle.manifest
    if not manifest.classifies:
        raise UsageError(f"{job.bundle.root}: gives {manifest.gives}, which are no classes of an image")
    if manifest.refuses_images:
        raise UsageError(
            f"{job.bundle.root}: {manifest.refuses_images}, which the application for Ray takes",
            hint="--target triton-server, kserve or docker serves tensors",
        )
    backend = job.backend()
    arguments = _arguments(job, backend.traits)
    copy_bundle(job, job.folder / BUNDLE)
    write_text(job.folder / "app.py", template("ray_app.py"))
    write_text(
        job.folder / "serve_config.yaml",
        _config(job, arguments, gpu=backend.traits.uses_gpu(arguments["provider"])),
    )
    extras = ",".join(("ray", *backend.traits.extras))
    readme = fill_template("ray.md", name=job.name, version=job.version, bundle=BUNDLE, extras=extras)
    rule = " `fit` in `serve_config.yaml` is the rule."
    write_text(job.folder / "README.md", readme + sizes_text(job, "image_sizes", rule))
    return Outcome(
        what={
            "serve_config.yaml": "what Ray Serve starts, and every setting",
            "app.py": "the application",
            "README.md": "how to start, call, change and deploy it",
        },
        next=(
            f'pip install "vitdeploy[{extras}]"',
            f"cd {shlex.quote(str(job.output))} && serve run serve_config.yaml",
            f"curl --data-binary @cat.jpg http://127.0.0.1:8000/v1/models/{job.name}:predict",
        ),
    )


def _arguments(job: Job, backend: Traits) -> dict[str, Any]:
    """What ``vitdeploy.ray.serving.DeploymentSettings`` takes."""
    settings, artifact = job.settings, job.artifact
    gpu_provider = "cuda" if "cuda" in backend.providers else None
    if settings.device == "cpu" and backend.needs_gpu:
        raise UsageError(
            f"{artifact.name}: the {backend.name} backend runs on a GPU only", hint="--device gpu"
        )
    if settings.device == "gpu" and not (gpu_provider or backend.needs_gpu):
        raise UsageError(f"--device gpu: not with the {backend.name} backend", hint="--backend onnxruntime")
    batch = settings.max_batch or artifact.batch.opt
    if batch > artifact.batch.max:
        raise UsageError(f"--max-batch {batch}: {artifact.name} takes at most {artifact.batch.max} images")
    return {
        "name": job.name,
        "version": str(job.version),
        "backend": backend.name,
        "artifact": artifact.name,
        "provider": gpu_provider if settings.device == "gpu" else None,
        "threads": settings.threads or 1,
        "max_batch": batch,
        "max_delay_ms": 5.0 if settings.max_delay_ms is None else settings.max_delay_ms,
        "top_k": settings.top_k or 5,
        "max_body_mb": 16,
        "fit": job.fit,
    }


def _config(job: Job, arguments: Mapping[str, Any], *, gpu: bool) -> str:
    settings = job.settings
    low = 1 if settings.min_replicas is None else settings.min_replicas
    batch = arguments["max_batch"]
    return fill_template(
        "ray_serve_config.yaml",
        num_gpus=int(gpu),
        min_replicas=low,
        max_replicas=settings.max_replicas or max(low, _MOST_REPLICAS),
        ongoing=2 * batch,
        queued=32 * batch,
        **{key: json.dumps(value) for key, value in arguments.items()},  # JSON is YAML
    )
