"""PyTorch: the model with fused attention, from the bundle's weights; no exported artifact is read.

An artifact only says which precision to run in, and which batch sizes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, cast

from vitdeploy.backends.base import (
    Array,
    Backend,
    Options,
    Session,
    SessionFacts,
    Traits,
    one_line,
    refuse,
    require_support,
    split_device,
)
from vitdeploy.bundle.dtypes import PRECISION_DTYPES, ArtifactPrecision
from vitdeploy.bundle.folder import WEIGHTS, Bundle
from vitdeploy.bundle.manifest import Artifact, Manifest, input_spec, output_specs
from vitdeploy.config import BatchRange
from vitdeploy.errors import BundleError, DeviceUnavailable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vitdeploy.model.reference import Reference

Forward = Callable[["Tensor"], Sequence["Tensor"]]
"""What artifacts read to all outputs, float32."""


class Torch(Backend):
    """The backend, in eager mode. A session serves one thread at a time."""

    traits = Traits(
        name="torch",
        summary="PyTorch, eager, with fused attention, on the CPU or CUDA",
        libraries=("torch",),
        extras=("export",),
        precisions=tuple(PRECISION_DTYPES),
        devices=("cpu", "cuda"),
    )

    def supports(self, manifest: Manifest, artifact: Artifact | None) -> str | None:
        if manifest.model is None:
            return "it builds a ViT from its configuration, and this bundle holds a module of the user's own"
        if WEIGHTS not in manifest.files:
            return f"the bundle has no {WEIGHTS}"
        if artifact is not None and artifact.format == "triton-aot":
            return f"{artifact.name} holds kernels for the triton backend"
        if artifact is not None and artifact.precision not in self.traits.precisions:
            what = "has fp32 islands" if artifact.precision == "mixed" else f"is {artifact.precision}"
            return f"it runs one precision throughout, and {artifact.name} {what}"
        return None

    def load(self, bundle: Bundle, artifact: Artifact | None, options: Options) -> Session:
        refuse(self.name, options)
        torch = import_torch(self.traits)
        require_support(self, bundle, artifact)
        bundle = bundle.of(artifact)
        device = cuda_device(torch, options.device or "cpu")
        bundle.verify_hashes(bundle.weights)
        precision: ArtifactPrecision = artifact.precision if artifact else "fp32"
        manifest = bundle.manifest
        assert manifest.model is not None
        batch = artifact.batch if artifact else None
        facts = SessionFacts(
            backend=self.name,
            artifact=artifact.name if artifact else WEIGHTS,
            precision=precision,
            executes=precision,
            device=device,
            provider=device.partition(":")[0],
            batch=batch,
            inputs=artifact.inputs if artifact else (input_spec(manifest.model, manifest.input),),
            outputs=artifact.outputs if artifact else output_specs(manifest.model, manifest.outputs),
            versions={"torch": str(torch.__version__)},
        )
        return TorchSession(facts, self._forward(bundle, precision, batch, device), options.session_threads)

    def _forward(
        self, bundle: Bundle, precision: ArtifactPrecision, batch: BatchRange | None, device: str
    ) -> Forward:
        """The function of a session."""
        model = load_reference(bundle, torch_dtype(precision), device, fused_attention=True)
        return forward_of(model, bundle.manifest)


def reference_session(bundle: Bundle) -> Session:
    """The reference model in float64 on the CPU: what every artifact is held against.

    Raises:
        MissingDependency: PyTorch is not installed.
        UsageError: the bundle has no weights of a model that is known here.
        BundleError: they are damaged.
    """
    torch = import_torch(Torch.traits)
    require_support(Torch(), bundle, None)
    bundle = bundle.of(None)
    bundle.verify_hashes(bundle.weights)
    model, manifest = load_reference(bundle, torch.float64), bundle.manifest
    facts = SessionFacts(
        backend=Torch.traits.name,
        artifact=WEIGHTS,
        precision="fp32",
        executes="fp64",
        device="cpu",
        provider="cpu",
        batch=None,
        inputs=(input_spec(model.config, manifest.input),),
        outputs=output_specs(model.config, manifest.outputs),
        versions={"torch": str(torch.__version__)},
    )
    return TorchSession(facts, forward_of(model, manifest), None)


class TorchSession(Session):
    """A model in memory."""

    def __init__(self, facts: SessionFacts, forward: Forward, threads: int | None) -> None:
        super().__init__(facts)
        self._forward: Forward | None = forward
        self._threads = threads

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        import torch

        assert self._forward is not None
        device, pixels = self.facts.device, torch.from_numpy(inputs[self.facts.inputs[0].name])
        timer = DeviceTimer(device, self.timed)
        try:
            with torch.no_grad(), _threads(self._threads), _no_tf32(device), timer:
                outputs = self._forward(pixels.to(device))
            results = [output.cpu().numpy() for output in outputs]
            self.device_seconds = timer.seconds()
        except RuntimeError as error:
            raise BundleError(f"{self.facts.artifact}: PyTorch failed: {one_line(error)}") from error
        return {spec.name: result for spec, result in zip(self.facts.outputs, results, strict=True)}

    def _close(self) -> None:
        self._forward = None


class DeviceTimer:
    """Context manager: seconds of what is queued inside, between two events on the GPU's current stream.

    Measures nothing on the CPU, or where ``timed`` is false.
    """

    def __init__(self, device: str, timed: bool) -> None:
        self._device = device if timed and device != "cpu" else None
        self._events: list[torch.cuda.Event] = []

    def __enter__(self) -> Self:
        self._record()
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self._record()

    def _record(self) -> None:
        import torch

        if self._device is not None:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._events.append(event)

    def seconds(self) -> float | None:
        """Between the events, once the GPU has reached the second."""
        if not self._events:
            return None
        start, end = self._events
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000


def import_torch(traits: Traits) -> Any:
    """PyTorch, for the backend with these traits.

    Raises:
        MissingDependency: it is not installed; names the extra.
    """
    try:
        import torch
    except ImportError as error:
        raise traits.missing("torch") from error
    return torch


def cuda_device(torch: Any, device: str) -> str:
    """The device as PyTorch names it: ``cpu`` or ``cuda:N``.

    Raises:
        DeviceUnavailable: there is no such GPU.
    """
    kind, index = split_device(device)
    if kind == "cpu":
        return "cpu"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= count:
        raise DeviceUnavailable(f"PyTorch {torch.__version__} finds {count} CUDA devices, not {device}")
    return f"cuda:{index}"


def torch_dtype(precision: ArtifactPrecision) -> torch.dtype:
    """What the model computes in throughout."""
    import torch

    dtype: torch.dtype = getattr(torch, PRECISION_DTYPES[precision])
    return dtype


def load_reference(
    bundle: Bundle,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    *,
    fused_attention: bool = False,
) -> Reference:
    """The model with the bundle's weights, as they are or rounded once; the reference itself by default.

    Raises:
        BundleError: they are not the weights of this model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from vitdeploy.model.registry import build_reference

    config, path = bundle.manifest.model, bundle.path(WEIGHTS)
    assert config is not None
    try:
        stored = {
            name: tensor for file in bundle.weights for name, tensor in load_file(bundle.path(file)).items()
        }
        state = {name: tensor.to(device, dtype) for name, tensor in stored.items()}
        return build_reference(config, state, fused_attention=fused_attention)
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise BundleError(f"{path}: not the weights of this model: {one_line(error)}") from error


