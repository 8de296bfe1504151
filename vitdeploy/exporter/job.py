"""The artifacts of one image size: built, held against the reference, and replaced where they are wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file

from vitdeploy.bundle import golden
from vitdeploy.bundle.dtypes import ArtifactPrecision
from vitdeploy.bundle.folder import GOLDEN, WEIGHTS, BundleWriter
from vitdeploy.bundle.manifest import AOT, Artifact
from vitdeploy.bundle.proofs import ParityRecord, Tolerance
from vitdeploy.bundle.sizes import named, sized
from vitdeploy.config import Precision, Size, size_name
from vitdeploy.errors import ParityError, PrecisionError, UsageError
from vitdeploy.exporter import triton_aot
from vitdeploy.exporter.artifact_parity import first_failure, gemms_failure, onnx_parity, worst
from vitdeploy.exporter.fallback import Proposal, smallest_islands
from vitdeploy.exporter.onnx import FILES, INPUT, write_onnx
from vitdeploy.exporter.quantised import QuantisedForm, onnx_answers, shortage
from vitdeploy.exporter.request import ExportRequest
from vitdeploy.exporter.subject import Subject
from vitdeploy.images.preprocess import pixel_values
from vitdeploy.machine.memory import give_back
from vitdeploy.model.precision import PrecisionPlan
from vitdeploy.progress import Progress
from vitdeploy.verification import parity
from vitdeploy.verification.accuracy import TopClasses, judge_drop, judge_quantised, score

if TYPE_CHECKING:
    from vitdeploy.exporter.assembly import Assembly

_MODE = 0o644
"""safetensors gives files to their owner alone, but a server that runs as somebody else reads them too."""
_GEMM_IMAGES = 2
"""Images whose activations are held in memory, all at once."""
EMULATION = "emulation"
"""The name of the rehearsal among the backends of parity records."""
Golden = dict[str, np.ndarray[Any, Any]]


def golden_arrays(subject: Subject, names: Sequence[str] | None = None) -> Golden:
    """Golden inputs with float64 outputs, and raw images with their preprocessed form where images go in.

    Args:
        names: of golden images, all when omitted.
    """
    inputs = subject.golden_inputs(names)
    arrays: Golden = {INPUT: inputs.numpy()}
    for output, reference in subject.reference(inputs).items():
        # Two outputs may be one tensor, and no file of tensors holds one memory twice.
        arrays[golden.reference_key(subject.outputs, output)] = reference.numpy().copy()
    for i, raw in enumerate(golden.raw_images() if subject.takes_images else ()):
        arrays[f"image.{i}"] = raw
        arrays[f"image.{i}.{INPUT}"] = _preprocessed(raw, subject)
    return arrays


def _preprocessed(raw: np.ndarray[Any, Any], subject: Subject) -> np.ndarray[Any, Any]:
    from PIL import Image

    image = Image.fromarray(raw)
    return pixel_values(image, subject.preprocess, subject.input)


@dataclass
class Job:
    """The artifacts of one image size, as they are built and held against its reference."""

    assembly: Assembly
    subject: Subject
    place: Size | None
    """The size as artifacts name it; None is the first."""
    golden: Golden = field(default_factory=dict)
    exact: TopClasses | None = None
    """What fp32 says of the labelled images."""

    @property
    def request(self) -> ExportRequest:
        return self.assembly.request

    @property
    def progress(self) -> Progress:
        return self.assembly.progress

    @property
    def writer(self) -> BundleWriter:
        return self.assembly.writer

    @property
    def batches(self) -> Sequence[int] | None:
        """Batch sizes at which artifacts are proven; all where None.

        Large ones are the bulk of an export. A further size has the weights and the operations of the first:
        there images are run alone and in company, and the rest is left to `vitdeploy verify`.
        """
        batch = self.request.batch
        company = min(max(batch.min, 2), batch.max)
        return None if self.place is None else tuple(dict.fromkeys((batch.min, company)))

    def titled(self, stage: str) -> str:
        return stage if self.place is None else f"{stage} {size_name(self.place)}"

    def write_tensors(self) -> int:
        """Write the weights (of a further size, those that differ) and golden tensors; return the bytes."""
        state, size = self.subject.state, 0
        weights = state if self.place is None else {name: state[name] for name in self.subject.own}
        if weights or self.place is None:
            tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
            size += _save(tensors, self.writer.file(sized(WEIGHTS, self.place)))
        return size + save_arrays(self.golden, self.writer.file(sized(GOLDEN, self.place)))

    def reload(self) -> None:
        """Let go of the memory that the weights take, or that was mapped to read them."""
        names = dict.fromkeys((WEIGHTS, sized(WEIGHTS, self.place)))
        paths = [self.writer.directory / name for name in names]
        self.subject.reload([path for path in paths if path.exists()])
        give_back()

    def build(self, precision: Precision) -> None:
        """The ONNX artifact of a precision, unless another one fell back to it."""
        if not self.assembly.has(named(f"onnx-{precision}", self.place)):
            self._build_one(precision)

    def _build_one(self, precision: Precision) -> None:
        plan = PrecisionPlan.of(precision)
        rehearsed, trouble = self._try_out(plan)
        if trouble is None:
            artifact, records = self._attempt(plan, precision)
            trouble = first_failure(records)
            if trouble is None:
                return self.assembly.accept([artifact], [*rehearsed, *records])
            self.assembly.drop(artifact)
        failure = f"{precision} does not compute what the checkpoint computes: {trouble}"
        if precision == "fp32" or not self.request.fallback:
            raise ParityError(
                failure, hint=None if precision == "fp32" else "--bf16 and --fp32 have more range"
            )
        self.progress.note(failure)
        return self._fall_back(plan, precision, trouble)

    def build_quantised(self, forms: Sequence[QuantisedForm], golden: Golden) -> list[Artifact]:
        """The ONNX artifacts of a quantised model, up to the first that costs too much.

        Args:
            forms: of one model, each around another rest.
            golden: what they are held against.

        Raises:
            ParityError: it does, and no fallback is wanted.
        """
        built: list[Artifact] = []
        trouble = shortage(forms[0].model)
        for form in forms if trouble is None else ():
            try:
                artifact, records = self._attempt(
                    PrecisionPlan.of(form.rest), form.kind, quantised=(form, golden)
                )
            except PrecisionError as error:
                trouble = error.message
                break
            trouble = first_failure(records) or self._gemms(artifact, form, golden) or self._drop(artifact)
            if trouble is not None:
                self.assembly.drop(artifact)
                break
            self.assembly.accept([artifact], records)
            built.append(artifact)
        if trouble is not None:
            failed = forms[len(built)]
            if self.assembly.failures is not None and not built:
                self.assembly.failures[failed.kind] = f"it would cost too much of the answers: {trouble}"
                return built
            failure = f"no {FILES[failed.name]}: {failed.kind} would cost too much of the answers: {trouble}"
            if not self.request.fallback:
                hint = "leave out --no-fallback, and the others are written"
                raise ParityError(failure, hint=hint)
            others = ", ".join(artifact.path for artifact in self.assembly.artifacts)
            self.assembly.give_up(f"{failure}; {others} instead")
        return built

    def _gemms(self, artifact: Artifact, form: QuantisedForm, golden: Golden) -> str | None:
        """Every quantised GEMM computed again from what it reads; what is wrong with one.

        Processors compute a rest of fp16 in roundings of their own, which would hide what is looked for.
        """
        if form.rest != "fp32":
            return None
        with self.progress.stage(f"GEMMs {form.name}") as stage:
            bundle = self.writer.seal(self.assembly.manifest([artifact]))
            scales = {name: site.input_scale for name, site in form.model.sites.items()}
            weights = {name: weight.numpy() for name, weight in form.model.floats.items()}
            trouble = gemms_failure(bundle, artifact, golden[INPUT][:_GEMM_IMAGES], scales, weights)
            stage.detail = trouble or f"{len(scales)} products, each as its own integers say"
        return trouble

    def _drop(self, artifact: Artifact) -> str | None:
        """What is wrong with the classes of labelled images."""
        images, exact = self.assembly.labelled, self.exact
        if images is None or exact is None:
            return None
        with self.progress.stage(f"accuracy {artifact.name.removeprefix('onnx-')}") as stage:
            bundle = self.writer.seal(self.assembly.manifest([artifact]))
            answers = onnx_answers(bundle, bundle.artifact(artifact.name), images)
            record = score(artifact.name, "onnxruntime", answers, exact, images.labels)
            limit = self.request.max_drop
            held, stage.detail = judge_quantised(record) if limit is None else judge_drop(record, limit)
        return None if held else stage.detail

    def build_kernels(self, precision: Precision) -> None:
        """The fused kernels; what they compute is rehearsed here, and measured where the GPU is."""
        config, name = self.subject.config, named(f"{AOT}-{precision}", self.place)
        source = named(f"onnx-{precision}", self.place)
        if config is None:
            raise UsageError("the kernels are for ViTs that vitdeploy knows, not for modules of your own")
        output = self.subject.outputs[0]
        if beyond := config.beyond_kernels(output):
            raise UsageError(f"there are no fused kernels for {', '.join(beyond)}")
        onnx = [r for r in self.assembly.parity if r.backend == EMULATION and r.artifact == source]
        rehearsed, trouble = (
            (onnx, first_failure(onnx)) if onnx else self._try_out(PrecisionPlan.of(precision))
        )
        records = [record.model_copy(update={"artifact": name}) for record in rehearsed]
        if trouble:
            failure = f"{precision} does not compute what the checkpoint computes: {trouble}"
            if not self.request.fallback or not self.assembly.artifacts:
                raise ParityError(failure, hint="--bf16 has more range")
            return self.progress.note(f"no {name}, kernels have no fp32 islands: {failure}")
        artifact = triton_aot.write_kernels(
            config,
            precision,
            self.writer,
            batch=self.request.batch,
            architectures=self.request.kernel_architectures,
            output=output,
            input_kind=self.subject.input,
            progress=self.progress,
            place=self.place,
        )
        self.progress.note(f"{name}: no cubin has run yet; on such a GPU: vitdeploy verify --backend triton")
        return self.assembly.accept([artifact], records)

    def _fall_back(self, plan: PrecisionPlan, precision: Precision, trouble: str) -> None:
        """The smallest set of islands that passes; where there is none, bf16."""
        attempts = [
            (PrecisionPlan.of("bf16"), f"{precision} failed ({trouble}) and no few fp32 islands help")
        ]
        if proposal := self._search(plan):
            reason = f"{precision} failed ({trouble}); {proposal.reason}"
            attempts.insert(0, (plan.with_islands(proposal.islands), reason))
        for wider, reason in attempts:
            name = named("onnx-mixed" if wider.islands else "onnx-bf16", self.place)
            if wider == plan or self.assembly.has(name):
                continue
            rehearsed = self._rehearse(wider)
            artifact, records = self._attempt(wider, precision, reason)
            if first_failure([*rehearsed, *records]) is None:
                self.progress.note(f"{artifact.path} instead: {reason}")
                return self.assembly.accept([artifact], [*rehearsed, *records])
            self.assembly.drop(artifact)
        raise ParityError(
            f"{precision} does not compute what the checkpoint computes: {trouble}", hint="--fp32"
        )

    def _try_out(self, plan: PrecisionPlan) -> tuple[list[ParityRecord], str | None]:
        """The rehearsal, and what is wrong with it; weights that do not fit are as wrong as results.

        Raises:
            PrecisionError: weights do not fit, and no fallback is wanted.
        """
        try:
            rehearsed = self._rehearse(plan)
        except PrecisionError as error:
            if not self.request.fallback:
                raise
            return [], error.message
        return rehearsed, first_failure(rehearsed)

    def _rehearse(self, plan: PrecisionPlan) -> list[ParityRecord]:
        """A reduced precision as hardware computes it, every result rounded.

        The CPU runtimes that check the artifact itself are free to compute in fp32 and drop roundings between
        operations, and with them an overflow that a GPU would meet.
        """
        if plan.default == torch.float32:
            return []
        precision = plan.name
        with self.progress.stage(self.titled(f"round as {precision}")) as stage:
            results = self.subject.rehearse(plan, torch.from_numpy(self.golden[INPUT]))
            give_back()
            outputs, tolerance = self.subject.outputs, self._tolerance(plan)
            records = []
            for output, result in zip(outputs, results, strict=True):
                reference = golden.reference_of(self.golden, output)
                metrics = parity.measure_parity(reference, result.numpy(), tolerance, output)
                failures = parity.tolerance_failures(metrics, tolerance)
                record = ParityRecord(
                    artifact=named(f"onnx-{precision}", self.place),
                    backend=EMULATION,
                    batch=len(result),
                    provider="PyTorch, every result rounded",
                    output=output if len(outputs) > 1 else None,
                    metrics=metrics,
                    tolerance=tolerance,
                    passed=not failures,
                    failures=failures,
                )
                records.append(record)
            stage.detail = worst(records)
        return records

    def _tolerance(self, plan: PrecisionPlan) -> Tolerance:
        """What the plan's precision may lose, with the user's own bound on top."""
        return parity.TOLERANCES[plan.name].model_copy(update={"max_abs": self.request.atol})

    def _search(self, plan: PrecisionPlan) -> Proposal | None:
        if not self.subject.searches_islands:
            return None
        with self.progress.stage(self.titled("bisect")) as stage:
            deployed = self.subject.deployed(PrecisionPlan.of("fp32"))
            outputs, tolerance = self.subject.outputs, self._tolerance(plan)

            def accepts(results: tuple[torch.Tensor, ...]) -> bool:
                return all(
                    parity.passes(golden.reference_of(self.golden, output), result.numpy(), tolerance, output)
                    for output, result in zip(outputs, results, strict=True)
                )

            proposal = smallest_islands(deployed, plan, torch.from_numpy(self.golden[INPUT]), accepts)
            stage.detail = proposal.reason if proposal else "no small set of islands passes"
        return proposal

    def _attempt(
        self,
        plan: PrecisionPlan,
        requested: ArtifactPrecision,
        fallback: str | None = None,
        quantised: tuple[QuantisedForm, Golden] | None = None,
    ) -> tuple[Artifact, list[ParityRecord]]:
        """Build one artifact and hold it against the reference on a runtime of this machine.

        Args:
            quantised: what is quantised in it, and what it is held against.
        """
        form, golden = quantised or (None, self.golden)
        kind = plan.name if form is None else form.name
        example = torch.from_numpy(self.golden[INPUT][:1])
        with self.progress.stage(self.titled(f"onnx {kind}")) as stage:
            artifact = write_onnx(
                self.subject,
                plan,
                self.writer,
                batch=self.request.batch,
                opset=self.request.opset,
                example=example,
                requested=requested,
                fallback=fallback,
                place=self.place,
                shared=None if form else self.assembly.shared_weights(plan.name, requested),
                quantised=form,
            )
            stage.size = sum((self.writer.directory / name).stat().st_size for name in artifact.files)
            stage.detail = f"{artifact.path}, {artifact.nodes} nodes"
        with self.progress.stage(self.titled(f"parity {kind}")) as stage:
            bundle = self.writer.seal(self.assembly.manifest([artifact]))
            self.reload()  # unmaps what the rewrites have read
            built = bundle.artifact(artifact.name)
            ran = () if form else self.assembly.largest_ran_on
            records = onnx_parity(bundle, built, golden, self.request.atol, self.batches, ran)
            give_back()
            stage.detail = worst(records)
        return artifact, records


def save_arrays(arrays: Mapping[str, np.ndarray[Any, Any]], path: Path) -> int:
    return _save({name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}, path)


def _save(tensors: dict[str, torch.Tensor], path: Path) -> int:
    """Write a file of tensors; return its bytes."""
    save_file(tensors, path)
    path.chmod(_MODE)
    return path.stat().st_size
