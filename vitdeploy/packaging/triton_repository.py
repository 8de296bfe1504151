"""A model repository for NVIDIA's Triton Inference Server, for whichever target ships one.

models/NAME/                  the network: tensors in, tensors out
models/NAME_preprocess/       image files to tensors, in Python: vitdeploy's own preprocessing
models/NAME_labels/           logits to labels, in Python
models/NAME_image/            the three together: image files in, labels out

Of several image sizes:

models/NAME/, NAME_HxW/       a network for each, the first one under the plain name
models/NAME_image/            image files in, labels out, in Python: asks the network that fits each image
"""

from __future__ import annotations

import dataclasses
import json
from importlib import resources
from pathlib import Path
from typing import Any

from vitdeploy.bundle.sizes import varying
from vitdeploy.config import size_name
from vitdeploy.errors import BundleError, UsageError
from vitdeploy.packaging.target import Job, template, write_text
from vitdeploy.packaging.triton_config import Document, config_text, tensor, tensor_of
from vitdeploy.packaging.triton_network import Network
from vitdeploy.tensorrt.records import EngineRecord

MODELS = "models"
"""The repository's folder in a package."""
IMAGE = "nvcr.io/nvidia/tritonserver:26.04-py3"
"""The server that the packages name; its ONNX Runtime knows opset 20."""
TOP_K = 5

VENDORED = {
    "vitdeploy_images": (
        *("config/common.py", "config/preprocess.py", "errors.py"),
        *("images/decode.py", "images/fitting.py", "images/kinds.py", "images/preprocess.py"),
    ),
    "vitdeploy_scores": ("config/common.py", "errors.py", "scores.py"),
}
"""Files of vitdeploy that turn image files into pixels and logits into scores, by the package they become.
They need numpy, and the first ones Pillow."""
_IMAGE_WORKERS = 2
"""Processes that decode; decoding takes about as long as a small model's run."""
_CHOOSERS = 4
"""The same where they also wait for the network of the size that they chose."""


class TritonRepository:
    """A model repository to be written.

    Raises:
        UsageError: Triton cannot serve this artifact, or not with these settings.
    """

    def __init__(self, job: Job, *, images: bool) -> None:
        self.job = job
        self.artifact = job.artifact
        self.choice: dict[str, str] = {}
        """What configurations say of several sizes: which there are, and how an image gets one."""
        if job.several:
            sizes = ",".join(map(size_name, job.bundle.sizes))
            self.choice = {"vitdeploy_image_sizes": sizes, "vitdeploy_fit": job.fit}
        self.networks = tuple(Network(one, self.choice) for one in job.at_sizes())
        """The default size's first."""
        self.device, self.batching = self.networks[0].device, self.networks[0].batching
        self.images = images
        self.what: dict[str, str] = {}
        """A word for each file that is worth one, by its path in the package."""
        if job.settings.top_k is not None and not self.labels:
            raise UsageError("--top-k: this package has no step that gives labels")

    @property
    def labels(self) -> bool:
        """Whether labels come out at the end, not a tensor."""
        return self.images and self.job.bundle.manifest.classifies

    @property
    def top_k(self) -> int:
        classes = self.artifact.output("logits").shape[-1]
        count = self.job.settings.top_k or TOP_K
        return min(count, classes) if isinstance(classes, int) else count

    @property
    def given(self) -> list[Document]:
        """What comes out where image files go in: labels in place of logits."""
        outputs = map(varying, zip(*(one.artifact.outputs for one in self.networks), strict=True))
        tensors = [spec for spec in outputs if not (self.labels and spec.name == "logits")]
        predictions = self._predictions() if self.labels else []
        sizes = [self._text("image_size")] if self.job.several else []
        return [*predictions, *(tensor_of(spec, self.batching) for spec in tensors), *sizes]

    @property
    def image_model(self) -> str:
        """The name of the model that takes image files."""
        return f"{self.job.name}_image"

    def write(self) -> None:
        """Write all models below ``models/``.

        Raises:
            UsageError, BundleError: as the class, and the artifact's files do not fit together.
            MissingDependency: tritonclient is not installed.
        """
        placed: dict[str, Path] = {}
        for network in self.networks:
            for path, what in network.write(self.job.folder / MODELS, placed):
                self._say(path, what)
        if self.images and self.job.several:
            self._write_chooser()
        elif self.images:
            self._write_preprocess()
            if self.labels:
                self._write_labels()
            self._write_ensemble()

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

    def _write_chooser(self) -> None:
        manifest, name, fixed = self.job.bundle.manifest, self.image_model, self.batching.fixed
        more: Document = {} if fixed else {"dynamic_batching": {}}
        more["parameters"] = {key: {"string_value": text} for key, text in self.choice.items()}
        self._python_model(name, [self._files()], self.given, _CHOOSERS, "image files in, answers out", more)
        folder = self._version(name)
        write_text(folder / "model.py", template("images_model.py"))
        settings = {
            "fit": self.job.fit,
            "fixed": fixed is not None,
            "input": manifest.input,
            "pixels": self.artifact.inputs[0].name,
            "outputs": [spec.name for spec in self.artifact.outputs],
            "classes": self.labels,
            "labels": manifest.labels,
            "scores": manifest.scores,
            "top_k": self.top_k if self.labels else 0,
            "networks": [_network(network) for network in self.networks],
        }
        write_text(folder / "images.json", json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        for package in VENDORED:
            self._vendor(folder, package)
        self._say(folder / "model.py", "chooses a size for each image; needs numpy and Pillow")
        self._say(folder / "images.json", "sizes, the bundle's preprocessing for each, labels")

    def _python_model(
        self,
        name: str,
        inputs: list[Document],
        outputs: list[Document],
        count: int,
        what: str = "a step of the ensemble, in Python",
        more: Document | None = None,
    ) -> None:
        document: Document = {
            "name": name,
            "backend": "python",
            "max_batch_size": self.batching.max,
            "input": inputs,
            "output": outputs,
            "version_policy": {"latest": {"num_versions": 1}},
            "instance_group": [{"kind": "KIND_CPU", "count": count}],
            **(more or {}),
        }
        self._config(name, document, what)

    def _files(self) -> Document:
        """One image file per image of the batch."""
        return self._text("image")

    def _text(self, name: str) -> Document:
        """A string per image of the batch."""
        fixed = self.batching.fixed
        return tensor(name, "TYPE_STRING", [fixed] if fixed else [1])

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


def _network(network: Network) -> dict[str, Any]:
    """What the model that chooses has to know of a size."""
    preprocess, batching = network.job.bundle.manifest.preprocess, network.batching
    assert preprocess is not None
    return {
        "model": network.name,
        "image_size": size_name(preprocess.size),
        "batch": [batching.fixed or 1, batching.fixed or batching.max],
        "preprocess": dataclasses.asdict(preprocess),
    }


def _step(name: str, inputs: dict[str, str], outputs: dict[str, str]) -> Document:
    return {"model_name": name, "model_version": -1, "input_map": inputs, "output_map": outputs}
