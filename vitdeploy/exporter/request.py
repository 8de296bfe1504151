"""What a user asks of an export or of engines, from the command line or from Python, checked once.

One engine is for one architecture, or for several joined by ``+``. Each is an artifact of its own, because
each is held against the reference on a GPU of its own. Needs no PyTorch.
"""

from __future__ import annotations

import importlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from vitdeploy.bundle.dtypes import Quantised
from vitdeploy.bundle.manifest import AOT
from vitdeploy.bundle.sizes import named, sized
from vitdeploy.checkpoint.stated import Stated
from vitdeploy.checkpoint.texts.prompts import ZeroShot
from vitdeploy.config import OUTPUTS, BatchRange, Output, Precision, Size, is_output, layer_of, size_name
from vitdeploy.errors import DeviceUnavailable, MissingDependency, UsageError, did_you_mean
from vitdeploy.machine.gpus import find_gpus
from vitdeploy.quantisation.calibration import WANTED
from vitdeploy.tensorrt.flavours import FLAVOURS, Flavour, check_targets, lacks_fp8
from vitdeploy.tensorrt.records import BuildSettings
from vitdeploy.variants import DEFAULT_MODEL
from vitdeploy.verification.accuracy import check_max_drop

if TYPE_CHECKING:
    from torch import nn

AUTO = "auto"
FORMATS: tuple[str, ...] = (AUTO, "onnx", *FLAVOURS, AOT)
_FOLDER = "engines"
OLDEST_OPSET, NEWEST_OPSET = 17, 23
PRECISIONS: tuple[str, ...] = (*get_args(Precision), *get_args(Quantised))
"""What artifacts can be asked for in."""
TARGETS = ("tensorrt",)
"""Runtimes with a form of quantised artifacts of their own."""
_WEIGHT_BITS = (7, 8)
_FP8_OPSET = 19
Group = tuple[str, ...]
"""Architectures of one engine."""
_LEVELS = range(6)
_LAYERS = "layers:"


@dataclass(frozen=True)
class EngineRequest:
    """Which engines of a bundle's ONNX artifacts, and how they are built.

    Raises:
        UsageError: a value that no build could serve.
    """

    formats: tuple[str, ...] = ()
    """Names of flavours; or ``auto``, each that this machine can build."""
    architectures: tuple[str, ...] = ()
    """GPUs to build for: ``sm_89``; ``sm_80+sm_89`` is one engine for both."""
    profiles: tuple[BatchRange, ...] = ()
    """Optimization profiles, the least batch sizes first; the artifact's own batch sizes when empty."""
    settings: BuildSettings = field(default_factory=BuildSettings)
    precisions: tuple[str, ...] = ()
    """Of the ONNX artifacts to build from, as they are or as they were asked for; all when empty."""

    def __post_init__(self) -> None:
        for name in self.formats:
            if name not in (AUTO, *FLAVOURS):
                message = f"{name!r} is no format of engines{did_you_mean(name, FLAVOURS)}"
                raise UsageError(message, hint=f"to a bundle are added: {', '.join(FLAVOURS)}")
        level, workspace = self.settings.level, self.settings.workspace
        if level is not None and level not in _LEVELS:
            raise UsageError(f"optimization level {level} does not exist", hint="0 (quick) to 5 (thorough)")
        if workspace is not None and workspace < 1:
            raise UsageError("the workspace must have at least one byte")
        profiles = tuple(sorted(self.profiles, key=lambda batch: (batch.min, batch.max)))
        for lower, upper in itertools.pairwise(profiles):
            if upper.min > lower.max + 1:
                gap = f"{lower.max + 1} to {upper.min - 1}"
                raise UsageError(f"no profile serves batch sizes {gap}", hint="let the profiles adjoin")
        object.__setattr__(self, "profiles", profiles)

    @property
    def groups(self) -> tuple[Group, ...]:
        return tuple(tuple(dict.fromkeys(text.split("+"))) for text in self.architectures)


