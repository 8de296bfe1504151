"""What a stranger's file and its neighbours say, held against its graph and the checkpoint; nothing runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vitdeploy.bundle.dtypes import PRECISION_DTYPES
from vitdeploy.bundle.onnx_graph import GEMMS, graphs_of, prove_precision
from vitdeploy.bundle.proofs import OpPrecision
from vitdeploy.checkpoint.documents import read_json
from vitdeploy.checkpoint.families.huggingface import labels_of
from vitdeploy.config import Preprocess
from vitdeploy.errors import CheckpointError
from vitdeploy.images.preprocess import from_huggingface
from vitdeploy.verification.foreign.onnx_file import Described, OnnxFile, shown
from vitdeploy.verification.foreign.report import Finding, State
from vitdeploy.verification.foreign.truth import Truth

_LISTED = 3
"""How many operations a line names."""
_CONFIG, _PROCESSOR = "config.json", "preprocessor_config.json"
_KEYS: Mapping[str, str] = {
    "mean": "image_mean",
    "std": "image_std",
    "rescale": "rescale_factor",
    "resize_edge": "size.shortest_edge",
    "resize_to": "size",
    "size": "crop_size",
}
"""What fields of a ``Preprocess`` are called in a preprocessor_config.json, where it is another name."""
_COMPARED = ("size", "resize", "resize_edge", "resize_to", "resample", "rescale", "mean", "std")
"""Fields that decide pixels; the others are about odd margins, small images and turned photographs."""
_WIDTH = {"float64": 64, "float32": 32, "float16": 16, "bfloat16": 16}


def audit_precision(file: OnnxFile) -> Finding:
    """Hold the dtype of every GEMM, convolution and attention against the precision the file claims."""
    claim, source = file.claim

    def finding(state: State, detail: str) -> Finding:
        return Finding(file.name, "precision", state, detail)

    counts = ", ".join(f"{count} {name}" for name, count in file.quantised.most_common(_LISTED))
    if claim == "quantised":
        if not file.quantised:
            return finding("failed", f"{source} says that it is quantised, and no operator is")
        return finding("not checked", f"quantised ({counts}): there is no one dtype to hold them against")
    if file.quantised:
        return finding("failed", f"{claim} by {source}, but it is quantised: {counts}")
    if claim == "mixed":
        return finding(
            "not checked", "mixed: only the manifest of its bundle says which operations may be wide"
        )
    gemms, inner = _gemms(file)
    known = [op for op in gemms if op.dtype != "undefined"]
    if not known:
        return finding("not checked", "no GEMM whose dtype can be told")
    wanted = PRECISION_DTYPES[claim]
    wrong = [op for op in known if op.dtype != wanted]
    dtypes = {op.dtype for op in known}
    if len(dtypes) == 1 and wrong and source.endswith("weights") and _wider(wrong[0].dtype, wanted):
        return finding("held", f"weights in {claim}, every GEMM ({len(known)}) in {wrong[0].dtype}")
    if wrong:
        named = ", ".join(f"{shown(op.name or op.op)} ({op.dtype})" for op in wrong[:_LISTED])
        more = f" and {len(wrong) - _LISTED} more" if len(wrong) > _LISTED else ""
        compute = "computes" if len(wrong) == 1 else "compute"
        return finding(
            "failed",
            f"{claim} by {source}, but {len(wrong)} of {len(known)} GEMMs {compute} in another dtype: "
            f"{named}{more}",
        )
    left = len(gemms) - len(known) + inner
    untold = f"; {left} more cannot be told" if left else ""
    return finding("held", f"{claim} by {source}; {len(known)} GEMMs in it{untold}")


def _wider(dtype: str, than: str) -> bool:
    return _WIDTH.get(dtype, 0) > _WIDTH[than]


def _gemms(file: OnnxFile) -> tuple[list[OpPrecision], int]:
    """The GEMMs, those of the file's own functions too; and how many lie inside of ``If`` and ``Loop``."""
    model = file.model
    if model.functions:
        from onnx.inliner import inline_local_functions

        model = inline_local_functions(model)
    _, *inner = graphs_of(model)
    hidden = sum(node.op_type in GEMMS for graph in inner for node in graph.node)
    return [op for op in prove_precision(model, "fp32", ()).ops if op.op in GEMMS], hidden


