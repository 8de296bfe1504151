"""``vitdeploy inspect``: what is in a bundle, in any ONNX file, or in any engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitdeploy.cli import output, summary
from vitdeploy.errors import UsageError

if TYPE_CHECKING:
    from vitdeploy.bundle.folder import Bundle
    from vitdeploy.bundle.manifest import Manifest, TensorSpec
    from vitdeploy.bundle.onnx_graph import GraphSummary
    from vitdeploy.bundle.onnx_metadata import SelfDescription

SUMMARY = "Show what a bundle, an ONNX file or an engine contains."
_LONGEST = 200
"""Characters of a value that is shown as it is."""
EXAMPLES = (
    "vitdeploy inspect vit.bundle",
    "vitdeploy inspect vit.bundle/model.fp16.onnx",
    "vitdeploy inspect vit.bundle/engines/sm_89-rtx/model.fp16.plan",
    "vitdeploy inspect vit.bundle --json | jq .manifest.parity",
)


def command(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="BUNDLE|FILE.onnx|FILE.plan",
            help="The bundle, ONNX file or engine to look into.",
            show_default=False,
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Show what a bundle, an ONNX file or an engine contains: artifacts, precision, parity, operators.

    Of an engine, its header is read and the record beside it; that needs neither TensorRT nor a GPU.
    """
    from vitdeploy.bundle.folder import Bundle

    if path.is_dir():
        _bundle(Bundle.open(path), as_json)
    elif path.suffix == ".onnx" and path.is_file():
        _onnx(path, as_json)
    elif path.suffix in (".plan", ".engine") and path.is_file():
        _engine(path, as_json)
    elif path.exists():
        raise UsageError(f"{path}: neither a bundle nor an .onnx or .plan file")
    else:
        raise UsageError(f"{path}: does not exist")


def _bundle(bundle: Bundle, as_json: bool) -> None:
    from vitdeploy.bundle.onnx_graph import read_graph, summarise

    graphs = {
        artifact.name: summarise(read_graph(bundle.path(artifact.path)))
        for artifact in bundle.manifest.artifacts
        if artifact.format == "onnx"
    }
    if as_json:
        operators = {name: graph.operators for name, graph in graphs.items()}
        manifest = bundle.manifest.model_dump(mode="json")
        output.json_document(
            {"ok": True, "bundle": str(bundle.root), "manifest": manifest, "operators": operators}
        )
        return
    _facts(bundle.manifest)
    output.line()
    summary.print_artifacts(bundle.manifest)
    summary.print_rewrites(bundle.manifest.rewrites, bundle.manifest.flops)
    summary.print_quantisation(bundle.manifest)
    summary.print_proofs(bundle.manifest)
    if bundle.manifest.parity:
        output.heading("parity with the float64 reference, when it was exported")
        summary.print_parity(bundle.manifest.parity)
    for name, graph in graphs.items():
        _operators(name, graph)


def _facts(manifest: Manifest) -> None:
    made, config, labels = manifest.provenance, manifest.model, manifest.labels
    rows = [
        ("name", manifest.name),
        (
            "source",
            f"{made.source} ({made.family})"
            + (f", random, seed {made.seed}" if made.seed is not None else ""),
        ),
        ("created", f"{manifest.created} by {manifest.generator} on {made.platform}"),
        ("parameters", f"{manifest.parameters / 1e6:.1f} M"),
    ]
    if config:
        rows.append(("model", config.summary))
    if manifest.flops:
        rows.append(("compute", f"{output.flops(manifest.flops)} per image"))
    if manifest.sizes:
        rows.append(("image sizes", _sizes(manifest)))
    rows.extend((name, _value(spec.name, (spec.dtype, spec.shape))) for name, spec in _tensors(manifest))
    if labels and getattr(config, "head_on", None) == "embedding":
        rows.append(("head", f"zero-shot, {len(labels)} labels"))
    if labels:
        rows.append(("labels", _labels(labels)))
    if manifest.classifies:
        rows.append(("scores", manifest.scores))
    for name in ("heads", "activation"):
        if made.facts.get(name, "checkpoint") != "checkpoint":
            rows.append((name, str(getattr(config, name))))
    if manifest.preprocess and manifest.preprocess.takes_images:
        rows.extend(summary.preprocess_rows(manifest.preprocess))
    elif manifest.refuses_images:
        rows.append(("images", manifest.refuses_images))
    rows = [(name, text + _origin(made.facts, name)) for name, text in rows]
    rows.extend(("note", text) for text in made.notes)
    output.facts(rows)


def _sizes(manifest: Manifest) -> str:
    """All image sizes, the default first, each with what it costs."""
    from vitdeploy.config import size_name

    records = [(manifest.image_size, manifest.flops), *((r.image_size, r.flops) for r in manifest.sizes)]
    return ", ".join(
        (size_name(size) if size else "") + (f" ({output.flops(flops)})" if flops else "")
        for size, flops in records
    )


def _tensors(manifest: Manifest) -> list[tuple[str, TensorSpec]]:
    """What goes in and what comes out."""
    from vitdeploy.bundle.manifest import input_spec, output_specs

    if manifest.model is not None:
        inputs: Sequence[TensorSpec] = (input_spec(manifest.model, manifest.input),)
        outputs: Sequence[TensorSpec] = output_specs(manifest.model, manifest.outputs)
    else:
        inputs, outputs = manifest.artifacts[0].inputs, manifest.artifacts[0].outputs
    return [*(("input", spec) for spec in inputs), *(("output", spec) for spec in outputs)]


