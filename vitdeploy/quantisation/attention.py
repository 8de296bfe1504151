"""The ranges of what attentions multiply, for products in fp8."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitdeploy.model.deployed import DeployedModel, HeadLinear, Softmax
from vitdeploy.model.reference import public_name
from vitdeploy.quantisation.sites import FP8_LARGEST, AttentionScales

_PRODUCTS = (torch.Tensor.matmul, torch.Tensor.__matmul__, torch.matmul)


@torch.no_grad()
def attention_scales(model: DeployedModel, pixel_values: Tensor) -> dict[str, AttentionScales]:
    """Scales of every attention that has queries, keys and values for all tokens.

    Args:
        pixel_values: the images to calibrate with, (K, ...), as the model reads them.
    """
    watch = _Watch()
    with watch.on(model), watch:
        for image in pixel_values.split(1):
            model(image)
    return {
        name: AttentionScales(*(max(largest[part], 1e-6) / FP8_LARGEST for part in ("query", "key", "value")))
        for name, largest in watch.largest.items()
    }


class _Watch(TorchFunctionMode):
    """Looks at the products of each attention: in turn queries by keys, and probabilities by values."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: dict[str, dict[str, float]] = {}
        self._inside: str | None = None
        self._scored = False

    @contextmanager
    def on(self, model: DeployedModel) -> Iterator[None]:
        hooks = []
        for path, module in model.named_modules():
            absorbed = any(isinstance(part, HeadLinear) for part in module.modules())
            if isinstance(getattr(module, "softmax", None), Softmax) and not absorbed:
                hooks.append(module.register_forward_pre_hook(self._enter(public_name(path))))
                hooks.append(module.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, name: str) -> Any:
        def enter(*_: object) -> None:
            self._inside, self._scored = name, False
            self.largest.setdefault(name, defaultdict(float))

        return enter

    def _leave(self, *_: object) -> None:
        self._inside = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        linear = any(isinstance(arg, nn.Parameter) for arg in args)
        if self._inside is not None and func in _PRODUCTS and not linear:
            parts = (None, "value") if self._scored else ("query", "key")
            largest = self.largest[self._inside]
            for part, tensor in zip(parts, args, strict=True):
                if part is not None:
                    largest[part] = max(largest[part], tensor.abs().max().item())
            self._scored = not self._scored
        return func(*args, **(kwargs or {}))
