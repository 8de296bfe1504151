"""``--target ray``: a Ray Serve application, its config, and the bundle beside it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping

from vitdeploy.backends.base import get_backend, require_support
from vitdeploy.errors import UsageError
from vitdeploy.packaging.common import copy_bundle, render, template, write_text
from vitdeploy.packaging.target import Job, Outcome
from vitdeploy.predictor import DEFAULT_BACKEND

SETTINGS = (
    "backend",
    "device",
    "threads",
    "max_batch",
    "max_delay_ms",
    "top_k",
    "min_replicas",
    "max_replicas",
)
BUNDLE = "model.bundle"
_MOST_REPLICAS = 4
_ENGINES = ("tensorrt", "tensorrt-rtx")
"""Formats that are run by the backend of the same name, on a GPU."""
_EXTRAS = {"openvino": ",openvino", "torch": ",export", "torch-compile": ",export", "triton": ",kernels"}


def write(job: Job) -> Outcome:
    """Write the application.

    Raises:
        UsageError: the bundle gives no classes, or a setting does not fit the artifact.
    """
    manifest = job.bundle.manifest
    if manifest.output != "logits" or manifest.preprocess is None:
        raise UsageError(f"{job.bundle.root}: gives {manifest.output}, which are no classes of an image")
    arguments = _arguments(job)
    copy_bundle(job, job.folder / BUNDLE)
    write_text(job.folder / "app.py", template("ray_app.py"))
    write_text(job.folder / "serve_config.yaml", _config(job, arguments))
    extra = _EXTRAS.get(str(arguments["backend"]), "")
    readme = render("ray.md", name=job.name, version=job.version, bundle=BUNDLE, extra=extra)
    write_text(job.folder / "README.md", readme)
    return Outcome(
        what={
            "serve_config.yaml": "what Ray Serve starts, and every setting",
            "app.py": "the application",
            "README.md": "how to start, call, change and deploy it",
        },
        next=(
            f'pip install "vitdeploy[ray{extra}]"',
            f"cd {shlex.quote(str(job.output))} && serve run serve_config.yaml",
            f"curl --data-binary @cat.jpg http://127.0.0.1:8000/v1/models/{job.name}:predict",
        ),
    )


def _arguments(job: Job) -> dict[str, object]:
    """What ``vitdeploy.ray.serving.Settings`` takes."""
    settings, artifact = job.settings, job.artifact
    backend = settings.backend or (artifact.format if artifact.format in _ENGINES else DEFAULT_BACKEND)
    require_support(get_backend(backend), job.bundle, artifact)
    gpu = settings.device == "gpu"
    if backend in _ENGINES and settings.device == "cpu":
        raise UsageError(f"{artifact.name} is an engine, which runs on a GPU only", hint="--device gpu")
    if gpu and backend not in (DEFAULT_BACKEND, *_ENGINES):
        raise UsageError(f"--device gpu: not with the {backend} backend", hint="--backend onnxruntime")
    batch = settings.max_batch or artifact.batch.opt
    if batch > artifact.batch.max:
        raise UsageError(f"--max-batch {batch}: {artifact.name} takes at most {artifact.batch.max} images")
    return {
        "name": job.name,
        "version": str(job.version),
        "backend": backend,
        "artifact": artifact.name,
        "provider": "cuda" if gpu and backend == DEFAULT_BACKEND else None,
        "threads": settings.threads or 1,
        "max_batch": batch,
        "max_delay_ms": 5.0 if settings.max_delay_ms is None else settings.max_delay_ms,
        "top_k": settings.top_k or 5,
        "max_body_mb": 16,
    }


def _config(job: Job, arguments: Mapping[str, object]) -> str:
    settings = job.settings
    low = 1 if settings.min_replicas is None else settings.min_replicas
    batch = int(str(arguments["max_batch"]))
    gpu = arguments["provider"] is not None or arguments["backend"] in _ENGINES
    return render(
        "ray_serve_config.yaml",
        num_gpus=int(gpu),
        min_replicas=low,
        max_replicas=settings.max_replicas or max(low, _MOST_REPLICAS),
        ongoing=2 * batch,
        queued=32 * batch,
        **{key: json.dumps(value) for key, value in arguments.items()},  # JSON is YAML
    )