def _origin(facts: Mapping[str, str], name: str) -> str:
    """Where a fact is from, to be put behind it; older bundles do not say."""
    source = facts.get(name, facts.get("preprocess") if name in summary.PREPROCESS else None)
    words = {"checkpoint": "the checkpoint", "default": "a default", "user": "you"}
    return f"  [from {words[source]}]" if source else ""


def _labels(labels: Sequence[str]) -> str:
    return f"{len(labels)}: {', '.join(labels[:5])}{', ...' if len(labels) > 5 else ''}"


def _said(said: SelfDescription) -> Iterator[tuple[str, object]]:
    """What an ONNX file says of itself, in the words for a bundle."""
    whole = said.whole_preprocess
    if said.labels:
        yield "labels", _labels(said.labels)
    if said.scores:
        yield "scores", said.scores
    if whole is not None:
        yield from summary.preprocess_rows(whole)
    else:
        for name, value in said.preprocess.items():
            yield name, ", ".join(f"{v:g}" for v in value) if isinstance(value, tuple) else value
    for text in said.notes:
        yield "note", text


def _onnx(path: Path, as_json: bool) -> None:
    from vitdeploy.bundle.onnx_graph import prove_precision, read_graph, summarise
    from vitdeploy.bundle.onnx_metadata import read_properties

    model = read_graph(path)
    graph = summarise(model)
    said = read_properties(graph.metadata)
    ops = prove_precision(model, "fp32", ()).ops  # for the list of dtypes; nothing is declared, so no verdict
    if as_json:
        output.json_document(
            {
                "ok": True,
                "file": str(path),
                **_graph_dict(graph),
                "said": said.as_dict(),
                "precision": summary.count_ops(ops),
            }
        )
        return
    rows = [
        ("file", f"{path} ({output.size(path.stat().st_size)})"),
        ("producer", graph.producer or "-"),
        ("opset", f"{graph.opset}, IR version {graph.ir_version}"),
        ("parameters", f"{graph.parameters / 1e6:.1f} M"),
        *(("input", _value(name, spec)) for name, spec in graph.inputs.items()),
        *(("output", _value(name, spec)) for name, spec in graph.outputs.items()),
        ("precision", summary.proof_line(ops)),
        *_said(said),
        *((key, _cut(text)) for key, text in graph.metadata.items() if key not in said.keys),
    ]
    output.facts(rows)
    _operators("operators", graph)


def _engine(path: Path, as_json: bool) -> None:
    from vitdeploy.tensorrt.engine_file import HEADER_BYTES, check_files, check_size, read_header, read_record

    with path.open("rb") as file:
        header = read_header(file.read(HEADER_BYTES), str(path))
    size = path.stat().st_size
    check_size(header, size, str(path))
    beside = path.with_suffix(".json")
    record = read_record(beside) if beside.is_file() else None
    if record is not None:
        check_files(path, record)
    facts: dict[str, Any] = {
        "file": str(path),
        "size": size,
        "flavour": header.flavour.name,
        "version": header.version_text,
        "targets": list(header.targets or (record.targets if record else ())),
    }
    if as_json:
        beside_it = record.model_dump(mode="json") if record else None
        output.json_document({"ok": True, **facts, "record": beside_it})
        return
    output.facts(
        [
            ("file", f"{path} ({output.size(size)})"),
            ("built by", f"{header.flavour.title} {header.version_text}"),
            ("runs on", ", ".join(facts["targets"]) or "the kind of GPU it was built on"),
        ]
    )
    if record is None:
        output.line(f"no record beside it: {beside.name}")
        return
    output.facts(
        [
            ("profiles", "; ".join(f"batch {b.min} to {b.max}, best at {b.opt}" for b in record.profiles)),
            ("from", f"{record.source}, in {record.build_seconds:.1f} s on {record.gpu or 'a CPU'}"),
            ("weights", record.settings.weights),
            ("precision", summary.proof_line(record.proof.ops)),
            *(("fusion", line) for line in record.fusion.lines()),
        ]
    )


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _value(name: str, spec: tuple[str, tuple[int | str, ...]]) -> str:
    dtype, shape = spec
    return f"{name} {dtype} ({', '.join(map(str, shape))})"


def _graph_dict(graph: GraphSummary) -> dict[str, Any]:
    def values(specs: dict[str, tuple[str, tuple[int | str, ...]]]) -> list[dict[str, Any]]:
        return [
            {"name": name, "dtype": dtype, "shape": list(shape)} for name, (dtype, shape) in specs.items()
        ]

    return {
        "opset": graph.opset,
        "ir_version": graph.ir_version,
        "producer": graph.producer,
        "nodes": graph.nodes,
        "operators": graph.operators,
        "parameters": graph.parameters,
        "inputs": values(graph.inputs),
        "outputs": values(graph.outputs),
        "metadata": graph.metadata,
    }


def _operators(title: str, graph: GraphSummary) -> None:
    output.heading(f"{title}: {graph.nodes} nodes, opset {graph.opset}")
    output.line("  " + ", ".join(f"{count} {name}" for name, count in graph.operators.items()))
