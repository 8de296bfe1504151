"""A stranger's TensorRT engine, where it runs: it says itself what goes in and out, and for which batches."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from vitdeploy.backends.base import Session, SessionFacts, get_backend
from vitdeploy.backends.tensorrt import EngineSession, deserialise
from vitdeploy.bundle.files import sha256
from vitdeploy.bundle.onnx_metadata import SelfDescription
from vitdeploy.config import BatchRange, Size
from vitdeploy.errors import DeviceUnavailable, UsageError
from vitdeploy.machine.gpus import find_gpus
from vitdeploy.tensorrt import cuda
from vitdeploy.tensorrt.builder import Log
from vitdeploy.tensorrt.caches import KernelCache
from vitdeploy.tensorrt.engine_file import HEADER_BYTES, check_size, foreign_to, read_header
from vitdeploy.tensorrt.flavours import import_tensorrt
from vitdeploy.tensorrt.session import Engine
from vitdeploy.verification.foreign.onnx_file import (
    Claim,
    Interface,
    Value,
    claim_of_name,
    folder_of,
    interface_of,
)
from vitdeploy.verification.foreign.session import Renamed, input_of, output_of, tolerated
from vitdeploy.verification.foreign.truth import Chosen

SUFFIXES = (".plan", ".engine")
_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "UINT8": "uint8", "INT8": "int8"}


class EngineFile:
    """An engine that is loaded."""

    said = SelfDescription()

    def __init__(self, path: Path) -> None:
        """Load an engine onto the GPU that is here.

        Raises:
            BundleError: it is none, is cut short, or TensorRT does not take it.
            DeviceUnavailable: TensorRT or a GPU is missing, or it is for other GPUs.
        """
        self.path, self.name = path, path.name
        with path.open("rb") as file:
            self._header = read_header(file.read(HEADER_BYTES), str(path))
        check_size(self._header, path.stat().st_size, str(path))
        flavour = self._header.flavour
        what = f"{path}: an engine of {flavour.title} {self._header.version_text}"
        state = get_backend(flavour.name).availability()
        if not state.ok:
            raise DeviceUnavailable(f"{what}, which does not run here: {state.reason}", hint=state.hint)
        targets = self._header.targets  # none: TensorRT itself has to say for which GPU it is
        if targets and (reason := foreign_to(targets, find_gpus())):
            raise DeviceUnavailable(f"{what}: {reason}", hint="verify it on such a GPU")
        self._library = import_tensorrt(flavour, f"the {flavour.name} backend")
        self._log = Log()
        self._loaded = deserialise(flavour, self._library, path, self._log)
        modes = self._library.TensorIOMode
        names = [self._loaded.get_tensor_name(i) for i in range(self._loaded.num_io_tensors)]
        self._inputs = [name for name in names if self._loaded.get_tensor_mode(name) == modes.INPUT]
        self._outputs = [name for name in names if name not in self._inputs]

    @property
    def folder(self) -> Path:
        return folder_of(self.path)

    @property
    def claim(self) -> tuple[Claim, str]:
        """What its name says; an engine itself says nothing of it."""
        said = claim_of_name(self.path)
        return (
            (said, "its name") if said else ("fp16", "default, as an engine does not say what it computes in")
        )

    @cached_property
    def interface(self) -> Interface:
        """What goes in and out.

        Raises:
            UsageError: it is no model of images.
        """
        inputs, outputs = (list(map(self._value, names)) for names in (self._inputs, self._outputs))
        return interface_of(self.path, inputs, outputs)

    def _value(self, name: str) -> Value:
        shape = tuple(None if size < 0 else int(size) for size in self._loaded.get_tensor_shape(name))
        dtype = self._loaded.get_tensor_dtype(name).name
        return Value(name, _DTYPES.get(dtype, dtype.lower()), shape)

    @property
    def _profiles(self) -> tuple[BatchRange, ...]:
        count = self._loaded.num_optimization_profiles
        name = self._inputs[0]
        ranges = [self._loaded.get_tensor_profile_shape(name, index) for index in range(count)]
        return tuple(BatchRange(*(int(shape[0]) for shape in shapes)) for shapes in ranges)

    def open(self, chosen: Chosen, size: Size) -> Renamed:
        """A session of this engine.

        Raises:
            UsageError: its images may vary in size.
            BundleError: no context can be made.
        """
        if self.interface.size is None:
            raise UsageError(f"{self.path}: height and width vary, which this version does not run")
        flavour, gpu = self._header.flavour, find_gpus()[0]
        inputs = (input_of(self.interface, size),)
        # All of its outputs need memory; one is compared.
        outputs = tuple(output_of(value) for value in self.interface.outputs)
        profiles = self._profiles
        cache = (
            KernelCache.of(self._header.version_text, gpu.name, sha256(self.path))
            if flavour.portable
            else None
        )
        device = cuda.CudaDevice(0)
        engine = Engine(
            self._library, self._loaded, device, inputs, outputs, profiles, graphs=False, kernels=cache
        )
        batches = BatchRange(min(p.min for p in profiles), profiles[0].opt, max(p.max for p in profiles))
        claim, _ = self.claim
        facts = SessionFacts(
            backend=flavour.name,
            artifact=self.name,
            precision=tolerated(claim),
            executes=claim,
            device="cuda:0",
            provider=flavour.name,
            batch=batches,
            inputs=inputs,
            outputs=tuple(spec for spec in outputs if spec.name == chosen.value.name),
            versions={flavour.name: self._library.__version__},
            rebuild="the engine has these batch sizes built in",
        )
        session: Session = EngineSession(facts, engine, self._log)
        return Renamed(session, chosen)
