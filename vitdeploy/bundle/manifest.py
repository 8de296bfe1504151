"""What a bundle's ``manifest.json`` says: the documented schema, and its one canonical form in bytes.

docs/bundle.md describes the same for people who read bundles without this package.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, Final, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    model_serializer,
    model_validator,
)

from vitdeploy.bundle.dtypes import ArtifactPrecision, DType, Quantised
from vitdeploy.bundle.proofs import ParityRecord, PrecisionProof
from vitdeploy.bundle.quantisation import CalibrationRecord, QuantisationRecord
from vitdeploy.bundle.records import Count, Record, Sha256
from vitdeploy.config import (
    BatchRange,
    InputKind,
    ModelConfig,
    Output,
    Preprocess,
    Scores,
    Size,
    is_output,
    model_fields,
    model_type,
    size_name,
)
from vitdeploy.errors import BundleError, VitdeployError

MANIFEST = "manifest.json"
SCHEMA_VERSION: Final = 1
MAX_MANIFEST_BYTES = 64 * 2**20
"""Nothing longer is parsed; the manifest of a model with 1000 labels has some 100 KB."""

AOT = "triton-aot"
"""The format of artifacts that hold the fused kernels, compiled ahead of time."""
REBUILD = "copy or export the bundle again"


# What some file system gives a meaning of its own: a root, a drive letter, a stream, a pattern, a control.
_UNSAFE = re.compile(r'[\\:*?"<>|\x00-\x1f\x7f]')


def safe_path(path: str) -> str:
    """Return ``path`` if it is a plain relative path that stays inside the folder on every platform.

    Raises:
        ValueError: it is absolute, climbs out, or has a character that means something else somewhere.
    """
    parts = path.split("/")
    if _UNSAFE.search(path) or any(part in ("", ".", "..") or part[-1] in ". " for part in parts):
        raise ValueError(f"{path!r} is not a plain relative path inside the bundle")
    return path


SafePath = Annotated[str, Field(max_length=512), AfterValidator(safe_path)]


def _known_output(name: str) -> str:
    if not is_output(name):
        raise ValueError(f"no model returns {name!r}")
    return name


KnownOutput = Annotated[Output, AfterValidator(_known_output)]


def _only_output(fields: dict[str, Any]) -> tuple[Output, ...]:
    return (fields.get("output", "logits"),)


class FileRecord(Record):
    """What one file of the bundle must be."""

    size: Count
    sha256: Sha256


class TensorSpec(Record):
    """An input or output; a string in ``shape`` is a dimension that varies (``"N"``, the batch)."""

    name: str
    dtype: DType
    shape: tuple[int | str, ...]


def input_spec(config: ModelConfig, kind: InputKind) -> TensorSpec:
    """What a model takes: float32 pixel values (N, C, H, W) or patches (N, T, columns), or uint8 images
    (N, H, W, C)."""
    dtype: DType = "uint8" if kind == "uint8" else "float32"
    return TensorSpec(name="pixel_values", dtype=dtype, shape=("N", *config.inputs[kind]))


def output_specs(config: ModelConfig, outputs: Sequence[Output]) -> tuple[TensorSpec, ...]:
    """All that it gives, float32."""
    return tuple(output_spec(config, output) for output in outputs)


def output_spec(config: ModelConfig, output: Output) -> TensorSpec:
    """One thing that it gives, float32."""
    shape = config.output_shape(output)
    if shape is None:
        raise ValueError(f"the model has no output {output!r}")
    return TensorSpec(name=output, dtype="float32", shape=("N", *shape))


def _parse_model(value: object) -> ModelConfig:
    if isinstance(value, ModelConfig):
        return value
    if not isinstance(value, Mapping):
        raise ValueError("a model's configuration must be an object")
    config, fields = model_type(value)
    return TypeAdapter(config).validate_python(fields)


ModelRecord = Annotated[ModelConfig, PlainValidator(_parse_model), PlainSerializer(model_fields)]
"""A configuration of any kind, told apart by ``kind``."""


class Artifact(Record):
    """One runnable form of the model."""

    name: str = Field(min_length=1)
    """Unique within the bundle: ``onnx-fp16``."""
    format: str = Field(min_length=1)
    precision: ArtifactPrecision
    requested: ArtifactPrecision
    """The precision asked for; ``fallback`` says why it is another one, where it is."""
    path: SafePath
    files: tuple[SafePath, ...]
    """Every file of this artifact, ``path`` among them."""
    opset: int | None = None
    batch: BatchRange
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    islands: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    """GPU architectures an engine was built for, ``sm_89``; ``sm_80+`` is that one and all later ones."""
    image_size: Size | None = None
    """The size of ``Manifest.sizes`` that it is for; None is the bundle's first."""
    fallback: str | None = None
    proof: PrecisionProof | None = None
    quantisation: QuantisationRecord | None = None
    build_seconds: float = Field(default=0.0, ge=0)
    nodes: int | None = None
    size: Count = 0
    """Bytes of all its files together; filled in when the manifest is sealed."""

    @property
    def is_quantised(self) -> bool:
        """Whether GEMMs of it are in 8 bits; of an engine, whether the file that it is built from is so."""
        return self.precision in get_args(Quantised)

    def output(self, name: Output) -> TensorSpec:
        """The output of this name, which it has."""
        return next(spec for spec in self.outputs if spec.name == name)

    @model_serializer(mode="wrap")
    def _dump(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without ``targets``, ``image_size`` and ``quantisation`` where there are none: bundles from before
        them keep their digest."""
        fields: dict[str, Any] = dump(self)
        if self.quantisation is None:
            fields.pop("quantisation", None)
        if not self.targets:
            fields.pop("targets", None)
        if self.image_size is None:
            fields.pop("image_size", None)
        return fields

    @model_validator(mode="after")
    def _has_its_path(self) -> Self:
        if self.path not in self.files:
            raise ValueError(f"artifact {self.name!r} does not list its own path {self.path!r} in files")
        return self


class Rewrite(Record):
    """An exact rewrite that was applied to the model before it was emitted."""

    name: str
    detail: str
    flops_saved: int = 0


class Choice(Record):
    """What was found best on a machine: by ``vitdeploy bench --pick`` and ``optimize`` what runs, and how; by
    ``vitdeploy serve`` how its processors are shared out where this artifact runs on this backend."""

    machine: tuple[str, ...]
    """As ``vitdeploy.machine.identity.machine_name`` says."""
    goal: Literal["latency", "throughput", "serving"]
    max_latency_ms: float | None = Field(default=None, gt=0)
    backend: str
    provider: str | None
    """ONNX Runtime's; null for other backends."""
    artifact: str | None
    """Null is the reference weights."""
    threads: int | None = Field(default=None, ge=1)
    batch: int = Field(ge=1)
    concurrency: int = Field(default=1, ge=1)
    spin: bool = False
    """Whether ONNX Runtime's threads keep cores busy while they wait."""
    p50_ms: float
    p99_ms: float | None = None
    images_per_s: float
    created: str
    image_size: Size | None = None
    """The size of ``Manifest.sizes`` that it is for; null is the first, and what nothing was picked for."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Of the libraries that computed; with others it says nothing. Empty: any."""
    files: dict[SafePath, Sha256] = Field(default_factory=dict)
    """Of the artifact as it was measured; likewise."""

    @property
    def replaces(self) -> tuple[object, ...]:
        """What two choices have in common of which a bundle keeps the later one."""
        what = (self.backend, self.provider, self.artifact) if self.goal == "serving" else ()
        return (self.machine, self.image_size, *what)

    @model_serializer(mode="wrap")
    def _dump(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what has its usual value: bundles from before these fields keep their digest."""
        fields: dict[str, Any] = dump(self)
        for name in ("image_size", "spin", "p99_ms", "versions", "files"):
            if not fields.get(name):
                fields.pop(name, None)
        return fields


FactSource = Literal["checkpoint", "default", "user"]


class Provenance(Record):
    """Where the weights come from and what built the bundle."""

    source: str
    family: str
    seed: int | None = None
    """Of random weights; null for a checkpoint."""
    source_files: dict[str, Sha256] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    platform: str = ""
    command: str = ""
    notes: tuple[str, ...] = ()
    facts: dict[str, FactSource] = Field(default_factory=dict)
    """Where labels, preprocessing (or a single setting of it), scores, heads and activation are from."""

    @model_serializer(mode="wrap")
    def _dump(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without ``facts`` where there are none: bundles from before it keep their digest."""
        fields: dict[str, Any] = dump(self)
        if not self.facts:
            fields.pop("facts", None)
        return fields


class SizeRecord(Record):
    """A further image size of a bundle, with what the manifest itself says of the first."""

    image_size: Size
    preprocess: Preprocess | None = None
    flops: Count | None = None
    grid_thw: tuple[int, int, int] | None = None
    """Of a vision-language model's tower, as the manifest's."""

    @model_serializer(mode="wrap")
    def _dump(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without a grid where there is none."""
        fields: dict[str, Any] = dump(self)
        if self.grid_thw is None:
            fields.pop("grid_thw", None)
        return fields


class Manifest(Record):
    """A bundle's table of contents.

    ``files`` and ``digest`` are empty in a draft; :func:`seal` fills them in.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    name: str = Field(min_length=1)
    created: str = Field(pattern=r"\A\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ\z")
    generator: str
    """``vitdeploy`` and its version."""
    model: ModelRecord | None = None
    """Null for a model of the user's own, which exists as artifacts only."""
    output: KnownOutput = "logits"
    """What artifacts return first."""
    outputs: tuple[KnownOutput, ...] = Field(default_factory=_only_output)
    """All that they return, in order."""
    input: InputKind = "float"
    preprocess: Preprocess | None = None
    labels: tuple[str, ...] | None = None
    scores: Scores = "softmax"
    """What logits become where classes are named."""
    parameters: Count = 0
    flops: Count | None = None
    """Of one image through the reference model, a multiply-add counted as two."""
    rewrites: tuple[Rewrite, ...] = ()
    artifacts: tuple[Artifact, ...] = ()
    parity: tuple[ParityRecord, ...] = ()
    choices: tuple[Choice, ...] = ()
    """At most one per machine and image size; besides, for serving, one of each artifact on each backend."""
    sizes: tuple[SizeRecord, ...] = ()
    """Image sizes beside the first, of which ``model``, ``preprocess`` and ``flops`` are."""
    calibration: CalibrationRecord | None = None
    """Of quantised artifacts; null where there are none."""
    provenance: Provenance
    files: dict[SafePath, FileRecord] = Field(default_factory=dict)
    digest: str = ""
    """sha256 of this manifest's canonical form with ``digest`` empty."""

    @property
    def grid_thw(self) -> tuple[int, int, int] | None:
        """Frames, rows and columns of patches, of a vision-language model's tower; written for those who read
        the manifest alone."""
        return None if self.model is None else self.model.grid_thw

    @property
    def image_size(self) -> Size | None:
        """The first, or only, height and width; None where nothing here tells it."""
        if self.model is not None:
            return self.model.image_size
        return self.preprocess.size if self.preprocess else None

    @property
    def refuses_images(self) -> str | None:
        """Why no image files can go in; None where they can."""
        if self.preprocess is None:
            return "says nothing of preprocessing"
        if self.input == "patches":
            return "reads patches as its own image processor makes them, not images"
        if not self.preprocess.takes_images:
            return f"reads tensors of {self.preprocess.channels} channels, not images"
        return None

    @property
    def gives(self) -> str:
        """The names of what comes out, in a sentence."""
        return ", ".join(self.outputs)

    @property
    def classifies(self) -> bool:
        """Whether logits come out, alone or beside others."""
        return "logits" in self.outputs

    @property
    def classifies_images(self) -> bool:
        """Whether image files go in and classes come out."""
        return self.classifies and self.refuses_images is None

    @property
    def embeds_images(self) -> bool:
        """Whether image files go in and vectors come out."""
        return self.vectors is not None and self.refuses_images is None

    @property
    def vectors(self) -> TensorSpec | None:
        """The output that is a vector for each image: the embedding, else the features; None where neither
        comes out."""
        if self.artifacts:
            specs = self.artifacts[0].outputs
        else:
            specs = tuple(output_spec(self.model, name) for name in self.outputs) if self.model else ()
        named = {spec.name: spec for spec in specs}
        return named.get("embedding") or named.get("features")

    @property
    def towards_vectors(self) -> str:
        """What to do, in a hint, where a vector of each image is wanted and none comes out."""
        if self.model is None or self.model.output_shape("embedding") is not None:
            return "export with --output embedding"
        return "Predictor.outputs in Python, and /v2/models/NAME/infer of a server, give what comes out"

    def only(self, names: Collection[str]) -> Manifest:
        """The draft of a bundle that has these artifacts alone: with what is said of them, and without
        the files that only others use."""
        kept = tuple(artifact for artifact in self.artifacts if artifact.name in names)
        used = {file for artifact in kept for file in artifact.files}
        unused = {file for artifact in self.artifacts for file in artifact.files} - used
        quantised = any(artifact.is_quantised for artifact in kept)
        return self.model_copy(
            update={
                "artifacts": kept,
                "parity": tuple(record for record in self.parity if record.artifact in names),
                "choices": tuple(c for c in self.choices if c.artifact is None or c.artifact in names),
                "calibration": self.calibration if quantised else None,
                "files": {name: record for name, record in self.files.items() if name not in unused},
            }
        )

    @property
    def max_abs(self) -> float | None:
        """The absolute bound on errors that the user gave; it holds for every artifact."""
        return next((record.tolerance.max_abs for record in self.parity), None)

    @model_serializer(mode="wrap")
    def _dump(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out no ``choices``, ``sizes`` or ``calibration``, the usual ``scores`` and a single output
        among ``outputs``: bundles from before them keep their digest."""
        fields: dict[str, Any] = dump(self)
        if len(self.outputs) == 1:
            fields.pop("outputs", None)
        if not self.choices:
            fields.pop("choices", None)
        if not self.sizes:
            fields.pop("sizes", None)
        if self.calibration is None:
            fields.pop("calibration", None)
        if self.scores == "softmax":
            fields.pop("scores", None)
        if self.grid_thw is not None:
            fields["grid_thw"] = list(self.grid_thw)
        return fields

    @model_validator(mode="before")
    @classmethod
    def _without_grid(cls, fields: Any) -> Any:
        """``grid_thw`` follows from the model; that it is the same, the manifest's canonical form tells."""
        return {n: v for n, v in fields.items() if n != "grid_thw"} if isinstance(fields, dict) else fields

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        names = [artifact.name for artifact in self.artifacts]
        for name in {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two artifacts are named {name!r}")
        if self.outputs[:1] != (self.output,) or len(set(self.outputs)) < len(self.outputs):
            raise ValueError(f"outputs {list(self.outputs)} do not begin with {self.output!r}, each once")
        classes = self.model.classes if self.model else 0
        if self.labels is not None and classes and len(self.labels) != classes:
            raise ValueError(f"{len(self.labels)} labels for {classes} classes")
        if self.model and self.preprocess and self.preprocess.channels != self.model.channels:
            raise ValueError(
                f"preprocess.mean has {self.preprocess.channels} numbers, but model.channels is "
                f"{self.model.channels}"
            )
        self._check_sizes()
        if MANIFEST in self.files:
            raise ValueError(f"{MANIFEST} lists itself")
        for artifact in self.artifacts if self.digest else ():
            if missing := set(artifact.files) - set(self.files):
                raise ValueError(f"artifact {artifact.name!r} uses an unlisted file {min(missing)!r}")
        return self

    def _check_sizes(self) -> None:
        further = [record.image_size for record in self.sizes]
        sizes = [self.image_size, *further]
        if further and (self.image_size is None or len(set(sizes)) < len(sizes)):
            raise ValueError(f"sizes {list(map(size_name, further))} do not differ from the first, each once")
        for record in self.sizes:
            if self.model and self.model.at_size(record.image_size).grid_thw != record.grid_thw:
                raise ValueError(f"grid_thw of {size_name(record.image_size)} is not the model's")
            if (record.preprocess is None) != (self.preprocess is None):
                raise ValueError(f"only some sizes have a preprocess: see {size_name(record.image_size)}")
            if self.preprocess and record.preprocess and record.preprocess.mean != self.preprocess.mean:
                raise ValueError(
                    f"preprocess.mean of {size_name(record.image_size)} is another than of the first"
                )
        for artifact in self.artifacts:
            if (size := artifact.image_size) is not None and size not in further:
                raise ValueError(
                    f"artifact {artifact.name!r} is of {size_name(size)}, which sizes does not list"
                )


def canonical(manifest: Manifest) -> bytes:
    """The only bytes a manifest may have on disk: UTF-8 JSON, keys sorted, two spaces, a final newline."""
    document = manifest.model_dump(mode="json")
    text = json.dumps(document, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode()


def digest_of(manifest: Manifest) -> str:
    """The digest a manifest must carry: the sha256 of its canonical form with an empty digest."""
    return hashlib.sha256(canonical(manifest.model_copy(update={"digest": ""}))).hexdigest()


def seal(draft: Manifest, files: Mapping[str, FileRecord]) -> Manifest:
    """Return the draft with its file table, its artifacts' sizes and its digest.

    Raises:
        BundleError: the draft does not describe these files, or cannot be written.
    """
    for artifact in draft.artifacts:
        if missing := set(artifact.files) - set(files):
            raise BundleError(f"artifact {artifact.name!r} has no file {min(missing)!r}")
    artifacts = tuple(
        artifact.model_copy(update={"size": sum(files[name].size for name in artifact.files)})
        for artifact in draft.artifacts
    )
    try:
        filled = draft.model_copy(update={"files": dict(files), "artifacts": artifacts, "digest": ""})
        plain = Manifest.model_validate(filled.model_dump(mode="json"))  # 1 becomes 1.0 where a float belongs
        sealed = plain.model_copy(update={"digest": digest_of(plain)})
        return parse(canonical(sealed), MANIFEST)
    except ValidationError as error:
        raise BundleError(f"the manifest cannot be written: {first_problem(error)}") from error
    except ValueError as error:  # a NaN or a lone surrogate: no JSON for it
        raise BundleError(f"the manifest cannot be written: {error}") from error


def parse(data: bytes, where: str) -> Manifest:
    """Read a sealed manifest; ``where`` names it in errors.

    Raises:
        BundleError: not JSON, a newer schema, not the schema, an unsafe path, or any byte changed.
    """
    document = _load_json(data, where)
    version = document.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise BundleError(f"{where}: no valid schema_version, so this is not a vitdeploy bundle")
    if version > SCHEMA_VERSION:
        raise BundleError(
            f"{where}: schema version {version} is newer than this vitdeploy reads ({SCHEMA_VERSION})",
            hint="pip install --upgrade vitdeploy",
        )
    try:
        manifest = Manifest.model_validate(document)
        intact = canonical(manifest) == data and digest_of(manifest) == manifest.digest
    except ValidationError as error:
        raise BundleError(f"{where}: {first_problem(error)}") from error
    except VitdeployError as error:  # our dataclasses check themselves
        raise BundleError(f"{where}: {error.message}") from error
    except ValueError as error:
        raise BundleError(f"{where}: {error}") from error
    if not intact:
        raise BundleError(f"{where}: changed after it was written (its digest does not match)", hint=REBUILD)
    return manifest


def _load_json(data: bytes, where: str) -> dict[str, Any]:
    if len(data) > MAX_MANIFEST_BYTES:
        raise BundleError(f"{where}: {len(data)} bytes, but a manifest has at most {MAX_MANIFEST_BYTES}")
    try:
        document = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        detail = " ".join(str(error).split())
        raise BundleError(f"{where}: not readable as JSON ({detail})", hint=REBUILD) from error
    if not isinstance(document, dict):
        raise BundleError(f"{where}: not a JSON object", hint=REBUILD)
    return document


def first_problem(error: ValidationError, *within: str) -> str:
    """What pydantic found, in one line: where, inside of ``within``, what, and how much more there is."""
    problems = error.errors(include_url=False, include_context=False)
    place = ".".join(map(str, (*within, *problems[0]["loc"])))
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    detail = problems[0]["msg"].removeprefix("Value error, ")
    return f"{place}: {detail}{more}" if place else f"{detail}{more}"