@dataclass(frozen=True)
class ExportRequest:
    """Everything a user can ask of an export.

    Raises:
        UsageError: a value that no export could serve.
        MissingDependency: kernels are asked for, and Triton is not installed.
    """

    model: str | Path | nn.Module | None = None
    checkpoint: Path | None = None
    precisions: tuple[str, ...] = ("fp32",)
    formats: tuple[str, ...] = (AUTO,)
    image_size: Size | None = None
    """The first, the default one of the bundle; the checkpoint's own when None."""
    further_sizes: tuple[Size, ...] = ()
    """Others, each with artifacts of its own in the same bundle."""
    batch: BatchRange = field(default_factory=BatchRange)
    opset: int = 20
    input: str = "float"
    output: str | Sequence[str] | None = None
    """As :func:`parse_outputs` takes it."""
    stated: Stated = field(default_factory=Stated)
    """What the user says of the model."""
    zero_shot: ZeroShot | None = None
    """The classes of a head that is made for them."""
    revision: str | None = None
    """Of a model on the hub."""
    cache_dir: Path | None = None
    """Where downloads are kept."""
    atol: float | None = None
    architectures: tuple[str, ...] = ()
    """GPUs to build engines and compile kernels for; ``sm_80+sm_89`` is one engine for both."""
    profiles: tuple[BatchRange, ...] = ()
    """Optimization profiles of engines; the batch range when empty."""
    settings: BuildSettings = field(default_factory=BuildSettings)
    """Of engines."""
    calibration: Path | None = None
    """A folder of images for ``int8`` and ``fp8``, or a bundle whose calibration is taken."""
    weight_bits: int = 7
    """Of ``int8``."""
    fp8_attention: bool = False
    """Whether ``fp8`` takes the products inside of attention, too."""
    target: str | None = None
    """``tensorrt``: quantised artifacts in the form that it takes, whether it is here or not."""
    data: Path | None = None
    """Labelled images, on which quantised artifacts may not be worse than fp32."""
    max_drop: float | None = None
    """Points of top-1 that they may lose there; what the images cannot tell passes where it is None."""
    fallback: bool = True
    seed: int = 0
    random: bool = False
    """Random weights of what a library builds, instead of trained ones."""
    command: str = ""

    def __post_init__(self) -> None:
        for what, given, choices in (
            ("precision", self.precisions, PRECISIONS),
            ("format", self.formats, FORMATS),
        ):
            for name in given:
                if name not in choices:
                    raise UsageError(
                        f"unknown {what} {name!r}{did_you_mean(name, choices)}",
                        hint=f"known: {', '.join(choices)}",
                    )
        sizes = (self.image_size, *self.further_sizes)
        if twice := next((size for size in self.further_sizes if sizes.count(size) > 1), None):
            raise UsageError(f"the image size {size_name(twice)} is named twice", hint="name each once")
        if self.further_sizes and self.image_size is None:
            raise UsageError("further image sizes go with a first one", hint="--image-size 224,384")
        if self.zero_shot is not None and self.stated.labels is not None:
            raise UsageError("--zero-shot names the classes, and --labels does, too", hint="leave one out")
        if self.atol is not None and not self.atol > 0:
            raise UsageError(f"atol must be positive, not {self.atol}")
        self._check_quantisation()
        if not OLDEST_OPSET <= self.opset <= NEWEST_OPSET:
            hint = f"choose {OLDEST_OPSET} to {NEWEST_OPSET}"
            raise UsageError(f"opset {self.opset} is not supported", hint=hint)
        if not self.engines.formats and (self.profiles or self.settings != BuildSettings()):
            hint = "--format onnx,tensorrt-rtx, or tensorrt"
            raise UsageError(
                "profiles and builder settings are for engines, and no format makes any", hint=hint
            )
        several = len(self.outputs) > 1
        if several and AOT in self.formats:
            raise UsageError(
                f"the kernels give one output, not {', '.join(self.outputs)}",
                hint=f"name one, or leave {AOT} out of the formats",
            )
        if AOT in self.formats:
            _check_kernel_architectures(self.kernel_architectures)
            if not self.kernel_precisions:
                listed = ", ".join(self.precisions)
                raise UsageError(f"the kernels compute in fp16 or bf16, not in {listed}", hint="add --fp16")
        elif self.architectures and not self.engines.formats:
            raise UsageError(
                "--arch names GPUs to build for, and no format needs it",
                hint=f"--format onnx,tensorrt-rtx, or onnx,{AOT}",
            )

    def _check_quantisation(self) -> None:
        """Check what concerns int8 and fp8 only."""
        if self.target not in (None, *TARGETS):
            known = f"known: {', '.join(TARGETS)}"
            raise UsageError(f"--for {self.target}: there is no form of its own for it", hint=known)
        if self.weight_bits not in _WEIGHT_BITS:
            raise UsageError(
                f"weights of {self.weight_bits} bits are not supported",
                hint="--weight-bits 7, which no processor saturates on, or 8",
            )
        for flag, said, kinds in (
            ("--calibration", self.calibration is not None, get_args(Quantised)),
            ("--for", self.target is not None, get_args(Quantised)),
            ("--data", self.data is not None, get_args(Quantised)),
            ("--weight-bits", self.weight_bits != _WEIGHT_BITS[0], ("int8",)),
            ("--fp8-attention", self.fp8_attention, ("fp8",)),
        ):
            if said and set(kinds).isdisjoint(self.precisions):
                asked = " and ".join(f"--{kind}" for kind in kinds)
                raise UsageError(f"{flag} is for {asked}", hint=f"leave {flag} out, or add --{kinds[0]}")
        check_max_drop(self.max_drop, self.data)
        if not self.quantised:
            return
        names = " and ".join(self.quantised)
        if self.calibration is None:
            raise UsageError(f"{names} cannot be without images to take ranges from", hint=WANTED)
        if not self.wants_onnx:
            hint = f"add onnx to the formats, or leave {names} out"
            raise UsageError(f"{names} artifacts are ONNX files, which no format here makes", hint=hint)
        if self.further_sizes:
            hint = "one bundle for each size"
            raise UsageError(f"{names} artifacts are for one image size: ranges are taken at it", hint=hint)
        if self.opset < _FP8_OPSET and ("fp8" in self.quantised or self.target):
            what = "fp8 is" if "fp8" in self.quantised else f"scales in fp16, which {self.target} takes, are"
            hint = f"--opset {_FP8_OPSET} to {NEWEST_OPSET}, the default is 20"
            raise UsageError(f"{what} not in opset {self.opset}", hint=hint)

    @property
    def quantised(self) -> tuple[Quantised, ...]:
        """What is asked for in 8 bits."""
        return tuple(kind for kind in get_args(Quantised) if kind in self.precisions)

    @property
    def floats(self) -> tuple[Precision, ...]:
        """The other precisions. A quantised artifact is held beside fp32, which is what a fallback leaves."""
        every: tuple[Precision, ...] = get_args(Precision)
        asked = {name: name for name in every}
        wanted = [asked[name] for name in dict.fromkeys(self.precisions) if name in asked]
        return tuple(dict.fromkeys(("fp32", *wanted) if self.quantised and "fp32" not in wanted else wanted))

    def rests(self, orders: Sequence[Order]) -> tuple[Precision, ...]:
        """What quantised artifacts are in where they are not quantised: for processors, and for engines."""
        return ("fp32", "fp16") if orders or self.target else ("fp32",)

    @cached_property
    def outputs(self) -> tuple[Output, ...]:
        """What the artifacts are to return; none is named where it is the model's own first output."""
        return parse_outputs(self.output)

    @property
    def wants_onnx(self) -> bool:
        """Engines are built from it, and it is what is verified where they do not run."""
        return {AOT} != set(self.formats)

    @cached_property
    def engines(self) -> EngineRequest:
        """What is asked of engines."""
        formats = tuple(name for name in self.formats if name == AUTO or name in FLAVOURS)
        return EngineRequest(
            formats,
            self._architectures(kernels=False),
            profiles=self.profiles,
            settings=self.settings,
            precisions=self.precisions,
        )

    @cached_property
    def kernel_architectures(self) -> tuple[str, ...]:
        """GPUs to compile the fused kernels for."""
        parts = (part for text in self._architectures(kernels=True) for part in text.split("+"))
        return tuple(dict.fromkeys(parts))

    def _architectures(self, *, kernels: bool) -> tuple[str, ...]:
        """Of the architectures, those for the kernels or those for engines, where both are asked for."""
        if AOT not in self.formats or set(self.formats).isdisjoint((AUTO, *FLAVOURS)):
            return self.architectures
        takes = {True: set(kernel_targets()), False: set(FLAVOURS["tensorrt-rtx"].targets)}
        mine, theirs = takes[kernels], takes[not kernels]
        parts = {text: set(text.split("+")) for text in self.architectures}
        # What neither takes is left to both, to be refused.
        return tuple(text for text in parts if parts[text] <= mine or not parts[text] <= theirs)

    @property
    def kernel_precisions(self) -> tuple[Precision, ...]:
        """In which the fused kernels are to be compiled."""
        asked = self.precisions if AOT in self.formats else ()
        halves: tuple[Precision, ...] = ("fp16", "bf16")
        return tuple(precision for precision in halves if precision in asked)

    @property
    def default_folder(self) -> Path:
        """Where a bundle goes when the user names no place: the model's name in the working directory."""
        named = self.model is None or isinstance(self.model, str | Path)
        name = str(self.model or DEFAULT_MODEL) if named else type(self.model).__name__
        if self.checkpoint is not None and self.model is None:
            name = self.checkpoint.stem
        path = Path(name)
        if path.exists():
            name = path.stem if path.is_file() else path.resolve().name
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")
        return Path(f"{stem or 'model'}.bundle")


