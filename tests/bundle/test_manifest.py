"""The manifest: one canonical form, and everything else refused."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from vitdeploy.bundle.manifest import (
    MAX_MANIFEST_BYTES,
    SCHEMA_VERSION,
    Artifact,
    FileRecord,
    Manifest,
    Provenance,
    Rewrite,
    TensorSpec,
    canonical,
    digest_of,
    parse,
    safe_path,
    seal,
)
from vitdeploy.bundle.proofs import OpPrecision, ParityMetrics, ParityRecord, PrecisionProof, Tolerance
from vitdeploy.config import BatchRange, Preprocess, ViTConfig
from vitdeploy.errors import BundleError
from vitdeploy.variants import decode_variant

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
HASHES = st.text("0123456789abcdef", min_size=64, max_size=64)
COUNTS = st.integers(0, 2**62)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
PATHS = st.lists(st.text("abcXYZ019_-", min_size=1, max_size=6), min_size=1, max_size=3).map("/".join)
PRECISIONS = st.sampled_from(["fp32", "fp16", "bf16", "mixed"])
BATCHES = st.lists(st.integers(1, 4096), min_size=3, max_size=3).map(lambda n: BatchRange(*sorted(n)))
SPECS = st.builds(
    TensorSpec,
    name=TEXT,
    dtype=st.sampled_from(["float32", "uint8"]),
    shape=st.lists(st.one_of(st.integers(), TEXT), max_size=4).map(tuple),
)
PROOFS = st.builds(
    PrecisionProof,
    ops=st.lists(st.builds(OpPrecision, name=TEXT, op=TEXT, dtype=st.just("float16")), max_size=3).map(tuple),
    ok=st.booleans(),
)
TOLERANCES = st.builds(
    Tolerance,
    relative=st.floats(1e-12, 1),
    kl=st.floats(1e-12, 1),
    batch_invariance=st.floats(1e-12, 1),
)
METRICS = st.builds(ParityMetrics, rows=COUNTS, elements=COUNTS, max_abs=st.none() | FLOATS, relative=FLOATS)
RECORDS = st.builds(
    ParityRecord, batch=st.integers(1, 99), metrics=METRICS, tolerance=TOLERANCES, failures=st.tuples(TEXT)
)
DISTILLED = decode_variant("deit_tiny_distilled_patch16_224")
CONFIGS = st.sampled_from(
    [None, ViTConfig(), DISTILLED, ViTConfig(classes=0), ViTConfig(channels=1), ViTConfig(channels=4)]
)


def preprocesses(channels: int) -> st.SearchStrategy[Preprocess]:
    return st.builds(
        Preprocess,
        mean=st.tuples(*[FLOATS] * channels),
        std=st.just((0.5,) * channels),
        rescale=FLOATS,
        exif=st.booleans(),
    )


def draft(**fields: Any) -> Manifest:
    defaults: dict[str, Any] = {
        "name": "tiny",
        "created": "2026-11-21T03:00:00Z",
        "generator": "vitdeploy 0.1.0",
        "provenance": Provenance(source="tiny", family="vit"),
    }
    return Manifest(**(defaults | fields))


def artifact(name: str = "onnx-fp32", **fields: Any) -> Artifact:
    defaults: dict[str, Any] = {
        "format": "onnx",
        "precision": "fp32",
        "requested": "fp32",
        "path": "model.onnx",
        "files": ("model.onnx",),
        "batch": BatchRange(),
        "inputs": (TensorSpec(name="pixel_values", dtype="float32", shape=("N", 3, 4, 4)),),
        "outputs": (TensorSpec(name="logits", dtype="float32", shape=("N", 2)),),
    }
    return Artifact(name=name, **(defaults | fields))


REWRITES = st.lists(st.builds(Rewrite, name=TEXT, detail=TEXT, flops_saved=COUNTS), max_size=2)
FILES = st.dictionaries(PATHS, st.builds(FileRecord, size=COUNTS, sha256=HASHES), min_size=1, max_size=4)
RECORD = FileRecord(size=3, sha256="0" * 64)


@st.composite
def manifests(draw: st.DrawFn) -> tuple[Manifest, dict[str, FileRecord]]:
    files = draw(FILES)
    names = draw(st.lists(NAMES, unique=True, max_size=3))
    artifacts = []
    for name in names:
        own = tuple(draw(st.lists(st.sampled_from(sorted(files)), min_size=1, max_size=3, unique=True)))
        fields = {
            "precision": draw(PRECISIONS),
            "requested": draw(PRECISIONS),
            "batch": draw(BATCHES),
            "inputs": (draw(SPECS),),
            "outputs": (draw(SPECS),),
            "proof": draw(st.none() | PROOFS),
            "fallback": draw(st.none() | TEXT),
        }
        artifacts.append(artifact(name, path=own[0], files=own, **fields))
    model = draw(CONFIGS)
    manifest = draft(
        name=draw(NAMES),
        model=model,
        preprocess=draw(st.none() | preprocesses(model.channels if model else draw(st.integers(1, 5)))),
        artifacts=tuple(artifacts),
        parity=tuple(draw(st.lists(RECORDS, max_size=2))),
        rewrites=tuple(draw(REWRITES)),
        flops=draw(st.none() | COUNTS),
        provenance=draw(st.builds(Provenance, source=TEXT, family=TEXT, seed=st.none() | st.integers())),
    )
    return manifest, files


@given(manifests())
@settings(max_examples=150)
def test_whatever_is_sealed_reads_back_the_same(pair: tuple[Manifest, dict[str, FileRecord]]) -> None:
    manifest, files = pair
    sealed = seal(manifest, files)
    data = canonical(sealed)
    again = parse(data, "here")
    assert again == sealed
    assert canonical(again) == data
    assert again.files == files
    filled = {"files", "digest", "artifacts"}
    assert again.model_dump(exclude=filled) == manifest.model_dump(exclude=filled)
    for found, given_ in zip(again.artifacts, manifest.artifacts, strict=True):
        assert found == given_.model_copy(update={"size": sum(files[name].size for name in given_.files)})


def test_canonical_form_is_what_the_documentation_says() -> None:
    """An independent reading: sorted keys, two spaces, UTF-8; the digest over the same without itself."""
    sealed = seal(draft(labels=("Käse", "猫")), {"model.onnx": RECORD})
    data = canonical(sealed)
    document = json.loads(data)
    assert data.decode() == json.dumps(document, sort_keys=True, indent=2, ensure_ascii=False) + "\n"
    emptied = json.dumps(document | {"digest": ""}, sort_keys=True, indent=2, ensure_ascii=False) + "\n"
    assert hashlib.sha256(emptied.encode()).hexdigest() == document["digest"]


def test_integers_where_floats_belong_are_written_as_floats() -> None:
    """As processors' JSON has them: a mean of [0, 0, 0]."""
    sealed = seal(draft(preprocess=Preprocess(mean=(0, 0, 0), std=(1, 1, 1), rescale=1)), {"a": RECORD})
    assert parse(canonical(sealed), "here") == sealed


