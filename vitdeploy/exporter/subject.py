"""What is exported: a reference model with a checkpoint's weights, or a module of the user's."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from vitdeploy.bundle.dtypes import ArtifactPrecision, Quantised
from vitdeploy.bundle.golden import golden_inputs, inputs_of
from vitdeploy.bundle.manifest import Rewrite
from vitdeploy.checkpoint.opening import Checkpoint, UserModule, open_model, user_module
from vitdeploy.config import BatchRange, InputKind, ModelConfig, Output, Preprocess, Scores, Size
from vitdeploy.errors import UsageError, did_you_mean
from vitdeploy.exporter.fallback import emulate
from vitdeploy.exporter.request import ExportRequest
from vitdeploy.exporter.user_module import island_norms, rehearse, wrap
from vitdeploy.machine.memory import total_memory
from vitdeploy.model.deployed import DeployedModel
from vitdeploy.model.folds import normalisation
from vitdeploy.model.precision import PrecisionPlan, assign_dtypes, island_names
from vitdeploy.model.reference import outputs_float64, state_of
from vitdeploy.model.registry import architecture_of, build_reference
from vitdeploy.model.user_module import module_float64, module_flops

_MANY = 1024
"""Images of a batch; running more is worth a word before it begins."""


class Subject(ABC):
    """A model on its way into a bundle."""

    config: ModelConfig | None
    searches_islands = False
    """Whether the deployed module is made of sites, among which the fewest fp32 islands can be found."""
    preprocess: Preprocess
    labels: tuple[str, ...] | None
    scores: Scores | None = None
    """None is what is usual for so many outputs."""
    outputs: tuple[Output, ...]
    """What artifacts return, in order; at least one."""
    input: InputKind
    rewrites: tuple[Rewrite, ...] = ()
    flops: int | None = None
    notes: tuple[str, ...] = ()
    """What the user should know about how this model is taken."""
    own: frozenset[str] = frozenset()
    """Of a further image size, the names in ``state`` whose tensors are others than the first size's."""

    @property
    @abstractmethod
    def state(self) -> Mapping[str, Tensor]:
        """The weights, as loaded."""

    @abstractmethod
    def reference(self, inputs: Tensor) -> Mapping[Output, Tensor]:
        """The float64 outputs of the original model; inputs are what artifacts read."""

    @abstractmethod
    def deployed(self, plan: PrecisionPlan) -> nn.Module:
        """The module to trace."""

    @abstractmethod
    def share_deployed(self, first: Subject | None) -> None:
        """Take what does not depend on the image size from the first size's deployed module, where it is.

        Args:
            first: the same model at the first size, which keeps its last deployed module; None lets go of it.
        """

    @abstractmethod
    def rehearse(self, plan: PrecisionPlan, inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs of a reduced precision as hardware computes it: in fp32, every result rounded."""

    @abstractmethod
    def islands(self, deployed: nn.Module, plan: PrecisionPlan) -> tuple[str, ...]:
        """The sites of the deployed module that the plan keeps in fp32."""

    @abstractmethod
    def reload(self, paths: Sequence[Path]) -> None:
        """Go on with the weights in these files, the same ones, mapped instead of held in memory.

        Args:
            paths: a tensor of a later one takes the place of an earlier one's.
        """

    @property
    def image_size(self) -> Size:
        """Height and width that the model is built for."""
        return self.preprocess.size if self.config is None else self.config.image_size

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of what artifacts read, for one image."""
        if self.config is None:
            return (self.preprocess.channels, *self.image_size)
        return self.config.inputs[self.input]

    @property
    def takes_images(self) -> bool:
        """Whether image files can become what artifacts read."""
        return self.input != "patches" and self.preprocess.takes_images

    def golden_inputs(self, names: Sequence[str] | None = None) -> Tensor:
        """The golden images as artifacts read them, (K, ...); some of them only, by their names."""
        return torch.from_numpy(golden_inputs(self.preprocess, self.image_size, self.input, names))

    def inputs_of(self, images: NDArray[np.uint8]) -> Tensor:
        """Preprocessed images (K, H, W, C) uint8 as artifacts read them, (K, ...)."""
        return torch.from_numpy(inputs_of(images, self.preprocess, self.input))

    @property
    def parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.state.values())