def parse_outputs(given: str | Sequence[str] | None) -> tuple[Output, ...]:
    """The outputs that are asked for, in order.

    Args:
        given: ``"logits,embedding"``, ``"features,layers:3,7,11"``, or a sequence of such. Behind ``layers:``
            stand numbers of blocks, up to the next name. None names none.

    Raises:
        UsageError: no model has such an output, or one is named twice.
    """
    if given is None:
        return ()
    text = given if isinstance(given, str) else ",".join(given)
    outputs: list[Output] = []
    in_layers = False
    for part in map(str.strip, text.split(",")):
        number = part.removeprefix(_LAYERS).strip()
        in_layers = part.startswith(_LAYERS) or (in_layers and number[:1].isdigit())
        name = f"layer_{number}" if in_layers else part
        if in_layers and layer_of(name) is None:
            message = f"{_LAYERS} takes numbers of blocks, not {number[:20]!r}"
            raise UsageError(message, hint=f"{_LAYERS}3,7,11, the first block is 0")
        if not is_output(name):
            known = f"known: {', '.join(OUTPUTS)}, and {_LAYERS}3,7 for the tokens behind blocks 3 and 7"
            raise UsageError(f"unknown output {name!r}{did_you_mean(name, OUTPUTS)}", hint=known)
        if name in outputs:
            raise UsageError(f"the output {name} is named twice", hint="name each once")
        outputs.append(name)
    return tuple(outputs)


