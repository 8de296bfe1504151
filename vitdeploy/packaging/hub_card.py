"""The model card of a hub folder: a metadata block, how to run it, what it was made from, its proof."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from vitdeploy.benchmark.tables import Table, TableColumn, TableRow, error_text, plain_text
from vitdeploy.benchmark.views import markdown_table
from vitdeploy.bundle.manifest import Manifest
from vitdeploy.bundle.proofs import ParityRecord
from vitdeploy.config import Preprocess, size_name
from vitdeploy.packaging.target import fill_template

JS_TYPES = frozenset(("beit", "deit", "dinov2", "dinov2_with_registers", "swin", "vit"))
"""Model types of which transformers.js (4.3) has image classifiers; others are run by its base class."""


RESIZE = "pillow_resize.mjs"
"""What resizes images for transformers.js as Pillow does."""


@dataclass(frozen=True)
class Card:
    """What a model card says."""

    name: str
    where: str
    """The repository, or the folder's name."""
    pushed: bool
    """Whether ``where`` is a repository."""
    manifest: Manifest
    """Of the folder."""
    source: Manifest
    """Of the bundle that it is made from."""
    model: str
    """The class in transformers."""
    model_type: str
    needs_code: bool
    files: Mapping[str, str]
    """ONNX files, by their ``dtype`` in transformers.js."""
    license: str | None
    base_model: str | None
    notes: Sequence[str]
    """Where transformers prepares images otherwise."""

    @property
    def resizes(self) -> bool:
        """Whether images are resized by a filter."""
        spec = self.manifest.preprocess
        return spec is not None and spec.resize != "none" and spec.resample != "nearest"


def model_card(card: Card) -> str:
    """The text of README.md."""
    first = next(iter(card.files))
    return fill_template(
        "hub.md",
        metadata="\n".join(_metadata(card)),
        name=card.name,
        what=_what(card),
        where=card.where,
        verify=_verify(card),
        trust=", trust_remote_code=True" if card.needs_code else "",
        trusted=_TRUST if card.needs_code else "",
        folder=_folder(card),
        onnx=card.files[first],
        javascript=_javascript(card, first),
        resize=_RESIZE if card.resizes else ".",
        dtypes=" or ".join(f"`{dtype}`" for dtype in card.files),
        scores=_SCORES[card.manifest.scores],
        facts="\n".join(markdown_table(_facts(card))),
        preprocess=_preprocess(card),
        parity="\n".join(markdown_table(_parity(card))),
    )


_TRUST = """
transformers has no class for a head of text vectors, which reads the image's embedding at length 1: the
folder brings its own, `modeling_zero_shot.py`, and transformers wants to be told that you trust it.
"""
_RESIZE = f""", and `{RESIZE}`
of this folder beside your program: transformers.js looks at the nearest pixels only, however much smaller an
image gets, and with the module its scores are those of Python."""
_SCORES = {
    "softmax": "weights = np.exp(logits - logits.max())\nscores = weights / weights.sum()",
    "sigmoid": "scores = 1 / (1 + np.exp(-logits))",
    "none": "scores = logits",
}


def _metadata(card: Card) -> Iterator[str]:
    """The YAML block; its values are JSON, which YAML reads."""
    if card.license:
        yield f"license: {json.dumps(card.license)}"
    if card.base_model:
        yield f"base_model: {json.dumps(card.base_model)}"
    yield "library_name: transformers"
    yield "pipeline_tag: image-classification"
    yield f"tags: {json.dumps(['image-classification', 'onnx', 'transformers.js', 'vitdeploy'])}"


def _what(card: Card) -> str:
    manifest = card.manifest
    classes = len(manifest.labels) if manifest.labels else manifest.model.classes if manifest.model else 0
    size = f" of {size_name(manifest.image_size)} pixels" if manifest.image_size else ""
    kind = (
        "A zero-shot image classifier with its labels built in" if card.needs_code else "An image classifier"
    )
    return f"{kind}: images{size} in, logits of {classes} classes out."


def _folder(card: Card) -> str:
    if not card.pushed:
        return f"folder = Path({json.dumps(card.where)})"
    load = f"folder = Path(snapshot_download({json.dumps(card.where)}))"
    return f"from huggingface_hub import snapshot_download\n\n{load}"


def _verify(card: Card) -> str:
    if not card.pushed:
        return f"vitdeploy verify {shlex.quote(card.where)}"
    return f"hf download {card.where} --local-dir {card.name}\nvitdeploy verify {card.name}"


