"""Our fused Triton kernels over the bundle's weights, on an NVIDIA GPU with one CUDA graph per batch bucket.

No exported graph is read; an artifact only says which precision and which batch sizes. With
``TRITON_INTERPRET=1`` the same kernels run on the CPU, slowly: enough to verify a small model anywhere.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self, cast

from vitdeploy.backends.base import (
    Array,
    Availability,
    Backend,
    Options,
    Session,
    SessionFacts,
    Traits,
    one_line,
    refuse,
    require_support,
)
from vitdeploy.backends.torch import DeviceTimer, cuda_device, import_torch, load_reference
from vitdeploy.bundle.dtypes import PRECISION_DTYPES, ArtifactPrecision
from vitdeploy.bundle.folder import WEIGHTS, Bundle
from vitdeploy.bundle.manifest import AOT, Artifact, Manifest, input_spec, output_spec
from vitdeploy.config import BatchRange, Precision
from vitdeploy.errors import BundleError, DeviceUnavailable
from vitdeploy.machine.gpus import find_gpus

if TYPE_CHECKING:
    from vitdeploy.model.vit import ViT
    from vitdeploy_kernels.config import Table
    from vitdeploy_kernels.launch import Launch
    from vitdeploy_kernels.package import Package
    from vitdeploy_kernels.staging import HostRunner

PRECISIONS: tuple[Precision, ...] = ("fp16", "bf16")
"""What the kernels compute in."""
_OLDEST_FP8 = (8, 9)
"""Compute capability of products of 8-bit floats; ``vitdeploy_kernels.fp8.OLDEST`` is the same."""
TABLE = "table.json"
"""Beside the kernels of each architecture: the configurations they were compiled with."""
TUNED = "kernels/tuned"
"""Where a bundle keeps the configurations that `vitdeploy tune` has found, a table for each GPU."""
_OLDEST = (8, 0)
"""Compute capability; ``vitdeploy_kernels.support.OLDEST`` is the same, and importing it needs torch."""


class Triton(Backend):
    """The backend. Threads may share a session: while one's batch is computed, another's is copied."""

    traits = Traits(
        name="triton",
        summary="fused Triton kernels with CUDA graphs, from the weights",
        libraries=("torch", "triton"),
        extras=("kernels",),
        formats=(AOT,),
        precisions=(*PRECISIONS, "fp8"),
        devices=("cuda",),
    )

    def availability(self) -> Availability:
        libraries = super().availability()
        if not libraries.ok or _interpreted():
            return libraries
        capabilities = [gpu.capability for gpu in find_gpus()]
        if not capabilities:
            hint = "TRITON_INTERPRET=1 runs the kernels on the CPU, slowly, to check small models"
            return Availability(False, "no NVIDIA GPU answers", hint)
        if max(capabilities) < _OLDEST:
            newest, needed = (".".join(map(str, pair)) for pair in (max(capabilities), _OLDEST))
            return Availability(False, f"the kernels need compute capability {needed}, this GPU has {newest}")
        return Availability(True)

    def supports(self, manifest: Manifest, artifact: Artifact | None) -> str | None:
        if manifest.model is None:
            return "it builds a ViT from its configuration, and this bundle holds a module of the user's own"
        if WEIGHTS not in manifest.files:
            return f"the bundle has no {WEIGHTS}"
        if len(manifest.outputs) > 1:
            return f"it computes one output, and this bundle has {len(manifest.outputs)}: {manifest.gives}"
        if beyond := manifest.model.beyond_kernels(manifest.output):
            return f"it has no kernels for {', '.join(beyond)}"
        if artifact is not None and artifact.format == AOT and _interpreted():
            return "its kernels are a GPU's, and the interpreter runs none of them"
        if artifact is not None and artifact.precision == "mixed":
            return f"it runs one precision throughout, and {artifact.name} has fp32 islands"
        if artifact is not None and artifact.precision not in self.traits.precisions:
            return f"it computes in fp16, bf16 or fp8, and {artifact.name} is {artifact.precision}"
        if artifact is not None and artifact.precision == "fp8" and manifest.model.kind != "vit":
            return f"it has no fp8 kernels for {manifest.model.kind}"
        return None

    def load(self, bundle: Bundle, artifact: Artifact | None, options: Options) -> Session:
        refuse(self.name, options)
        torch = import_torch(self.traits)
        if importlib.util.find_spec("triton") is None:
            raise self.traits.missing("triton")
        require_support(self, bundle, artifact)
        bundle = bundle.of(artifact)
        device = self._device(torch, options.device)
        _check_fp8(torch, artifact, device)
        bundle.verify_hashes(bundle.weights)
        precision: ArtifactPrecision = artifact.precision if artifact else "fp16"
        batch = artifact.batch if artifact else BatchRange()
        kernels = _Kernels.of(bundle, artifact, device)
        runner = _runner(torch, bundle, artifact, batch, device, kernels)
        manifest = bundle.manifest
        assert manifest.model is not None
        facts = SessionFacts(
            backend=self.name,
            artifact=artifact.name if artifact else WEIGHTS,
            precision=precision,
            executes=_executes(artifact, device),
            device=device,
            provider="interpreter" if device == "cpu" else "cuda",
            batch=batch,
            inputs=artifact.inputs if artifact else (input_spec(manifest.model, manifest.input),),
            outputs=artifact.outputs if artifact else (output_spec(manifest.model, manifest.output),),
            versions={name: str(importlib.import_module(name).__version__) for name in ("torch", "triton")},
            uses_files=kernels.packaged,
            fusion=(*runner.report, kernels.report),
        )
        return TritonSession(facts, runner)

    def _device(self, torch: Any, device: str | None) -> str:
        """The GPU, or the CPU where the interpreter was asked for."""
        if _interpreted():
            return "cpu"
        state = self.availability()
        if not state.ok:
            message = f"the {self.name} backend does not run here: {state.reason}"
            raise DeviceUnavailable(message, hint=state.hint)
        if device == "cpu":
            raise DeviceUnavailable(
                f"the {self.name} backend needs a GPU", hint="TRITON_INTERPRET=1 runs the kernels on the CPU"
            )
        return cuda_device(torch, device or "cuda")


class TritonSession(Session):
    """A model in memory, with its graphs captured."""

    def __init__(self, facts: SessionFacts, runner: HostRunner) -> None:
        super().__init__(facts)
        self._runner: HostRunner | None = runner

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        import torch

        assert self._runner is not None
        try:
            with DeviceTimer(self.facts.device, self.timed) as timer:
                results = self._runner(torch.from_numpy(inputs[self.facts.inputs[0].name]))
            self.device_seconds = timer.seconds()
        except RuntimeError as error:
            raise BundleError(f"{self.facts.artifact}: the kernels failed: {one_line(error)}") from error
        return {self.facts.outputs[0].name: results.numpy()}

    def _close(self) -> None:
        self._runner = None


def _rest(artifact: Artifact | None) -> Precision:
    """What the kernels compute in, fp8 products aside."""
    if artifact is None:
        return "fp16"
    said = artifact.precision if artifact.quantisation is None else artifact.quantisation.rest
    return next((kind for kind in PRECISIONS if kind == said), "fp16")


def _executes(artifact: Artifact | None, device: str) -> str:
    """The precisions of a session; the CPU multiplies 8-bit floats as float32."""
    rest = _rest(artifact)
    if artifact is None or artifact.quantisation is None:
        return rest
    return f"{artifact.precision}, the rest in {rest}" if device != "cpu" else rest


def _check_fp8(torch: Any, artifact: Artifact | None, device: str) -> None:
    if artifact is None or artifact.precision != "fp8" or device == "cpu":
        return
    found = torch.cuda.get_device_capability(device)
    if found < _OLDEST_FP8:
        have, needed = (".".join(map(str, pair)) for pair in (found, _OLDEST_FP8))
        raise DeviceUnavailable(f"fp8 needs compute capability {needed}, and {device} has {have}")


def _interpreted() -> bool:
    """What Triton itself looks at; importing it to ask costs a second."""
    return os.environ.get("TRITON_INTERPRET", "").strip().lower() in ("1", "true", "yes", "on", "y")


class _Kernels:
    """Where the binaries come from: the bundle, if it has some for this GPU, or Triton's compiler."""

    def __init__(self, package: Package | None, table: Table | None, origin: str) -> None:
        self.package, self.table, self._origin = package, table, origin
        self._compiled: set[str] = set()

    @classmethod
    def of(cls, bundle: Bundle, artifact: Artifact | None, device: str) -> Self:
        """The kernels of an artifact that holds some, on a GPU; else those that are compiled.

        Raises:
            BundleError: its files are damaged.
        """
        if device == "cpu":
            return cls(None, None, "run by Triton's interpreter on the CPU")
        try:
            if artifact is not None and artifact.format == AOT:
                return cls._packaged(bundle, artifact, device)
            return cls._tuned(bundle, device)
        except (ValueError, OSError) as error:
            raise BundleError(f"{bundle.root}: {one_line(error)}") from error

    @classmethod
    def _tuned(cls, bundle: Bundle, device: str) -> Self:
        import torch

        from vitdeploy_kernels.config import load_table, table_name

        name = f"{TUNED}/{table_name(torch.cuda.get_device_name(device))}"
        if name not in bundle.manifest.files:
            return cls(None, None, "compiled at the start")
        bundle.verify_hashes([name])
        return cls(None, load_table(bundle.path(name)), "compiled at the start, as tuned for this GPU")

    @classmethod
    def _packaged(cls, bundle: Bundle, artifact: Artifact, device: str) -> Self:
        import torch

        from vitdeploy_kernels.config import load_table
        from vitdeploy_kernels.package import load_package
        from vitdeploy_kernels.support import Unsupported

        bundle.verify_hashes(artifact.files)
        folder = bundle.path(artifact.path).parent.parent
        package = load_package(folder, torch.cuda.get_device_capability(device))
        if isinstance(package, Unsupported):
            return cls(None, None, f"compiled at the start: {package.reason}")
        table = load_table(folder / package.arch / TABLE)
        return cls(package, table, f"compiled ahead of time for {package.arch}")

    def execute(self, launch: Launch) -> None:
        """Queue a launch."""
        if self.package is None or not self.package.run(launch):
            self._compiled.add(launch.name)
            launch.run()

    @property
    def packaged(self) -> bool:
        """Whether every launch so far was of a kernel that lies in the bundle."""
        return self.package is not None and not self._compiled

    @property
    def report(self) -> str:
        """One line for the fusion report."""
        missing = f", but not {', '.join(sorted(self._compiled))}" if self.package and self._compiled else ""
        return f"kernels: {self._origin}{missing}"


