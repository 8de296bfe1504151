"""PyTorch's AOTInductor: the model compiled into a library before the first run, and kept.

Compiling takes from half a minute to minutes, once for each model, precision, range of batch sizes and
machine. The compiled library never travels in a bundle: it is this machine's own, in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import json
import platform
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from vitdeploy._version import __version__
from vitdeploy.backends.base import Availability, numpy_dtype, one_line
from vitdeploy.backends.compiled_cache import load_or_compile
from vitdeploy.backends.torch import Forward, Torch, forward_of, load_reference, torch_dtype
from vitdeploy.backends.torch_compile import with_compiler
from vitdeploy.bundle.dtypes import ArtifactPrecision
from vitdeploy.bundle.folder import Bundle
from vitdeploy.bundle.manifest import input_spec
from vitdeploy.config import BatchRange
from vitdeploy.errors import BundleError
from vitdeploy.machine.identity import cpu_info

if TYPE_CHECKING:
    import torch
    from torch import Tensor

KIND = "aotinductor"
"""The folder in the user's cache."""


class AotInductor(Torch):
    """The backend. A session serves one thread at a time.

    PyTorch keeps Python's interpreter lock while the library runs, so that sessions in several threads of
    one process take turns. ``load`` compiles where the cache has nothing for this model on this machine.
    """

    traits = replace(
        Torch.traits,
        name="aotinductor",
        summary="PyTorch compiled ahead of time (AOTInductor), dynamic batch",
    )

    def availability(self) -> Availability:
        return with_compiler(super().availability(), "AOTInductor")

    def _forward(
        self, bundle: Bundle, precision: ArtifactPrecision, batch: BatchRange | None, device: str
    ) -> Forward:
        job = _Job(bundle, precision, batch, device)
        try:
            return load_or_compile(KIND, job.name, job.compile_to, job.load)
        except (OSError, RuntimeError) as error:
            raise BundleError(f"{bundle.root}: cannot be compiled: {one_line(error)}") from error


@dataclass(frozen=True)
class _Job:
    """What is to be compiled, and for what."""

    bundle: Bundle
    precision: ArtifactPrecision
    batch: BatchRange | None
    device: str

    @property
    def name(self) -> str:
        """A file name that changes with everything that the compiled library depends on."""
        text = json.dumps(self._identity(), sort_keys=True)
        return f"{self.precision}-{hashlib.sha256(text.encode()).hexdigest()[:40]}"

    def _identity(self) -> dict[str, Any]:
        import torch

        manifest = self.bundle.manifest
        described = manifest.model_dump(mode="json", include={"model", "input", "preprocess"})
        return {
            "weights": [manifest.files[name].sha256 for name in self.bundle.weights],
            "manifest": described,
            "outputs": manifest.outputs,
            "precision": self.precision,
            "batch": self.batch and (self.batch.min, self.batch.opt, self.batch.max),
            "options": self._options(),
            "machine": self._machine(),
            "versions": (__version__, str(torch.__version__), torch.version.git_version),
        }

    def _machine(self) -> tuple[str, ...]:
        """The processor with every instruction it has, as the compiler may use any; and the GPU."""
        import torch

        info = cpu_info()
        cpu = (platform.machine(), info.get("model name", ""), info.get("flags") or info.get("Features", ""))
        if self.device == "cpu":
            return cpu
        capability = torch.cuda.get_device_capability(self.device)
        return (*cpu, torch.cuda.get_device_name(self.device), str(capability), str(torch.version.cuda))

    def _options(self) -> dict[str, bool]:
        """For Inductor: the number of threads is not compiled in; on the CPU, the weights are packed."""
        return {"cpp.dynamic_threads": True} | ({"freezing": True} if self.device == "cpu" else {})

    def compile_to(self, path: Path) -> None:
        """Compile the model into a package.

        Raises:
            BundleError: its weights are damaged, or the compiler fails.
        """
        import torch
        import torch._inductor

        module, example = self._module(), self._example()
        symbolic = None
        if self.batch is None or not self.batch.fixed:
            low, high = (self.batch.min, self.batch.max) if self.batch else (1, None)
            symbolic = ({0: torch.export.Dim("N", min=low, max=high)},)
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PyTorch's, about itself
                program = torch.export.export(module, (example,), dynamic_shapes=symbolic)
                torch._inductor.aoti_compile_and_package(
                    program, package_path=str(path), inductor_configs=self._options()
                )
        except Exception as error:  # tracer, compiler and linker raise what they like
            raise BundleError(f"{self.bundle.root}: AOTInductor failed: {one_line(error)}") from error

    def _module(self) -> torch.nn.Module:
        """What sessions compute, as the exporter takes it."""
        import torch

        model = load_reference(self.bundle, torch_dtype(self.precision), self.device, fused_attention=True)
        forward_ = forward_of(model, self.bundle.manifest)

        class Session(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, pixels: Tensor) -> Sequence[Tensor]:
                return forward_(pixels)

        return Session().eval()

    def _example(self) -> Tensor:
        """Of the batch size that the compiler tunes for; one would be taken for a constant."""
        import torch

        manifest = self.bundle.manifest
        assert manifest.model is not None
        spec = input_spec(manifest.model, manifest.input)
        rows = self.batch.opt if self.batch else 8
        if self.batch is None or not self.batch.fixed:
            rows = max(rows, 2)
        shape = cast(tuple[int, ...], spec.shape[1:])
        dtype = getattr(torch, str(numpy_dtype(spec.dtype)))
        return torch.zeros((rows, *shape), dtype=dtype, device=self.device)

    def load(self, path: Path) -> Forward:
        """Open a package; it is unpacked elsewhere, so the file may go.

        Raises:
            RuntimeError: it is none, or of another PyTorch.
        """
        import torch._inductor

        _, _, index = self.device.partition(":")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch._inductor.aoti_load_package(str(path), device_index=int(index or -1))
        return cast(Forward, loaded)
