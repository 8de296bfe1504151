"""A model repository for NVIDIA's Triton Inference Server, for whichever target ships one.

models/NAME/                  the network: tensors in, tensors out
models/NAME_preprocess/       image files to tensors, in Python: vitdeploy's own preprocessing
models/NAME_labels/           logits to labels, in Python
models/NAME_image/            the three together: image files in, labels out
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path, PurePosixPath

from vitdeploy.backends.onnxruntime_providers import has_bf16
from vitdeploy.config import Output
from vitdeploy.errors import BundleError, UsageError
from vitdeploy.packaging.target import Device, Job, copy_listed, template, write_text
from vitdeploy.packaging.triton_config import Batching, Document, config_text, tensor, tensor_of, warm_up
from vitdeploy.tensorrt.records import EngineRecord

MODELS = "models"
"""The repository's folder in a package."""
IMAGE = "nvcr.io/nvidia/tritonserver:26.04-py3"
"""The server that the packages name; its ONNX Runtime knows opset 20."""
MAX_DELAY_MS = 2.0
TOP_K = 5

VENDORED = {
    "vitdeploy_images": (
        *("config/common.py", "config/preprocess.py", "errors.py"),
        *("images/decode.py", "images/kinds.py", "images/preprocess.py"),
    ),
    "vitdeploy_scores": ("config/common.py", "errors.py", "scores.py"),
}
"""Files of vitdeploy that turn image files into pixels and logits into scores, by the package they become.
They need numpy, and the first ones Pillow."""
_PLATFORMS = {"onnx": ("onnxruntime_onnx", "model.onnx"), "tensorrt": ("tensorrt_plan", "model.plan")}
_IMAGE_WORKERS = 2
"""Processes that decode; decoding takes about as long as a small model's run."""