@pytest.mark.slow
def test_every_flipped_bit_is_found() -> None:
    data = canonical(seal(draft(artifacts=(artifact(),), labels=("Käse",)), {"model.onnx": RECORD}))
    for position in range(len(data)):
        for bit in (0, 3, 5, 6, 7):
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            with pytest.raises(BundleError):
                parse(bytes(damaged), "here")


def _resealed(**changes: Any) -> bytes:
    """A manifest somebody forged with a correct digest."""
    document = json.loads(canonical(seal(draft(artifacts=(artifact(),)), {"model.onnx": RECORD})))
    document |= changes | {"digest": ""}
    text = json.dumps(document, sort_keys=True, indent=2, ensure_ascii=False) + "\n"
    document["digest"] = hashlib.sha256(text.encode()).hexdigest()
    return (json.dumps(document, sort_keys=True, indent=2, ensure_ascii=False) + "\n").encode()


UNSAFE = [
    "../model.onnx",
    "engines/../../model.onnx",
    "/etc/passwd",
    "engines//model.plan",
    "./model.onnx",
    "engines/",
    "..",
    "",
    "C:/model.onnx",
    "C:model.onnx",
    "engines\\model.plan",
    "\\\\host\\share",
    "model.onnx\x00.png",
    "model\n.onnx",
    "engines./model.plan",
    "a" * 600,
]


@pytest.mark.parametrize("path", UNSAFE)
def test_paths_that_could_leave_the_folder_are_refused(path: str) -> None:
    with pytest.raises(BundleError, match="here: files"):
        parse(_resealed(files={path: RECORD.model_dump()}), "here")
    with pytest.raises(ValidationError):
        artifact(path=path, files=(path,))


@pytest.mark.parametrize(
    "path", ["model.onnx", "model.onnx.data", "engines/sm_90/model.fp16.plan", "..hidden", "a-b_c"]
)
def test_plain_paths_are_taken(path: str) -> None:
    assert safe_path(path) == path


