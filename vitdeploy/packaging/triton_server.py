"""``--target triton-server``: a model repository, and what starts NVIDIA's Triton Inference Server on it."""

from __future__ import annotations

import json
import shlex
from importlib.metadata import version

from vitdeploy.bundle.dtypes import DATATYPES
from vitdeploy.packaging.target import (
    COMPOSE_GPU,
    Job,
    Outcome,
    fill_template,
    fitting_words,
    label,
    write_text,
)
from vitdeploy.packaging.triton_repository import (
    IMAGE,
    MODELS,
    TritonRepository,
    engine_record,
    why_tensors_only,
)

SETTINGS = (
    "device",
    "threads",
    "instances",
    "max_batch",
    "max_delay_ms",
    "top_k",
    "image",
    "tensors_only",
    "fit",
)


def write(job: Job) -> Outcome:
    """Write the repository, a README, and a compose file.

    Raises:
        UsageError: Triton cannot serve this artifact, or not with these settings.
        MissingDependency: tritonclient is not installed.
    """
    refused = why_tensors_only(job)
    images = refused is None and not job.settings.tensors_only
    repository = TritonRepository(job, images=images)
    repository.write()
    base = job.settings.image or IMAGE
    if images:
        write_dockerfile(job, base)
    write_text(job.folder / "compose.yaml", _compose(job, repository, base, images))
    write_text(job.folder / "README.md", _readme(job, repository, base, images))
    what = {
        **repository.what,
        "compose.yaml": "starts the server",
        "README.md": "how to start, call and verify it",
    }
    if images:
        what["Dockerfile"] = "the server with Pillow, which decodes images"
    notes = [] if refused is None else [f"tensors in, tensors out only: {refused}"]
    notes += shared_weights(job, repository)
    record = engine_record(job)
    if record is not None:
        notes.append(
            f"the engine needs a server with TensorRT {record.version}; {base} may carry another: see its "
            "release notes, and name one that fits with --image"
        )
    compose = shlex.quote(str(job.output / "compose.yaml"))
    return Outcome(
        what,
        next=(
            f"docker compose -f {compose} up --build --wait",
            f"vitdeploy verify {shlex.quote(str(job.bundle.root))} --url http://localhost:8000",
        ),
        notes=tuple(notes),
    )


def write_dockerfile(job: Job, base: str) -> None:
    """Write the Dockerfile of a server whose Python has the Pillow that is here."""
    text = fill_template("triton_server.Dockerfile", image=base, pillow=version("pillow"))
    write_text(job.folder / "Dockerfile", text)


def _compose(job: Job, repository: TritonRepository, base: str, images: bool) -> str:
    built = f"build: .\n    image: {label(job.name)}-triton" if images else f"image: {base}"
    gpu = COMPOSE_GPU if repository.device == "gpu" else ""
    return fill_template("triton_server.compose.yaml", image=built, models=MODELS, gpu=gpu)


def _readme(job: Job, repository: TritonRepository, base: str, images: bool) -> str:
    spec, outputs = job.artifact.inputs[0], [spec.name for spec in job.artifact.outputs]
    shape = [1 if isinstance(size, str) else size for size in spec.shape]
    values = {
        "name": job.name,
        "bundle": job.bundle.root.resolve().name,
        "artifact": f"{job.artifact.name} ({job.artifact.precision})",
        "models": MODELS,
        "image": base,
        "backend": repository.networks[0].backend,
        "needs": _python() if images else "Nothing here needs Python.",
        "input": spec.name,
        "output": outputs[0],
        "outputs": ", ".join(f"`{name}`" for name in outputs),
        "datatype": DATATYPES[spec.dtype],
        "dtype": spec.dtype,
        "shape": json.dumps(shape),
    }
    text = fill_template("triton_server.md", **values) + sizes_readme(job, repository)
    if images:
        names = [one["name"] for one in repository.given]
        fixed = repository.batching.fixed
        form = json.dumps([fixed] if fixed else [1, 1])
        model = repository.image_model
        one = fixed in (None, 1)
        steps = (
            f"Its steps are the models `{job.name}_...`; `{model}/config.pbtxt` shows how they are joined."
        )
        if job.several:
            where = f"{model}/{job.version}/images.json"
            steps = f"It asks the models of the sizes; `{where}` has which, and all settings."
        text += fill_template(
            "triton_server_images.md",
            image_model=model,
            steps=steps,
            outputs=", ".join(f"`{name}`" for name in names),
            first=names[0],
            shape=form,
            wrapped="[[data]]" if fixed is None else f"[data] * {fixed}",
            curl=fill_template("triton_server_curl.md", image_model=model, shape=form) if one else "",
        )
    return text


def sizes_readme(job: Job, repository: TritonRepository) -> str:
    """What a README says of the models of several image sizes; empty of one."""
    if not job.several:
        return ""
    table, images = [], ""
    for network in repository.networks:
        spec = network.artifact.inputs[0]
        table.append(f"| `{network.name}` | {DATATYPES[spec.dtype]} [{', '.join(map(str, spec.shape))}] |")
    if repository.images:
        images = (
            f"\nIn `{repository.image_model}`, an image gets {fitting_words(job)}; `image_size` in the "
            "answer says which. `fit` in its `images.json` is the rule: `aspect`, `area` or a size.\n"
        )
    weights = "\n".join(shared_weights(job, repository))
    return fill_template(
        "triton_server_sizes.md",
        input=job.artifact.inputs[0].name,
        table="\n".join(table),
        images=images,
        weights=weights,
    )


def shared_weights(job: Job, repository: TritonRepository) -> list[str]:
    """What the files that several sizes share cost, in one line; nothing where there are none."""
    if not job.several:
        return []
    first, *others = (set(network.artifact.files) for network in repository.networks)
    size = sum(job.bundle.manifest.files[name].size for name in first.intersection(*others))
    if not size:
        return []
    count = len(repository.networks)
    return [
        f"the {count} sizes share {size / 1e6:.3g} MB of weights as hard links: once on this disk, {count} "
        "times where the folder is copied file by file (object stores, images), and in the server's memory"
    ]


def _python() -> str:
    """What the models in Python need of a server."""
    return fill_template("triton_server_python.md", pillow=version("pillow")).rstrip()