class TritonRepository:
    """A model repository to be written.

    Raises:
        UsageError: Triton cannot serve this artifact, or not with these settings.
    """

    def __init__(self, job: Job, *, images: bool) -> None:
        self.job = job
        self.artifact = job.artifact
        self.device = device_of(job)
        self.batching = Batching.of(job.artifact.batch, job.settings.max_batch, job.artifact.name)
        self.images = images
        self.what: dict[str, str] = {}
        """A word for each file that is worth one, by its path in the package."""
        if self.artifact.format not in _PLATFORMS:
            raise UsageError(
                f"{self.artifact.name} is {self.artifact.format}, which Triton's server does not load",
                hint=f"it loads {' and '.join(_PLATFORMS)}: name one with --artifact",
            )
        if job.settings.top_k is not None and not self.labels:
            raise UsageError("--top-k: this package has no step that gives labels")

    @property
    def labels(self) -> bool:
        """Whether labels come out at the end, not a tensor."""
        return self.images and self.job.bundle.manifest.classifies

    @property
    def backend(self) -> str:
        """The server's backend that runs the network."""
        return _PLATFORMS[self.artifact.format][0].partition("_")[0]

    @property
    def top_k(self) -> int:
        classes = self.artifact.output("logits").shape[-1]
        count = self.job.settings.top_k or TOP_K
        return min(count, classes) if isinstance(classes, int) else count

    @property
    def given(self) -> list[Document]:
        """What comes out where image files go in: labels in place of logits."""
        tensors = [spec for spec in self.artifact.outputs if not (self.labels and spec.name == "logits")]
        predictions = self._predictions() if self.labels else []
        return [*predictions, *(tensor_of(spec, self.batching) for spec in tensors)]

    @property
    def image_model(self) -> str:
        """The ensemble's name."""
        return f"{self.job.name}_image"

    def write(self) -> None:
        """Write all models below ``models/``.

        Raises:
            UsageError, BundleError: as the class, and the artifact's files do not fit together.
            MissingDependency: tritonclient is not installed.
        """
        self._write_network()
        if self.images:
            self._write_preprocess()
            if self.labels:
                self._write_labels()
            self._write_ensemble()

    # --- the network ---------------------------------------------------------------------------------

    def _write_network(self) -> None:
        job, name = self.job, self.job.name
        platform, filename = _PLATFORMS[self.artifact.format]
        self._config(name, self._network_config(platform), f"{platform}: {self._summary()}")
        folder = self._version(name)
        beside = PurePosixPath(self.artifact.path).parent
        for listed in self._runtime_files():
            inside = (
                filename if listed == self.artifact.path else str(PurePosixPath(listed).relative_to(beside))
            )
            copy_listed(job, listed, folder / inside)
            self._say(folder / inside, f"{self.artifact.name} of the bundle")
        if self.artifact.format == "onnx" and len(self.artifact.files) > 1:
            check_external_data(folder / filename)
        labels = job.bundle.manifest.labels
        if labels and job.bundle.manifest.classifies:
            path = self._model(name) / "labels.txt"
            write_text(path, "".join(f"{' '.join(label.split())}\n" for label in labels))
            self._say(path, f"{len(labels)} labels, for the classification extension")

    def _network_config(self, platform: str) -> Document:
        artifact, settings = self.artifact, self.job.settings
        sizes = {1, min(artifact.batch.opt, self.batching.max)} if self.batching.max else {1}
        return {
            "name": self.job.name,
            "platform": platform,
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
            **self.batching.scheduling(self._delay()),
        }

    def _labelled(self, output: Output) -> dict[str, str]:
        """Whether an output's columns are classes with names."""
        named = output == "logits" and self.job.bundle.manifest.labels
        return {"label_filename": "labels.txt"} if named else {}

    def _parameters(self) -> dict[str, str]:
        """The runtime's, and what `vitdeploy verify --url` reads; servers skip what they do not know."""
        parameters = {
            "vitdeploy_bundle": self.job.bundle.manifest.digest,
            "vitdeploy_artifact": self.artifact.name,
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

    # --- images in, labels out -----------------------------------------------------------------------

    def _write_preprocess(self) -> None:
        manifest, name = self.job.bundle.manifest, f"{self.job.name}_preprocess"
        assert manifest.preprocess is not None
        spec = self.artifact.inputs[0]
        self._python_model(name, [self._files()], [tensor_of(spec, self.batching)], _IMAGE_WORKERS)
        folder = self._version(name)
        write_text(folder / "model.py", template("preprocess_model.py"))
        settings = {
            "input": manifest.input,
            "output": spec.name,
            "preprocess": dataclasses.asdict(manifest.preprocess),
        }
        write_text(folder / "preprocess.json", json.dumps(settings, indent=2, sort_keys=True) + "\n")
        self._vendor(folder, "vitdeploy_images")
        self._say(folder / "model.py", "image files to tensors; needs numpy and Pillow")
        self._say(folder / "preprocess.json", "the bundle's preprocessing")

    def _write_labels(self) -> None:
        name = f"{self.job.name}_labels"
        logits = tensor_of(self.artifact.output("logits"), self.batching)
        self._python_model(name, [logits], self._predictions(), 1)
        folder = self._version(name)
        write_text(folder / "model.py", template("labels_model.py"))
        manifest = self.job.bundle.manifest
        settings = {"labels": manifest.labels, "scores": manifest.scores, "top_k": self.top_k}
        write_text(folder / "labels.json", json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        self._vendor(folder, "vitdeploy_scores")
        self._say(folder / "model.py", "logits to labels; needs numpy")
        self._say(folder / "labels.json", f"labels, and how many are given: {self.top_k}")

    def _vendor(self, folder: Path, package: str) -> None:
        vendor(folder / package)
        for file in VENDORED[package]:
            self._say(folder / package / file, "vitdeploy's own")

    def _write_ensemble(self) -> None:
        job, name = self.job, self.job.name
        pixels, outputs = self.artifact.inputs[0].name, [spec.name for spec in self.artifact.outputs]
        steps = [
            _step(f"{name}_preprocess", {"image": "image"}, {pixels: pixels}),
            _step(name, {pixels: pixels}, {output: output for output in outputs}),
        ]
        given = self.given
        if self.labels:
            named = {one["name"]: one["name"] for one in self._predictions()}
            steps.append(_step(f"{name}_labels", {"logits": "logits"}, named))
        document: Document = {
            "name": self.image_model,
            "platform": "ensemble",
            "max_batch_size": self.batching.max,
            "input": [self._files()],
            "output": given,
            "version_policy": {"latest": {"num_versions": 1}},
            "ensemble_scheduling": {"step": steps},
        }
        names = ", ".join(one["name"] for one in given)
        self._config(self.image_model, document, f"image files in, {names} out")
        # Stores of objects know no empty folders, but the server wants one for the version.
        keep = self._version(self.image_model) / "README"
        write_text(keep, f"Version {job.version} of the ensemble: its steps are in ../config.pbtxt.\n")

    def _python_model(self, name: str, inputs: list[Document], outputs: list[Document], count: int) -> None:
        document: Document = {
            "name": name,
            "backend": "python",
            "max_batch_size": self.batching.max,
            "input": inputs,
            "output": outputs,
            "version_policy": {"latest": {"num_versions": 1}},
            "instance_group": [{"kind": "KIND_CPU", "count": count}],
        }
        self._config(name, document, "a step of the ensemble, in Python")

    def _files(self) -> Document:
        """One image file per image of the batch."""
        fixed = self.batching.fixed
        return tensor("image", "TYPE_STRING", [fixed] if fixed else [1])

    def _predictions(self) -> list[Document]:
        fixed = self.batching.fixed
        dims = [fixed, self.top_k] if fixed else [self.top_k]
        return [
            tensor("labels", "TYPE_STRING", dims),
            tensor("indices", "TYPE_INT32", dims),
            tensor("scores", "TYPE_FP32", dims),
        ]

    # --- paths ---------------------------------------------------------------------------------------

    def _model(self, name: str) -> Path:
        return self.job.folder / MODELS / name

    def _version(self, name: str) -> Path:
        return self._model(name) / str(self.job.version)

    def _config(self, name: str, document: Document, what: str) -> None:
        path = self._model(name) / "config.pbtxt"
        write_text(path, config_text(document))
        self._say(path, what)

    def _say(self, path: Path, what: str) -> None:
        self.what[path.relative_to(self.job.folder).as_posix()] = what

    def _delay(self) -> float:
        given = self.job.settings.max_delay_ms
        return MAX_DELAY_MS if given is None else given


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


def why_tensors_only(job: Job) -> str | None:
    """None where image files can go in; else why only tensors can."""
    manifest, artifact = job.bundle.manifest, job.artifact
    if manifest.refuses_images:
        return f"the bundle {manifest.refuses_images}"
    if len(artifact.inputs) != 1:
        return f"{artifact.name} has {len(artifact.inputs)} inputs"
    return None


def engine_record(job: Job) -> EngineRecord | None:
    """What is known of an engine's build; None for another artifact.

    Raises:
        BundleError: the record is none.
    """
    if job.artifact.format != "tensorrt":
        return None
    record = next((name for name in job.artifact.files if name.endswith(".json")), None)
    if record is None:
        return None
    try:
        return EngineRecord.model_validate_json(job.bundle.path(record).read_bytes())
    except ValueError as error:
        raise BundleError(f"{record}: is no engine's record") from error


def vendor(folder: Path) -> None:
    """Write the package of this name: modules of vitdeploy that need nothing else of it."""
    source, name = resources.files("vitdeploy"), folder.name
    words = [Path(file).stem for file in VENDORED[name] if file.startswith("config/")]
    write_text(folder / "__init__.py", '"""Parts of vitdeploy (Apache-2.0), as they are there."""\n')
    write_text(folder / "config/__init__.py", "".join(f"from .{word} import *\n" for word in words))
    for file in VENDORED[name]:
        text = (source / file).read_text(encoding="utf-8")
        write_text(folder / file, text.replace("from vitdeploy.", f"from {name}."))


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


def _step(name: str, inputs: dict[str, str], outputs: dict[str, str]) -> Document:
    return {"model_name": name, "model_version": -1, "input_map": inputs, "output_map": outputs}
