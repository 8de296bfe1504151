"""NNCF's post-training quantisation for OpenVINO.

By default as its documents say for transformers: SmoothQuant, and the products inside of attention in int8,
too. A job with ``"plain": true`` leaves both out and takes ranges by min and max: its fastest graph.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np

ATTENTION = r".*\.attn/MatMul.*"
"""Products of our graph that have no weights."""


def main(job: dict[str, Any]) -> None:
    """Read ``source`` and ``images``, write ``file``."""
    import nncf
    import openvino
    from nncf.quantization import advanced_parameters as advanced
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    images = np.load(job["images"])
    settings: dict[str, Any] = {}
    if job.get("plain"):
        settings["ignored_scope"] = nncf.IgnoredScope(patterns=[ATTENTION])
        settings["advanced_parameters"] = advanced.AdvancedQuantizationParameters(
            smooth_quant_alphas=advanced.AdvancedSmoothQuantParameters(matmul=-1, convolution=-1),
            activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
        )
    model = nncf.quantize(
        openvino.Core().read_model(job["source"]),
        nncf.Dataset([image[None] for image in images]),
        subset_size=len(images),
        model_type=nncf.ModelType.TRANSFORMER,
        **settings,
    )
    openvino.save_model(model, job["file"], compress_to_fp16=False)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