def test_a_newer_schema_is_refused_whatever_else_it_says() -> None:
    data = json.dumps({"schema_version": SCHEMA_VERSION + 1, "something": "new"}).encode()
    with pytest.raises(BundleError, match=r"schema version 2 is newer than .* \(1\)") as caught:
        parse(data, "here")
    assert caught.value.hint == "pip install --upgrade vitdeploy"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{",
        b"null",
        b"[" * 100_000,
        b"{}",
        b'{"schema_version": "1"}',
        b'{"schema_version": true}',
        b'{"schema_version": 0}',
        b'{"schema_version": 1}',
        b'{"schema_version": 1, "name": ' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_no_manifest_gets_one_clear_line(data: bytes) -> None:
    with pytest.raises(BundleError, match=r"^here: ") as caught:
        parse(data, "here")
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 300


def test_length_is_limited_before_parsing() -> None:
    with pytest.raises(BundleError, match="a manifest has at most"):
        parse(b" " * (MAX_MANIFEST_BYTES + 1), "here")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"extra": 1}, "extra"),
        ({"output": "classes"}, "output"),
        ({"outputs": ["logits", "classes"]}, "outputs"),
        ({"outputs": ["features", "logits"]}, "do not begin with 'logits'"),
        ({"outputs": ["logits", "features", "logits"]}, "each once"),
        ({"outputs": []}, "do not begin with 'logits'"),
        ({"labels": ["a", "b"], "model": {"classes": 3}}, "2 labels for 3 classes"),
        ({"model": {"width": 7}}, "not divisible"),
        ({"files": {}}, "unlisted file"),
        ({"files": {"other": RECORD.model_dump()}}, "unlisted file 'model.onnx'"),
        ({"files": {"manifest.json": RECORD.model_dump()}}, "lists itself"),
        ({"files": {"model.onnx": {"size": -1, "sha256": "0" * 64}}}, "size"),
        ({"files": {"model.onnx": {"size": 1, "sha256": "0" * 63 + "G"}}}, "sha256"),
        ({"parameters": float("nan")}, "parameters"),
    ],
)
def test_forgeries_with_a_right_digest_still_face_the_schema(changes: dict[str, Any], message: str) -> None:
    data = _resealed(**changes)
    with pytest.raises(BundleError, match=message):
        parse(data, "here")


def test_outputs_are_written_where_there_are_several() -> None:
    for output in ("logits", "layer_3"):
        one = draft(output=output)
        assert one.outputs == (output,)
        assert b'"outputs"' not in canonical(one)
    both = draft(output="embedding", outputs=("embedding", "logits"))
    assert json.loads(canonical(both))["outputs"] == ["embedding", "logits"]
    sealed = seal(both, {})
    assert parse(canonical(sealed), "here") == sealed
    assert (sealed.classifies, sealed.gives) == (True, "embedding, logits")
    assert not draft(output="features").classifies


def test_two_artifacts_of_one_name_are_refused() -> None:
    with pytest.raises(ValidationError, match="two artifacts are named 'onnx-fp32'"):
        draft(artifacts=(artifact(), artifact()))


def test_an_artifact_without_its_file_is_not_sealed() -> None:
    with pytest.raises(BundleError, match=r"has no file 'model\.onnx'"):
        seal(draft(artifacts=(artifact(),)), {"other": RECORD})


@pytest.mark.parametrize("fields", [{"labels": ("\udfff",)}, {"parameters": -1}])
def test_what_json_cannot_hold_is_an_error_before_writing(fields: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match="cannot be written"):
        seal(draft().model_copy(update=fields), {"a": RECORD})


def test_digest_ignores_only_itself() -> None:
    one = draft()
    assert digest_of(one) == digest_of(one.model_copy(update={"digest": "x"}))
    assert digest_of(one) != digest_of(one.model_copy(update={"name": "other"}))


def test_means_are_as_many_as_channels() -> None:
    with pytest.raises(ValueError, match=r"preprocess\.mean has 3 numbers, but model\.channels is 1"):
        draft(model=ViTConfig(channels=1), preprocess=Preprocess())
    grey = Preprocess(mean=(0.5,), std=(0.5,))
    assert draft(model=ViTConfig(channels=1), preprocess=grey).classifies_images
    assert not draft(preprocess=grey, output="features").classifies_images
    bands = draft(preprocess=Preprocess(mean=(0.5,) * 12, std=(0.5,) * 12))
    assert not bands.classifies_images
    assert bands.refuses_images == "reads tensors of 12 channels, not images"
    assert draft().refuses_images == "says nothing of preprocessing"


def test_only_some_artifacts() -> None:
    """What belongs to the others goes with them; what several use stays as long as one does."""
    paths = {name: f"model.{name}.onnx" for name in ("fp32", "fp16", "bf16")}
    shared = [
        artifact(f"onnx-{name}", path=path, files=(path, "all.data", f"{name}.json"))
        for name, path in paths.items()
    ]
    files = {name: RECORD for a in shared for name in a.files} | {"weights.safetensors": RECORD}
    whole = seal(draft(artifacts=tuple(shared)), files)
    some = whole.only({"onnx-fp16", "no such artifact"})
    assert [a.name for a in some.artifacts] == ["onnx-fp16"]
    assert set(some.files) == {"model.fp16.onnx", "all.data", "fp16.json", "weights.safetensors"}
    assert seal(some, some.files).digest != whole.digest
    assert set(whole.only(()).files) == {"weights.safetensors"}
    assert whole.only({a.name for a in shared}) == whole