class CheckpointSubject(Subject):
    """A model that vitdeploy builds: rewritten, and open to a search for islands."""

    searches_islands = True

    def __init__(self, checkpoint: Checkpoint, outputs: tuple[Output, ...], input_kind: InputKind) -> None:
        config = checkpoint.config
        if checkpoint.preprocess.channels != config.channels:
            raise UsageError(
                f"{checkpoint.source}: its preprocessing is for {checkpoint.preprocess.channels} channels, "
                f"but the model has {config.channels}",
                hint="state one mean and one deviation for each channel of the model",
            )
        if missing := [output for output in outputs if config.output_shape(output) is None]:
            layers = f"layer_0 to layer_{config.depth - 1}"
            hint = f"it has: {', '.join(config.outputs)}, {layers}"
            raise UsageError(f"{checkpoint.source} has no {missing[0]}", hint=hint)
        if input_kind not in config.inputs:
            known = ", ".join(config.inputs)
            raise UsageError(
                f"{checkpoint.source} reads no {input_kind}: they are what the image processors of "
                "vision-language models make",
                hint=f"it reads: {known}",
            )
        self.config: ModelConfig = config
        self.preprocess = checkpoint.preprocess
        self.outputs = outputs or config.usual_outputs
        self.labels = checkpoint.labels if "logits" in self.outputs else None
        if "logits" in self.outputs:
            self.scores = checkpoint.scores
        self.input = input_kind
        self._architecture = architecture_of(config)
        self.rewrites = self._architecture.applied_rewrites(config, self.outputs, input_kind)
        self.flops = self._architecture.forward_flops(config)
        self._reference = build_reference(config, checkpoint.state)
        self._first: CheckpointSubject | None = None
        self._kept: tuple[PrecisionPlan, DeployedModel] | None = None
        self._rehearsed: tuple[PrecisionPlan, DeployedModel] | None = None
        self._paths: tuple[Path, ...] = ()

    @property
    def state(self) -> Mapping[str, Tensor]:
        return state_of(self._reference)

    def reload(self, paths: Sequence[Path]) -> None:
        self._paths = tuple(paths)
        state = {name: tensor for path in paths for name, tensor in load_file(path).items()}
        self._reference = build_reference(self.config, state)

    def reference(self, inputs: Tensor) -> Mapping[Output, Tensor]:
        if self.input == "uint8":
            scale, shift = normalisation(self.preprocess)
            inputs = (inputs.double() * scale + shift).permute(0, 3, 1, 2)
        return outputs_float64(self._reference, inputs, self.outputs)

    def share_deployed(self, first: Subject | None) -> None:
        self._first = first if isinstance(first, CheckpointSubject) else None
        self._kept = None

    def golden_inputs(self, names: Sequence[str] | None = None) -> Tensor:
        return self._read(super().golden_inputs(names))

    def inputs_of(self, images: NDArray[np.uint8]) -> Tensor:
        return self._read(super().inputs_of(images))

    def _read(self, pixels: Tensor) -> Tensor:
        return self._architecture.patches(self.config, pixels) if self.input == "patches" else pixels

    def deployed(self, plan: PrecisionPlan) -> DeployedModel:
        settings: dict[str, Any] = {
            "outputs": self.outputs,
            "input_kind": self.input,
            "preprocess": self.preprocess,
        }
        rehearsed, self._rehearsed = self._rehearsed, None
        if rehearsed is not None and rehearsed[0] == plan:
            return rehearsed[1]
        kept = self._first._kept if self._first else None
        if self._first is not self and kept is not None and kept[0] == plan:
            return self._architecture.redeploy(self._reference, kept[1], plan, **settings)
        model = self._architecture.deploy(self._reference, plan, **settings)
        if self._paths:
            self.reload(self._paths)  # what has been read stays in memory as long as it is mapped
        if self._first is self:
            self._kept = plan, model
        return model

    def rehearse(self, plan: PrecisionPlan, inputs: Tensor) -> tuple[Tensor, ...]:
        model = self.deployed(plan)
        if self._first is not None:  # others go on with its modules
            return emulate(copy.deepcopy(model).float(), plan, inputs)
        outputs = emulate(model.float(), plan, inputs)
        # What was rounded before is rounded to the same again, and exported next.
        self._rehearsed = plan, assign_dtypes(model, "", plan)
        return outputs

    def islands(self, deployed: nn.Module, plan: PrecisionPlan) -> tuple[str, ...]:
        return island_names(deployed, plan)


