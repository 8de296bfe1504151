"""The network of one image size in a model repository: tensors in, tensors out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from vitdeploy.backends.onnxruntime_providers import has_bf16
from vitdeploy.config import Output
from vitdeploy.errors import BundleError, UsageError
from vitdeploy.packaging.target import Device, Job, copy_listed, write_text
from vitdeploy.packaging.triton_config import Batching, Document, config_text, tensor_of, warm_up

MAX_DELAY_MS = 2.0
_PLATFORMS = {"onnx": ("onnxruntime_onnx", "model.onnx"), "tensorrt": ("tensorrt_plan", "model.plan")}


class Network:
    """A model to be written.

    Args:
        job: at this size alone.
        extra: parameters of its configuration, beside its own.

    Raises:
        UsageError: Triton cannot serve this artifact, or not with these settings.
    """

    def __init__(self, job: Job, extra: dict[str, str]) -> None:
        self.job = job
        self.name = job.name
        self.artifact = job.artifact
        self.device = device_of(job)
        self.batching = Batching.of(job.artifact.batch, job.settings.max_batch, job.artifact.name)
        self._extra = extra
        if self.artifact.format not in _PLATFORMS:
            raise UsageError(
                f"{self.artifact.name} is {self.artifact.format}, which Triton's server does not load",
                hint=f"it loads {' and '.join(_PLATFORMS)}: name one with --artifact",
            )

    @property
    def backend(self) -> str:
        """The server's backend that runs it."""
        return self._platform.partition("_")[0]

    def write(self, models: Path, placed: dict[str, Path]) -> Iterator[tuple[Path, str]]:
        """Write the model's folder; gives each file and what it is.

        A file of the bundle that is there already, as weights that several sizes share, is linked.

        Args:
            placed: where each of the bundle's files is; what is new is added.

        Raises:
            UsageError, BundleError: the artifact's files do not fit together.
            MissingDependency: tritonclient is not installed.
        """
        folder = models / self.name
        write_text(folder / "config.pbtxt", config_text(self._config()))
        yield folder / "config.pbtxt", f"{self._platform}: {self._summary()}"
        version, filename = folder / str(self.job.version), _PLATFORMS[self.artifact.format][1]
        beside = PurePosixPath(self.artifact.path).parent
        for listed in self._runtime_files():
            inside = (
                filename if listed == self.artifact.path else str(PurePosixPath(listed).relative_to(beside))
            )
            shared = placed.setdefault(listed, version / inside)
            if shared == version / inside:
                copy_listed(self.job, listed, shared)
                yield shared, f"{self.artifact.name} of the bundle"
            else:
                _link(self.job, listed, shared, version / inside)
                yield version / inside, f"the same file as {shared.relative_to(models)}"
        if self.artifact.format == "onnx" and len(self.artifact.files) > 1:
            check_external_data(version / filename)
        labels = self.job.bundle.manifest.labels
        if labels and self.job.bundle.manifest.classifies:
            write_text(folder / "labels.txt", "".join(f"{' '.join(label.split())}\n" for label in labels))
            yield folder / "labels.txt", f"{len(labels)} labels, for the classification extension"

    @property
    def _platform(self) -> str:
        return _PLATFORMS[self.artifact.format][0]

    def _config(self) -> Document:
        artifact, settings = self.artifact, self.job.settings
        sizes = {1, min(artifact.batch.opt, self.batching.max)} if self.batching.max else {1}
        delay = MAX_DELAY_MS if settings.max_delay_ms is None else settings.max_delay_ms
        return {
            "name": self.name,
            "platform": self._platform,
            "max_batch_size": self.batching.max,
            "input": [tensor_of(spec, self.batching) for spec in artifact.inputs],
            "output": [
                tensor_of(spec, self.batching, **self._labelled(spec.name)) for spec in artifact.outputs
            ],
            "version_policy": {"latest": {"num_versions": 1}},
            "instance_group": [
                {"kind": f"KIND_{self.device.upper()}", "count": settings.instances or 1},
            ],
            "model_warmup": warm_up(artifact.inputs, self.batching, sorted(sizes)),
            "parameters": {key: {"string_value": value} for key, value in self._parameters().items()},
            **self._optimization(),
            **self.batching.scheduling(delay),
        }

    def _optimization(self) -> Document:
        """ONNX Runtime's fusions of what is quantised know integers only, and the server hands on no option
        of a session but the level of its optimisations: -1 is that of before the fusions."""
        return {"optimization": {"graph": {"level": -1}}} if self.artifact.precision == "fp8" else {}

    def _labelled(self, output: Output) -> dict[str, str]:
        """Whether an output's columns are classes with names."""
        named = output == "logits" and self.job.bundle.manifest.labels
        return {"label_filename": "labels.txt"} if named else {}

    def _parameters(self) -> dict[str, str]:
        """The runtime's, and what `vitdeploy verify --url` reads; servers skip what they do not know."""
        parameters = {
            "vitdeploy_bundle": self.job.bundle.manifest.digest,
            "vitdeploy_artifact": self.artifact.name,
            **self._extra,
        }
        if self.job.settings.threads is not None:
            parameters["intra_op_thread_count"] = str(self.job.settings.threads)
            parameters["inter_op_thread_count"] = "1"
        return parameters

    def _runtime_files(self) -> Iterator[str]:
        """The artifact's files that the server reads; an engine's record is for people."""
        for name in self.artifact.files:
            if self.artifact.format == "onnx" or name == self.artifact.path:
                yield name

    def _summary(self) -> str:
        many = f"batches to {self.batching.max}" if self.batching.max else f"batches of {self.batching.fixed}"
        return f"{self.artifact.precision}, {many}, {self.device}"


def device_of(job: Job) -> Device:
    """Where the network is to run: an engine on the GPU, ONNX on the CPU unless told otherwise.

    Raises:
        UsageError: it cannot run there, or has no use for threads.
    """
    engine = job.artifact.format == "tensorrt"
    device: Device = job.settings.device or ("gpu" if engine else "cpu")
    if engine and device == "cpu":
        raise UsageError(f"{job.artifact.name} is an engine, which runs on a GPU only", hint="--device gpu")
    if device == "gpu" and job.settings.threads is not None:
        raise UsageError("--threads is about the CPU", hint="leave it out, or use --device cpu")
    if device == "cpu" and has_bf16(job.artifact):
        raise UsageError(
            f"{job.artifact.name}: ONNX Runtime's CPU provider has no bf16 kernels", hint="--device gpu"
        )
    return device


def check_external_data(model: Path) -> None:
    """Look whether every tensor that an ONNX file keeps elsewhere is where the file says.

    Raises:
        BundleError: it is not.
    """
    import onnx
    from onnx.external_data_helper import uses_external_data

    graph = onnx.load(model, load_external_data=False).graph
    for constant in graph.initializer:
        if not uses_external_data(constant):
            continue
        places = [entry.value for entry in constant.external_data if entry.key == "location"]
        if not all((model.parent / place).is_file() for place in places):
            raise BundleError(f"{model.name}: {constant.name} is kept in {places[0]!r}, which is not there")


def _link(job: Job, listed: str, there: Path, target: Path) -> None:
    """A second name of a file that is written already: ONNX Runtime reads no symbolic links, but these."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(there, target)
    except OSError:  # no hard links here
        copy_listed(job, listed, target)
