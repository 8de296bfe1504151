"""Other people's models in float64 throughout, to be compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Exact(TorchFunctionMode):
    """Within it, whoever asks for float32 is given float64.

    Attention in transformers has its softmax in float32 whatever the dtype of the model, which is 1e-7 beside
    what the model means. Only around a float64 oracle: a rounding to float32 that is the model's own is lost.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        keywords = {name: _wide(value) for name, value in (kwargs or {}).items()}
        if func is torch.Tensor.float:
            return args[0].double()
        return func(*map(_wide, args), **keywords)


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