def _check_kernel_architectures(names: tuple[str, ...]) -> None:
    targets = kernel_targets()
    for name in names:
        if name not in targets:
            message = f"unknown architecture {name!r}{did_you_mean(name, targets)}"
            raise UsageError(message, hint=f"known: {', '.join(targets)}")
    if not names:
        hint = f"--arch with some of {','.join(targets)}"
        raise UsageError(f"--format {AOT} compiles for the GPUs that you name", hint=hint)


def kernel_targets() -> tuple[str, ...]:
    """GPUs that the fused kernels can be compiled for.

    Raises:
        MissingDependency: Triton is not installed.
    """
    return tuple(kernels_library("aot").ARCHITECTURES)


def kernels_library(name: str) -> Any:
    """A module of the kernels' package.

    Raises:
        MissingDependency: Triton is not installed.
    """
    try:
        return importlib.import_module(f"vitdeploy_kernels.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise
        raise MissingDependency("triton", extra="kernels", purpose=f"--format {AOT}") from error


@dataclass(frozen=True)
class Order:
    """The engines of one flavour that are to be built of each ONNX artifact."""

    flavour: Flavour
    groups: tuple[Group, ...]
    """One empty group: for the GPU that is here."""
    request: EngineRequest


def orders_of(request: EngineRequest) -> tuple[tuple[Order, ...], tuple[str, ...]]:
    """What of a request this machine can build, and notes on what it cannot.

    Only what ``auto`` asks for is left out with a note; what is named must be there.

    Raises:
        UsageError: an architecture or a setting that the flavour does not have; fp8 for GPUs without it.
        MissingDependency, DeviceUnavailable: a named flavour's library, or the GPU it needs, is not there.
    """
    orders, notes = [], []
    for flavour in FLAVOURS.values():
        if flavour.name in request.formats:
            orders.append(_order(flavour, request))
        elif AUTO in request.formats:
            try:
                orders.append(_order(flavour, request))
            except (MissingDependency, DeviceUnavailable, UsageError) as error:
                notes.append(f"no {flavour.name} engine: {error.message} ({error.hint})")
    if "fp8" in request.precisions:
        chosen = orders if request.architectures else [o for o in orders if o.flavour.name in request.formats]
        require_fp8(chosen)
    unused = AUTO in request.formats and not any(order.flavour.portable for order in orders)
    if request.architectures and unused:
        raise UsageError(f"nothing here builds for {', '.join(request.architectures)}", hint="; ".join(notes))
    return tuple(orders), tuple(notes)


def without_fp8(order: Order) -> tuple[str, ...]:
    """The architectures of an order that have no fp8."""
    archs = (arch for engine in engines_of(order, "fp8") for arch in engine.targets)
    return tuple(dict.fromkeys(filter(lacks_fp8, archs)))


def require_fp8(orders: Sequence[Order]) -> None:
    """Refuse to build engines of fp8 for GPUs without it.

    Raises:
        UsageError: names those that have it.
    """
    for order in orders:
        if lacking := without_fp8(order):
            has = [arch for arch in FLAVOURS["tensorrt-rtx"].targets if not lacks_fp8(arch)]
            raise UsageError(
                f"{order.flavour.title}: {', '.join(lacking)} has no fp8",
                hint=f"{', '.join(has)} have it; int8 is for every GPU",
            )


def _order(flavour: Flavour, request: EngineRequest) -> Order:
    if not flavour.is_installed:
        raise MissingDependency(flavour.module, extra=flavour.name, purpose=f"a {flavour.title} engine")
    _check_settings(flavour, request.settings)
    gpus = find_gpus()
    if not flavour.portable:
        if not gpus:
            hint = "build it where the GPU is; tensorrt-rtx builds anywhere for the GPUs that --arch names"
            raise DeviceUnavailable(
                f"{flavour.title} builds for the GPU that is here: there is none", hint=hint
            )
        alone = request.formats == (flavour.name,)  # else --arch may be meant for another format
        if alone and request.groups not in ((), ((gpus[0].arch,),)):
            raise UsageError(
                f"{flavour.title} builds for the GPU that is here, {gpus[0].arch}, not for "
                f"{', '.join(request.architectures)}",
                hint="leave out --arch, or take --format tensorrt-rtx",
            )
        return Order(flavour, ((),), request)
    groups = request.groups or tuple((gpu.arch,) for gpu in gpus[:1] if gpu.arch in flavour.targets)
    if not groups:
        hint = f"--arch with some of {','.join(flavour.targets)}"
        raise UsageError(f"{flavour.title} builds for the GPUs that you name", hint=hint)
    check_targets(flavour, groups)
    return Order(flavour, groups, request)


def _check_settings(flavour: Flavour, settings: BuildSettings) -> None:
    if not flavour.portable:
        return
    if settings.hardware != "none":
        hint = "name the architectures: --arch sm_80+sm_89"
        raise UsageError(f"{flavour.title} has no hardware compatibility level", hint=hint)
    if settings.version_compatible:
        message = f"{flavour.title} builds no version-compatible engines"
        raise UsageError(message, hint="its engines are built anew in seconds")
    if settings.weights != "full" and not find_gpus():
        message = f"{flavour.title} needs a GPU to build an engine with {settings.weights} weights"
        raise DeviceUnavailable(message, hint="build it where the GPU is, or with --weights full")


@dataclass(frozen=True)
class PlannedEngine:
    """One engine of an order."""

    order: Order
    group: Group
    kind: str
    """What ONNX artifacts of its precision are called behind ``onnx-``: ``fp16``."""
    size: Size | None = None
    """The image size as artifacts name it; None is the first."""

    @property
    def targets(self) -> Group:
        """The architectures that it runs on."""
        if self.order.flavour.portable:
            return self.group
        if self.order.request.settings.hardware == "ampere_plus":
            return ("sm_80+",)
        return (find_gpus()[0].arch,)

    @property
    def name(self) -> str:
        """Of its artifact: ``tensorrt-rtx-fp16-sm_89``."""
        return named(f"{self.order.flavour.name}-{self.kind}-{'+'.join(self.targets)}", self.size)

    @property
    def folder(self) -> str:
        """Where it lies; the engines of TensorRT for RTX apart from TensorRT's."""
        return f"{_FOLDER}/{'+'.join(self.targets)}{'-rtx' if self.order.flavour.portable else ''}"

    @property
    def path(self) -> str:
        return sized(f"{self.folder}/model.{self.kind.replace('-', '.')}.plan", self.size)

    @property
    def record(self) -> str:
        return sized(f"{self.folder}/model.{self.kind.replace('-', '.')}.json", self.size)


def engines_of(order: Order, kind: str, size: Size | None = None) -> tuple[PlannedEngine, ...]:
    """What an order makes of one ONNX artifact."""
    return tuple(PlannedEngine(order, group, kind, size) for group in order.groups)