def _runner(
    torch: Any,
    bundle: Bundle,
    artifact: Artifact | None,
    batch: BatchRange,
    device: str,
    kernels: _Kernels,
) -> HostRunner:
    """The folded model and its plans.

    Raises:
        DeviceUnavailable: this GPU among several is too old.
        BundleError: the kernels fail, the memory does not suffice, or the artifact is damaged.
        UsageError: the artifact has an fp8 product that the kernels have no route for.
    """
    from vitdeploy.model.fused import buckets_of
    from vitdeploy.model.registry import architecture_of
    from vitdeploy_kernels.runner import VitRunner
    from vitdeploy_kernels.staging import HostRunner
    from vitdeploy_kernels.support import UnsupportedError

    manifest, reference = bundle.manifest, load_reference(bundle)
    model = architecture_of(reference.config).fuse(
        reference,
        getattr(torch, PRECISION_DTYPES[_rest(artifact)]),
        output=manifest.output,
        input_kind=manifest.input,
        preprocess=manifest.preprocess,
        device=device,
    )
    if artifact is not None and artifact.precision == "fp8":
        from vitdeploy.bundle.fp8_gemms import read_fp8_gemms
        from vitdeploy.model.fused_fp8 import with_fp8

        if artifact.quantisation is None:
            raise BundleError(f"{artifact.name} is fp8, and nothing says which of its products are")
        bundle.verify_hashes(artifact.files)
        gemms = read_fp8_gemms(bundle.path(artifact.path), artifact.quantisation.sites)
        model = with_fp8(model, cast("ViT", reference), gemms, device)
    try:
        runner = VitRunner(
            model.shape,
            model.weights,
            batches=buckets_of(batch),
            table=kernels.table,
            readout=model.readout,
            execute=kernels.execute,
        )
    except UnsupportedError as error:
        raise DeviceUnavailable(f"the triton backend does not run on {device}: {error}") from error
    except RuntimeError as error:
        raise BundleError(f"{bundle.root}: the kernels failed: {one_line(error)}") from error
    return HostRunner(runner)