class ModuleSubject(Subject):
    """A user's module: no rewrites, the same proof."""

    def __init__(self, user: UserModule, outputs: tuple[Output, ...], input_kind: InputKind) -> None:
        if input_kind == "patches":
            raise UsageError("a module of your own reads (N, C, H, W) tensors, not patches")
        if input_kind == "uint8":
            raise UsageError(
                "uint8 input folds the normalisation into a patch projection that vitdeploy knows"
            )
        if outputs not in ((), (user.output,)):
            chosen = ", ".join(outputs)
            raise UsageError(f"{user.source} gives what it returns, {user.output}; {chosen} cannot be chosen")
        self.config = None
        self.preprocess, self.labels, self.scores = user.preprocess, user.labels, user.scores
        self.outputs, self.input = (user.output,), input_kind
        self.flops = module_flops(user.module, user.preprocess.channels, user.preprocess.size)
        self._module = user.module

    @property
    def state(self) -> Mapping[str, Tensor]:
        # A safetensors file holds no two names for one memory.
        return {name: tensor.detach().clone() for name, tensor in self._module.state_dict().items()}

    @property
    def parameters(self) -> int:
        # Without buffers: a BatchNorm's running mean is no parameter.
        return sum(parameter.numel() for parameter in self._module.parameters())

    def reload(self, paths: Sequence[Path]) -> None:
        # Only the module itself knows what its weights mean: it keeps them.
        return

    def reference(self, inputs: Tensor) -> Mapping[Output, Tensor]:
        return {self.outputs[0]: module_float64(self._module, inputs)}

    def share_deployed(self, first: Subject | None) -> None:
        # A copy in another dtype is quickly made.
        return

    def deployed(self, plan: PrecisionPlan) -> nn.Module:
        return wrap(self._module, plan)

    def rehearse(self, plan: PrecisionPlan, inputs: Tensor) -> tuple[Tensor, ...]:
        return (rehearse(self._module, plan, inputs),)

    def islands(self, deployed: nn.Module, plan: PrecisionPlan) -> tuple[str, ...]:
        return island_norms(deployed) if plan.default != torch.float32 else ()


def open_subject(
    request: ExportRequest, failures: dict[ArtifactPrecision, str] | None = None
) -> tuple[Checkpoint | UserModule, Subject]:
    """Load the model that is asked for, for the first of its sizes.

    Args:
        failures: receives why the model cannot be quantised, which otherwise is an error.

    Raises:
        UsageError, CheckpointError, MissingDependency: it cannot be opened, or not so.
    """
    opened: Checkpoint | UserModule
    if isinstance(request.model, nn.Module):
        name = type(request.model).__name__
        sizes = request.image_size, request.stated, request.further_sizes
        opened = user_module(request.model, name, *sizes)
    else:
        opened = open_model(
            None if request.model is None else str(request.model),
            checkpoint=request.checkpoint,
            image_size=request.image_size,
            further_sizes=request.further_sizes,
            seed=request.seed,
            stated=request.stated,
            zero_shot=request.zero_shot,
            revision=request.revision,
            cache_dir=request.cache_dir,
            random=request.random,
        )
    if request.zero_shot is not None and isinstance(opened, UserModule):
        message = f"{opened.source} is exported as it is, and takes no zero-shot head"
        raise UsageError(message, hint="make the head where the module is made")
    subject = subject_of(opened, request.outputs, request.input)
    for flag, said in (("--scores", request.stated.scores), ("--labels", request.stated.labels)):
        if said is not None and "logits" not in subject.outputs:
            message = f"{flag} is what becomes of logits; {opened.source} gives {', '.join(subject.outputs)}"
            raise UsageError(message, hint=f"leave {flag} out, or take a model with a head")
    for kind in request.quantised:
        try:
            _require_quantisable(opened, subject, kind)
        except UsageError as error:
            if failures is None:
                raise
            failures[kind] = error.message
    subject.notes = (*subject.notes, *_batch_notes(subject, request.batch))
    return opened, subject