def forward_of(model: Reference, manifest: Manifest) -> Forward:
    """The model as a function of what artifacts read; uint8 images are normalised in float32."""
    import torch

    from vitdeploy.model.reference import outputs_of

    weight, names = next(model.parameters()), manifest.outputs

    def forward(pixels: Tensor) -> tuple[Tensor, ...]:
        outputs = outputs_of(model, pixels.to(weight.dtype), names)
        return tuple(outputs[name].to(torch.float32) for name in names)

    if manifest.input != "uint8" or manifest.preprocess is None:
        return forward
    spec = manifest.preprocess
    mean, std = (torch.tensor(v, dtype=torch.float32, device=weight.device) for v in (spec.mean, spec.std))

    def forward_uint8(images: Tensor) -> tuple[Tensor, ...]:
        pixels = (images * spec.rescale - mean) / std  # (N, H, W, 3) float32
        return forward(pixels.permute(0, 3, 1, 2))

    return forward_uint8


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """PyTorch's thread count is the whole process's: set it for one run only."""
    import torch

    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count is not None:
            torch.set_num_threads(before)


def _no_tf32(device: str) -> contextlib.AbstractContextManager[None]:
    """cuDNN's convolutions use TF32 unless told not to, and an fp32 model in it is not one."""
    import torch

    if device == "cpu":
        return contextlib.nullcontext()
    flags = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    return cast(contextlib.AbstractContextManager[None], flags)
