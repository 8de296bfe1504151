"""Kernel by kernel at ViT-B/16's shapes, on a GPU; each is checked against float64 before it is timed.

    PYTHONPATH=kernels pytest benchmarks/bench_kernels.py -m gpu --benchmark-json=kernels_gpu.json

What pytest-benchmark times is a launch as the host sees it; the time on the device, measured in a CUDA
graph over inputs that are not in the cache, is in ``extra_info`` beside the roofline.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from kernel_tools.cost import H200, floor, predict, work
from vitdeploy_kernels.config import shipped_table, table_for
from vitdeploy_kernels.problems import build
from vitdeploy_kernels.specs import Spec
from vitdeploy_kernels.timing import graph_timer, input_sets, median, spread
from vitdeploy_kernels.tuner import MODELS, specs_of, this_gpu

BATCHES = (1, 64)
SPECS = specs_of([MODELS["B/16"]], BATCHES, torch.float16, shipped_table((9, 0)))
NARROW = specs_of([MODELS["Ti/16"]], BATCHES, torch.float16, shipped_table((9, 0)))
"""Of a model whose rows are narrow enough for layernorm_attention."""


@pytest.mark.gpu
@pytest.mark.parametrize(
    "spec", [*SPECS, *(spec for spec in NARROW if spec.kernel == "layernorm_attention")], ids=str
)
def test_kernel(benchmark: BenchmarkFixture, spec: Spec) -> None:
    device, target = torch.device("cuda"), this_gpu()
    config = table_for(device).config(spec.kernel, spec.shape)
    first = build(spec, torch.float16, device)
    sets = input_sets(first.size, target.cache)
    problems = [first, *(build(spec, torch.float16, device, seed) for seed in range(1, sets))]
    launches = [problem.launch(config) for problem in problems]
    first.output.fill_(float("nan"))
    launches[0].run()
    assert first.wrong(first.expected()) is None
    samples = graph_timer({"": [launch.run for launch in launches]})[""]
    todo = work(launches[0])
    benchmark.extra_info |= {
        "gpu": target.name,
        "config": config.as_list(),
        "device_us": median(samples),
        "spread": spread(samples),
        "flops": todo.flops,
        "bytes": todo.size,
        "floor_us_h200": 1e6 * floor(todo, H200),
        "predicted_us_h200": 1e6 * predict(todo, H200),
    }

    def run() -> None:
        launches[0].run()
        torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=50, warmup_rounds=5)
