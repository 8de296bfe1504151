"""``--target docker``: the bundle and our own server in one image, with the run-time libraries only."""

from __future__ import annotations

import json
import shlex
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vitdeploy._version import __version__
from vitdeploy.backends.base import Traits
from vitdeploy.errors import UsageError
from vitdeploy.packaging.target import (
    COMPOSE_GPU,
    Job,
    Outcome,
    copy_bundle,
    fill_template,
    label,
    sizes_text,
    write_text,
)

SETTINGS = ("backend", "threads", "instances", "max_batch", "max_delay_ms", "image", "wheel", "fit")

IMAGE = "python:3.11-slim"
BUNDLE = "model.bundle"
"""The bundle's folder in the package and in the image."""

_PINNED = ("numpy", "pillow", "onnxruntime")
"""Libraries that decide the numbers whatever the backend: the image gets the versions that are here."""


def write(job: Job) -> Outcome:
    """Write a Dockerfile, what it copies, a compose file and a README.

    Raises:
        UsageError: the backend cannot run the artifact, or the wheel is none of vitdeploy.
    """
    backend = job.backend()
    folder = job.folder
    wheel = _copy_wheel(job)
    copy_bundle(job, folder / BUNDLE)
    extras = ",".join(("serve", "grpc", *backend.traits.extras))
    source = f"vitdeploy[{extras}] @ file:///app/{wheel}" if wheel else f"vitdeploy[{extras}]=={__version__}"
    write_text(folder / "requirements.txt", f"{source}\n")
    write_text(folder / "constraints.txt", "".join(f"{pin}\n" for pin in pins(backend.traits)))
    write_text(folder / "Dockerfile", _dockerfile(job, wheel, _command(job, backend.name)))
    ignored = ["*", *(f"!{name}" for name in ("requirements.txt", "constraints.txt", BUNDLE, wheel) if name)]
    write_text(folder / ".dockerignore", "".join(f"{line}\n" for line in ignored))
    tag = f"{label(job.name)}:{job.version}"
    gpu = COMPOSE_GPU if backend.traits.needs_gpu else ""
    compose = fill_template("docker.compose.yaml", tag=tag, cpus=_cpus(job), gpu=gpu)
    write_text(folder / "compose.yaml", compose)
    readme = fill_template(
        "docker.md",
        name=job.name,
        bundle=job.bundle.root.resolve().name,
        artifact=f"{job.artifact.name} ({job.artifact.precision})",
        backend=backend.name,
        tag=tag,
        gpus="--gpus all " if gpu else "",
        call=_call(job),
    )
    tensors = " Tensors go to the size that they have. `--fit` in the Dockerfile is the rule."
    write_text(folder / "README.md", readme + sizes_text(job, "image_sizes", tensors))
    return Outcome(_what(wheel), next=_next(job), notes=_notes(backend.traits, wheel))


def pins(traits: Traits) -> list[str]:
    """``name==version`` of the libraries that decide the numbers, as they are installed here."""
    pinned = []
    for name in dict.fromkeys((*_PINNED, *traits.libraries)):
        try:
            pinned.append(f"{name}=={version(name).partition('+')[0]}")  # a local build is on no index
        except PackageNotFoundError:
            continue
    return pinned


def _call(job: Job) -> str:
    """How to ask the model: an image file where it takes one and gives classes, tensors otherwise."""
    manifest, (reads, *_) = job.bundle.manifest, job.artifact.inputs
    if manifest.classifies_images:
        where = f"http://localhost:8000/v1/models/{job.name}:predict"
        return f'curl --fail --data-binary @image.jpg -H "Content-Type: image/jpeg" {where}'
    where = f"http://localhost:8000/v2/models/{job.name}"
    shape = ", ".join(map(str, reads.shape))
    return f"curl --fail {where}  # POST to {where}/infer: {reads.name}, {reads.dtype} ({shape})"


def _what(wheel: str | None) -> dict[str, str]:
    what = {
        "Dockerfile": "no root, a health check, the run-time libraries only",
        ".dockerignore": "what the image is built from, and nothing else",
        "compose.yaml": "builds and starts it",
        "README.md": "how to build, call and verify it",
        "requirements.txt": "vitdeploy, its server and the backend",
        "constraints.txt": "versions of the libraries that decide the numbers, as here",
        f"{BUNDLE}/manifest.json": "the bundle, complete",
    }
    return {**what, wheel: "vitdeploy itself"} if wheel else what


def _next(job: Job) -> tuple[str, ...]:
    compose = shlex.quote(str(job.output / "compose.yaml"))
    return (
        f"docker compose -f {compose} up --build --wait",
        f"vitdeploy verify {shlex.quote(str(job.bundle.root))} --url http://localhost:8000",
    )


def _notes(backend: Traits, wheel: str | None) -> tuple[str, ...]:
    notes = []
    if wheel is None:
        notes.append(
            f"the image installs vitdeploy {__version__} from your package index; --wheel takes a file"
        )
    if backend.needs_gpu:
        notes.append(f"{backend.name} needs a GPU and its driver on the host, and NVIDIA's container toolkit")
    return tuple(notes)


def _cpus(job: Job) -> str:
    """A limit for the container where threads are asked for: those of all sessions, and one that decodes.

    Without a number of threads the server takes what the container gives it, and the compose file gives all.
    """
    threads = job.settings.threads
    return f"    cpus: {threads * (job.settings.instances or 1) + 1}\n" if threads else ""


def _command(job: Job, backend: str) -> list[str]:
    settings = job.settings
    command = ["vitdeploy", "serve", f"{job.name}@{job.version}={BUNDLE}"]
    command += ["--host", "0.0.0.0", "--port", "8000", "--grpc-port", "8001"]
    command += ["--backend", backend, "--artifact", job.artifact.name, "--fixed-models"]
    if job.several:
        command += ["--fit", job.fit]
    for flag, value in (
        ("--threads", settings.threads),
        ("--instances", settings.instances),
        ("--max-batch", settings.max_batch),
        ("--max-delay-ms", settings.max_delay_ms),
    ):
        if value is not None:
            command += [flag, f"{value:g}"]
    return command


def _dockerfile(job: Job, wheel: str | None, command: list[str]) -> str:
    return fill_template(
        "docker.Dockerfile",
        image=job.settings.image or IMAGE,
        files=" ".join(filter(None, ("requirements.txt", "constraints.txt", wheel))),
        bundle=BUNDLE,
        threads=f"    OMP_NUM_THREADS={threads} \\\n" if (threads := job.settings.threads) else "",
        command=json.dumps(command),
    )


def _copy_wheel(job: Job) -> str | None:
    """Copy the wheel that is to be installed, and return its name.

    Raises:
        UsageError: it is not there, or no wheel of vitdeploy.
    """
    if job.settings.wheel is None:
        return None
    path = Path(job.settings.wheel)
    if not path.is_file():
        raise UsageError(f"--wheel {path}: there is no such file", hint="python -m build --wheel")
    if not (path.name.startswith("vitdeploy-") and path.suffix == ".whl"):
        raise UsageError(
            f"--wheel {path}: not a wheel of vitdeploy", hint="vitdeploy-VERSION-py3-none-any.whl"
        )
    shutil.copyfile(path, job.folder / path.name)
    return path.name