def _require_quantisable(opened: Checkpoint | UserModule, subject: Subject, kind: Quantised) -> None:
    """Refuse what cannot be quantised, or not be calibrated.

    Raises:
        UsageError: a module of the user's own, or one that no image file goes into.
    """
    if isinstance(opened, UserModule):
        message = f"{opened.source} is exported as it is: {kind} is for models that vitdeploy builds itself"
        raise UsageError(message, hint=f"leave out --{kind}; --fp16 and --bf16 take any module")
    if not subject.preprocess.takes_images:
        message = (
            f"{kind} is calibrated with image files, and {opened.source} reads tensors of "
            f"{subject.preprocess.channels} channels"
        )
        raise UsageError(message, hint=f"leave out --{kind}")


def further_subjects(opened: Checkpoint | UserModule, request: ExportRequest) -> tuple[Subject, ...]:
    """The same model for the other sizes that are asked for, sharing its weights.

    Raises:
        UsageError: a batch at such a size does not fit into this machine.
    """
    subjects: list[Subject] = []
    if isinstance(opened, UserModule):
        for spec in opened.further:
            user = replace(opened, preprocess=spec, further=())
            subjects.append(subject_of(user, request.outputs, request.input))
    else:
        for resized in opened.further:
            subject = subject_of(opened.at(resized), request.outputs, request.input)
            subject.own = frozenset(resized.state)
            subjects.append(subject)
    for subject in subjects:
        _batch_notes(subject, request.batch)
    return tuple(subjects)


def _batch_notes(subject: Subject, batch: BatchRange) -> tuple[str, ...]:
    """What a very large batch means for the proof, which runs it.

    Raises:
        UsageError: its pixels alone are more than this machine's memory.
    """
    pixels = batch.max * math.prod(subject.input_shape) * (1 if subject.input == "uint8" else 4)
    there = total_memory()
    if there is not None and pixels > there:
        raise UsageError(
            f"a batch of {batch.max} images is {pixels / 1e9:.3g} GB of pixels, and it has to be proven on "
            f"this machine, which has {there / 1e9:.3g} GB",
            hint=f"--batch {batch.min},{min(batch.opt, _MANY)},{_MANY}",
        )
    if batch.max <= _MANY:
        return ()
    sizes = " and ".join(str(size) for size in batch.sizes if size > _MANY)
    return (
        f"every artifact is proven with {sizes} images at once, which are {pixels / 1e9:.2g} GB of pixels",
    )


def subject_of(opened: Checkpoint | UserModule, outputs: tuple[Output, ...], input_kind: str) -> Subject:
    """The subject for what was opened, after a look at the name of the input."""
    inputs: dict[str, InputKind] = {name: name for name in get_args(InputKind)}
    if input_kind not in inputs:
        raise UsageError(
            f"unknown input {input_kind!r}{did_you_mean(input_kind, inputs)}", hint="float, uint8 or patches"
        )
    kind = ModuleSubject if isinstance(opened, UserModule) else CheckpointSubject
    return kind(opened, outputs, inputs[input_kind])  # type: ignore[arg-type]