def _javascript(card: Card, dtype: str) -> str:
    """Loading and running in transformers.js, as far as its own classes go."""
    names = [] if card.pushed else ["env"]
    where = f"'{card.where}', {{ dtype: '{dtype}' }}"
    lines = [] if card.pushed else ["env.allowRemoteModels = false;", "env.localModelPath = './';"]
    model = f"const model = await AutoModel.from_pretrained({where});"
    processor = f"const processor = await AutoProcessor.from_pretrained('{card.where}');"
    resize, scores = "processor.image_processor.resize = resize;", card.manifest.scores
    if scores == "softmax" and card.model_type in JS_TYPES:
        names.append("pipeline")
        lines.append(f"const classify = await pipeline('image-classification', {where});")
        resize = f"classify.{resize}"
    elif scores == "softmax":
        names += ["AutoModel", "AutoProcessor", "ImageClassificationPipeline"]
        pipeline = "new ImageClassificationPipeline({ task: 'image-classification', model, processor })"
        lines += [model, processor, f"const classify = {pipeline};"]
    else:
        names += ["AutoModel", "AutoProcessor", "load_image"]
        lines += [model, processor]
    lines += [resize] if card.resizes else []
    if scores == "softmax":
        lines.append("console.log(await classify('image.jpg', { top_k: 5 }));")
    else:
        lines += [
            "const { logits } = await model(await processor(await load_image('image.jpg')));",
            f"const scores = {'logits.sigmoid()' if scores == 'sigmoid' else 'logits'}.tolist()[0];",
            "const scored = scores.map((score, i) => ({ label: model.config.id2label[i], score }));",
            "console.log(scored.sort((a, b) => b.score - a.score).slice(0, 5));",
        ]
    imports = [f"import {{ {', '.join(sorted(names))} }} from '@huggingface/transformers';"]
    if card.resizes:
        imports.append(f"import {{ resize }} from '{'.' if card.pushed else f'./{card.where}'}/{RESIZE}';")
    return "\n".join([*imports, "", *lines])


def _facts(card: Card) -> Table:
    provenance, manifest = card.source.provenance, card.manifest
    facts = [
        ("made from", source_name(provenance.source)),
        ("family", provenance.family),
        ("class", f"{card.model} ({manifest.parameters:,} parameters)"),
        *((f"sha256 of {name}", digest) for name, digest in provenance.source_files.items()),
        *((("weights", f"random, seed {provenance.seed}"),) if provenance.seed is not None else ()),
        ("exported by", f"{card.source.generator}, {card.source.created}"),
        ("bundle", card.source.digest),
        *(("note", note) for note in provenance.notes),
        *(
            (
                "note",
                f"{artifact.path} is {artifact.precision}, not {artifact.requested}: {artifact.fallback}",
            )
            for artifact in manifest.artifacts
            if artifact.fallback
        ),
    ]
    columns = (TableColumn("fact", words=True), TableColumn("value", words=True))
    return Table("made from", columns, tuple(TableRow((name, plain_text(text))) for name, text in facts))


def source_name(source: str) -> str:
    """What a checkpoint was called, without where it lay on somebody's machine."""
    return PurePath(source).name if PurePath(source).is_absolute() else source


def _preprocess(card: Card) -> str:
    """How images are prepared, in a sentence, and where others do it otherwise."""
    spec = card.manifest.preprocess
    assert spec is not None
    lines = [f"Images are {_geometry(spec)}, then scaled and normalised as `preprocessor_config.json` says."]
    lines += [f"Mind that {note}." for note in card.notes]
    return "\n".join(lines)


def _geometry(spec: Preprocess) -> str:
    size, by = size_name(spec.size), spec.resample.removesuffix("_float")
    if spec.resize == "none":
        return f"cropped to {size} pixels"
    if spec.resize == "shortest_edge":
        return f"resized ({by}) to {spec.resize_edge} pixels along the shorter side and cropped to {size}"
    if spec.resize_to not in (None, spec.size):
        assert spec.resize_to is not None
        return f"resized ({by}) to {size_name(spec.resize_to)} and cropped to {size} pixels"
    return f"resized ({by}) to {size} pixels"


def _parity(card: Card) -> Table:
    paths = {artifact.name: artifact.path for artifact in card.manifest.artifacts}
    columns = (
        TableColumn("file", words=True),
        TableColumn("runtime", words=True),
        TableColumn("batch"),
        TableColumn("relative error"),
        TableColumn("largest error"),
        TableColumn("same first class"),
        TableColumn("bound"),
        TableColumn("", words=True),
    )
    rows = tuple(
        TableRow(
            (
                paths[record.artifact],
                record.backend if record.provider == "cpu" else f"{record.backend} ({record.provider})",
                record.batch,
                error_text(record.metrics.relative),
                error_text(record.metrics.max_abs),
                _agreement(record),
                error_text(record.tolerance.relative),
                "passed" if record.passed else "failed",
            )
        )
        for record in card.manifest.parity
        if record.output in (None, "logits")
    )
    return Table("proof", columns, rows)


def _agreement(record: ParityRecord) -> str:
    metrics = record.metrics
    return f"{metrics.top1_agree} of {metrics.top1_compared}" if metrics.top1_compared else "-"