def check_labels(file: Described, truth: Truth) -> Iterator[Finding]:
    """Hold the labels that the file, or the config.json beside it, states against the checkpoint's."""

    def finding(state: State, detail: str) -> Finding:
        return Finding(file.name, "labels", state, detail)

    stated: list[tuple[str, tuple[str, ...]]] = []
    if file.said.labels is not None:
        stated.append((f"the file's metadata ({file.said.source})", file.said.labels))
    config = _beside(file, _CONFIG)
    if config is not None and truth.config is not None and config.get("id2label"):
        try:
            labels = labels_of(config, truth.config.classes)
        except CheckpointError as error:
            yield finding("failed", error.message)
        else:
            stated += [(f"id2label in {_CONFIG}", labels)] if labels else []
    if truth.labels is None:
        what = "the checkpoint names no classes" if stated else "neither the file nor the checkpoint has any"
        yield finding("not checked", what)
        return
    if not stated:
        yield finding(
            "not checked", f"the file states none, and there is no id2label in a {_CONFIG} beside it"
        )
    for source, labels in stated:
        if len(labels) != len(truth.labels):
            yield finding("failed", f"{source}: {len(labels)} labels, the checkpoint has {len(truth.labels)}")
            continue
        pairs = zip(labels, truth.labels, strict=True)
        other = [i for i, (ours, theirs) in enumerate(pairs) if ours != theirs]
        if other:
            first = other[0]
            more = f" ({len(other)} of {len(labels)} classes differ)" if len(other) > 1 else ""
            yield finding(
                "failed",
                f"{source}: class {first} is {_short(labels[first])}, "
                f"in the checkpoint {_short(truth.labels[first])}{more}",
            )
        else:
            yield finding("held", f"{source}: {len(labels)} labels")


def check_scores(file: Described, truth: Truth) -> Iterator[Finding]:
    """Hold what the file's metadata says of its logits against the checkpoint; most files say nothing."""
    if file.said.scores is None:
        return
    ours, theirs = file.said.scores, truth.stated_scores
    detail = f"the file's metadata says {ours}"
    if theirs is None:
        yield Finding(file.name, "scores", "not checked", f"{detail}, the checkpoint nothing")
    elif ours == theirs:
        yield Finding(file.name, "scores", "held", detail)
    else:
        yield Finding(file.name, "scores", "failed", f"{detail}, the checkpoint {theirs}")


def check_preprocessing(file: Described, truth: Truth) -> Iterator[Finding]:
    """Hold the preprocessing that the file, or what lies beside it, states against the checkpoint's."""

    def finding(state: State, detail: str) -> Finding:
        return Finding(file.name, "preprocessing", state, detail)

    stated: list[tuple[str, Mapping[str, Any], Mapping[str, str]]] = []
    if file.said.preprocess:
        stated.append((f"the file's metadata ({file.said.source})", file.said.preprocess, {}))
    settings = _beside(file, _PROCESSOR)
    if settings is not None:
        channels = truth.preprocess.channels
        model_type = str((_beside(file, _CONFIG) or {}).get("model_type", "vit"))
        try:
            stated.append((_PROCESSOR, _fields(from_huggingface(settings, model_type, channels)), _KEYS))
        except CheckpointError as error:
            yield finding("not checked", f"{_PROCESSOR}: {error.message}")
    truths = truth.stated_preprocess
    if truths is None:
        sources = f"{', '.join(source for source, *_ in stated)}: " if stated else ""
        yield finding("not checked", f"{sources}the checkpoint says nothing of it")
        return
    if not stated and settings is None:
        yield finding("not checked", f"the file states none, and there is no {_PROCESSOR} beside it")
    expected = _fields(truths)
    for source, fields, names in stated:
        wrong = [
            f"{names.get(key, key)} is {_plain(value)}, in the checkpoint {_plain(expected[key])}"
            for key, value in _whole(fields).items()
            if key in _COMPARED and not _equal(value, expected[key])
        ]
        if wrong:
            yield finding("failed", f"{source}: {'; '.join(wrong)}")
        else:
            keys = ", ".join(names.get(key, key) for key in _COMPARED if fields.get(key) is not None)
            yield finding("held", f"{source}: {keys}")


def _fields(preprocess: Preprocess) -> dict[str, Any]:
    return _whole({name: getattr(preprocess, name) for name in _COMPARED})


def _whole(fields: Mapping[str, Any]) -> dict[str, Any]:
    """With ``resize_to`` where resizing to the final size leaves it out."""
    whole = dict(fields)
    if whole.get("resize") == "exact" and whole.get("resize_to") is None:
        whole["resize_to"] = whole.get("size")
    return whole


def _equal(one: Any, other: Any) -> bool:
    """Equal, numbers up to how many digits people write."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, float) or isinstance(other, float):
        numbers = isinstance(one, int | float) and isinstance(other, int | float)
        return numbers and abs(one - other) <= 1e-5 * max(abs(one), abs(other))
    return bool(one == other)


def _beside(file: Described, name: str) -> dict[str, Any] | None:
    """A JSON file beside the model; None where there is none.

    Raises:
        CheckpointError: it is no JSON object.
    """
    path: Path = file.folder / name
    return read_json(path) if path.is_file() else None


def _plain(value: Any) -> str:
    return json.dumps(value)


def _short(label: str) -> str:
    return repr(label if len(label) <= 60 else f"{label[:57]}...")
