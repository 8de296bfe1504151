"""Between a bundle of a vision-language model's tower and the programs beside it.

On one side the image processor of transformers, whose patches of all images lie one after the other; on the
other vLLM and ONNX Runtime GenAI, whose language models take an image's features ready-made. ``grid_thw`` is
the bundle's: ``bundle.manifest.grid_thw``, frames, rows and columns of patches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitdeploy.errors import UsageError

Array = NDArray[Any]
Grid = tuple[int, int, int]

_FEATURES, _DEEPSTACK = "image_features", "deepstack_features"


def patches_of_images(pixel_values: Array, image_grid_thw: Array, grid_thw: Grid | None) -> Array:
    """What a bundle for patches reads, of what the image processor gives: (N, T, columns) float32.

    Args:
        pixel_values: (N T, columns), the patches of N images one after the other.
        image_grid_thw: (N, 3), their grids.

    Raises:
        UsageError: an image's grid is another than the bundle's, or the patches are of a video.
    """
    grid = _known(grid_thw)
    grids = [tuple(int(side) for side in row) for row in np.asarray(image_grid_thw).reshape(-1, 3)]
    if (times := max((frames for frames, *_ in grids), default=1)) > 1:
        raise UsageError(
            f"a video's patches, of {times} times, do not go into a tower for stills",
            hint="give images, one grid of patches each",
        )
    if others := sorted(set(grids) - {grid}):
        mixed = f" among {len(set(grids))} grids" if len(set(grids)) > 1 else ""
        raise UsageError(
            f"images of {_words(others[0])} patches{mixed} do not go into a bundle of {_words(grid)}",
            hint="resize them to the bundle's size before the processor, or run each size by itself",
        )
    values = np.asarray(pixel_values, np.float32)
    if not grids or values.ndim != 2 or len(values) != len(grids) * math.prod(grid):
        images = f"{len(grids)} images of {_words(grid)}"
        raise UsageError(f"{values.shape} is not the shape of the patches of {images}")
    return values.reshape(len(grids), -1, values.shape[1])


def for_vllm(outputs: Mapping[str, Array], grid_thw: Grid | None) -> dict[str, Array]:
    """Features in vLLM's form, for ``multi_modal_data={"image": ...}`` (as tensors of PyTorch there).

    Args:
        outputs: of N images, ``image_features`` (N, F, E) and, of Qwen3-VL, ``deepstack_features``
            (N, taps, F, E), as ``Predictor.outputs`` gives them.

    Returns:
        ``image_embeds`` (N F, E), behind each feature its deepstack features, (N F, E + taps E); and
        ``image_grid_thw`` (N, 3) int64.

    Raises:
        UsageError: the outputs are not those of such a tower.
    """
    features = _features(outputs)
    if (deepstack := outputs.get(_DEEPSTACK)) is not None:
        count, taps, rows, columns = deepstack.shape
        beside = deepstack.transpose(0, 2, 1, 3).reshape(count, rows, taps * columns)
        features = np.concatenate([features, beside], axis=2)
    return {"image_embeds": _flat(features), "image_grid_thw": _grids(len(features), grid_thw)}


def for_ort_genai(outputs: Mapping[str, Array], grid_thw: Grid | None) -> dict[str, Array]:
    """Features as ONNX Runtime GenAI's embedding model reads them.

    Args:
        outputs: as of :func:`for_vllm`.

    Returns:
        ``image_features`` (N F, E), the features of all images one after the other; ``image_grid_thw`` (N, 3)
        int64; where there are deepstack features, ``deepstack_features`` (taps, N F, E).

    Raises:
        UsageError: the outputs are not those of such a tower.
    """
    features = _features(outputs)
    given = {_FEATURES: _flat(features), "image_grid_thw": _grids(len(features), grid_thw)}
    if (deepstack := outputs.get(_DEEPSTACK)) is not None:
        given[_DEEPSTACK] = np.ascontiguousarray(
            deepstack.swapaxes(0, 1).reshape(deepstack.shape[1], -1, features.shape[2])
        )
    return given


def _features(outputs: Mapping[str, Array]) -> Array:
    if (features := outputs.get(_FEATURES)) is None:
        raise UsageError(
            f"there are no {_FEATURES} among {', '.join(outputs)}", hint=f"export with --output {_FEATURES}"
        )
    return features


def _flat(features: Array) -> Array:
    """(N, F, E) to (N F, E)."""
    return np.ascontiguousarray(features.reshape(-1, features.shape[2]))


def _grids(count: int, grid_thw: Grid | None) -> Array:
    return np.tile(np.array(_known(grid_thw), np.int64), (count, 1))


def _known(grid_thw: Grid | None) -> Grid:
    if grid_thw is None:
        raise UsageError("the bundle has no grid of patches: it is of no vision-language model")
    return grid_thw


def _words(grid: tuple[int, ...]) -> str:
    return "x".join(map(str, grid[-2:]))
