"""Which engines a request means: for which GPUs, of which library, under which names.

One engine is for one architecture, or for several joined by ``+``. Each is an artifact of its own, because
each is proven on a GPU of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vitdeploy.config import BatchRange
from vitdeploy.errors import DeviceUnavailable, MissingDependency, UsageError
from vitdeploy.machine.gpus import find_gpus
from vitdeploy.tensorrt.flavours import FLAVOURS, Flavour, check_targets, installed
from vitdeploy.tensorrt.records import BuildSettings

FOLDER = "engines"
AUTO = "auto"
Group = tuple[str, ...]
"""Architectures of one engine."""
_LEVELS = range(6)


@dataclass(frozen=True)
class EngineRequest:
    """What a user asks of engines.

    Raises:
        UsageError: a value that no build could serve.
    """

    formats: tuple[str, ...] = ()
    """Names of flavours; or ``auto``, each that this machine can build."""
    architectures: tuple[str, ...] = ()
    """GPUs to build for: ``sm_89``; ``sm_80+sm_89`` is one engine for both."""
    profiles: tuple[BatchRange, ...] = ()
    """Optimization profiles; the artifact's own batch sizes when empty."""
    settings: BuildSettings = field(default_factory=BuildSettings)

    def __post_init__(self) -> None:
        level, workspace = self.settings.level, self.settings.workspace
        if level is not None and level not in _LEVELS:
            raise UsageError(f"optimization level {level} does not exist", hint="0 (quick) to 5 (thorough)")
        if workspace is not None and workspace < 1:
            raise UsageError("the workspace must have at least one byte")
        for lower, upper in zip(self.sorted_profiles, self.sorted_profiles[1:], strict=False):
            if upper.min > lower.max + 1:
                gap = f"{lower.max + 1} to {upper.min - 1}"
                raise UsageError(f"no profile serves batch sizes {gap}", hint="let the profiles adjoin")

    @property
    def sorted_profiles(self) -> list[BatchRange]:
        return sorted(self.profiles, key=lambda batch: (batch.min, batch.max))

    @property
    def groups(self) -> tuple[Group, ...]:
        return tuple(tuple(dict.fromkeys(text.split("+"))) for text in self.architectures)


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
        UsageError: an architecture or a setting that the flavour does not have.
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
    unused = AUTO in request.formats and not any(order.flavour.portable for order in orders)
    if request.architectures and unused:
        raise UsageError(f"nothing here builds for {', '.join(request.architectures)}", hint="; ".join(notes))
    return tuple(orders), tuple(notes)


def _order(flavour: Flavour, request: EngineRequest) -> Order:
    if not installed(flavour):
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
class Engine:
    """One engine of an order."""

    order: Order
    group: Group
    kind: str
    """What its ONNX artifact is called behind ``onnx-``: ``fp16``."""

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
        return f"{self.order.flavour.name}-{self.kind}-{'+'.join(self.targets)}"

    @property
    def folder(self) -> str:
        """Where it lies; the engines of TensorRT for RTX apart from TensorRT's."""
        return f"{FOLDER}/{'+'.join(self.targets)}{'-rtx' if self.order.flavour.portable else ''}"

    @property
    def path(self) -> str:
        return f"{self.folder}/model.{self.kind.replace('-', '.')}.plan"

    @property
    def record(self) -> str:
        return f"{self.folder}/model.{self.kind.replace('-', '.')}.json"


def engines_of(order: Order, kind: str) -> tuple[Engine, ...]:
    """What an order makes of one ONNX artifact."""
    return tuple(Engine(order, group, kind) for group in order.groups)
