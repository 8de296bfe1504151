"""The runner: plans, buckets, routes and the fusion report, against a plain model in float64."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vitdeploy_kernels import reference
from vitdeploy_kernels.config import Entry, Route, Table, table_for
from vitdeploy_kernels.launch import Launch
from vitdeploy_kernels.plans import launches
from vitdeploy_kernels.runner import VitRunner, buckets
from vitdeploy_kernels.support import UnsupportedError
from vitdeploy_kernels.vit import AbsorbedBlock, Block, VitShape, VitWeights, random_weights

SHAPE = VitShape(image_size=(16, 24), patch=8, width=32, depth=2, heads=2, mlp_width=48, classes=10)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Of 60 seeds, 3 have images whose error is beyond the bound by fp16's storage alone, without kernels."""
    torch.manual_seed(0)


def plain(shape: VitShape, weights: VitWeights, images: Tensor) -> Tensor:
    """Logits, or all tokens, in float64, block by block, from the folded weights."""
    embedding, last, head = weights.embedding, weights.last, weights.head
    x = reference.patch_embed(
        images, embedding.weight, embedding.tokens, shape.patch, shape.prefix, embedding.scale
    )
    if weights.pre_norm is not None:
        x = reference.layernorm_linear(x, weights.pre_norm.weight, weights.pre_norm.bias, shape.eps)

    def mlp(x: Tensor, block: Block | AbsorbedBlock) -> Tensor:
        hidden = reference.layernorm_linear(x, block.fc1.weight, block.fc1.bias, shape.eps, shape.activation)
        hidden = reference.normalise(hidden, shape.eps) if shape.mlp_norm else hidden
        return reference.linear_residual(hidden, block.fc2.weight, block.fc2.bias, x)

    for block in weights.blocks:
        qkv = reference.layernorm_linear(x, block.qkv.weight, block.qkv.bias, shape.eps)
        if weights.rotation is not None:
            q, k, v = qkv.unflatten(2, (3 * shape.heads, -1)).chunk(3, dim=2)
            cos, sin = weights.rotation[:, :, None].double()
            q, k = (each * cos + each.roll(shape.head_width // 2, dims=-1) * sin for each in (q, k))
            qkv = torch.cat([q, k, v], dim=2).flatten(2)
        bias = None if block.score_bias is None else block.score_bias[..., : shape.tokens]
        mixed = reference.attention(qkv, shape.heads, shape.scale, bias)
        x = mlp(reference.linear_residual(mixed, block.proj.weight, block.proj.bias, x), block)
    if last is None or head is None:
        return x
    q = reference.layernorm_linear(x[:, 0], last.q.weight, last.q.bias, shape.eps)
    u = reference.head_linear(q.unflatten(1, (shape.heads, -1)), last.key)
    normed = reference.normalise(x, shape.eps)
    scores = u @ normed.transpose(1, 2) * shape.scale
    pooled = (scores if last.score_bias is None else scores + last.score_bias).softmax(dim=-1) @ normed
    mixed = reference.head_linear(pooled, last.value).flatten(1)
    row = reference.linear_residual(mixed, last.proj.weight, last.proj.bias, x[:, 0])
    row = mlp(row, last)
    return reference.layernorm_linear(row, head.weight, head.bias, shape.eps)


def error(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    return float(difference.max())


def with_route(table: Table, route: Route) -> Table:
    def changed(kernel: str, entry: Entry) -> Entry:
        fits = {"cublas": ("layernorm_linear", "linear_residual"), "fused": ("layernorm_attention",)}
        return replace(entry, route=route) if kernel in fits[route] else entry

    kernels = {name: tuple(changed(name, e) for e in entries) for name, entries in table.kernels.items()}
    return replace(table, kernels=kernels)


def test_buckets() -> None:
    assert buckets(1) == (1,)
    assert buckets(8) == (1, 2, 4, 8)
    assert buckets(12) == (1, 2, 4, 8, 12)


@pytest.mark.parametrize("route", [None, "cublas", "fused"])
def test_every_route_computes_the_model(device: torch.device, route: Route | None) -> None:
    weights = random_weights(SHAPE, torch.float16, device)
    table = table_for(device) if route is None else with_route(table_for(device), route)
    runner = VitRunner(SHAPE, weights, batches=[2, 3], table=table)
    images = torch.randn(SHAPE.image_shape(3), device=device)
    expected = plain(SHAPE, weights, images.half())
    for count in (3, 1):
        assert error(runner(images[:count]), expected[:count].to(device)) < 5e-3
    lines = "\n".join(runner.report)
    if route == "cublas":
        assert "0/2 blocks fused" in lines
        assert "fc1 of 2 blocks: cublas in torch: cuBLASLt and a separate LayerNorm" in lines
    else:
        assert "attention: 2/2 blocks fused" in lines
        assert ("layernorm_attention" in lines) == (route == "fused")
    assert "head: fused in layernorm_linear, 10 columns" in lines


FAMILY = replace(SHAPE, pre_norm=True, score_bias=True, mlp_norm=True)


@pytest.mark.slow
@pytest.mark.parametrize("route", [None, "cublas", "fused"])
def test_a_first_norm_a_bias_and_a_norm_in_the_mlp(device: torch.device, route: Route | None) -> None:
    weights = random_weights(FAMILY, torch.float16, device)
    table = table_for(device) if route is None else with_route(table_for(device), route)
    runner = VitRunner(FAMILY, weights, batches=[2], table=table)
    images = torch.randn(FAMILY.image_shape(2), device=device)
    assert error(runner(images), plain(FAMILY, weights, images.half()).to(device)) < 5e-3
    lines = runner.report
    assert any("adds nothing to the scores" in line for line in lines), lines
    if route != "cublas":
        assert "first norm: fused in layernorm_linear" in lines
        assert any(line.startswith("MLP: 2/2 blocks fused") and "add_layernorm" in line for line in lines)
        assert any(line.startswith("attention: 1/2 blocks fused") for line in lines), lines


@pytest.mark.slow
def test_queries_and_keys_are_turned_in_torch(device: torch.device) -> None:
    shape = replace(SHAPE, rotary=True, queries=None, classes=0)
    weights = random_weights(shape, torch.float16, device)
    runner = VitRunner(shape, weights, batches=[2], readout=Tensor.float)
    images = torch.randn(shape.image_shape(2), device=device)
    assert error(runner(images), plain(shape, weights, images.half()).to(device)) < 5e-3
    assert any("rotation in torch: no fused kernel turns queries and keys" in line for line in runner.report)


@pytest.mark.slow
@pytest.mark.parametrize("bias", [False, True])
def test_what_no_kernel_takes_is_left_to_torch_and_named(device: torch.device, bias: bool) -> None:
    shape = replace(SHAPE, heads=4, score_bias=bias)  # heads of 8 columns
    weights = random_weights(shape, torch.float16, device)
    runner = VitRunner(shape, weights, batches=[2])
    images = torch.randn(shape.image_shape(2), device=device)
    assert error(runner(images), plain(shape, weights, images.half()).to(device)) < 5e-3
    assert any("scaled_dot_product_attention in torch" in line for line in runner.report), runner.report


@pytest.mark.slow
def test_an_executor_gets_every_launch(device: torch.device) -> None:
    seen: list[str] = []

    def execute(launch: Launch) -> None:
        seen.append(launch.name)
        launch.run()

    runner = VitRunner(SHAPE, random_weights(SHAPE, torch.float16, device), batches=[1], execute=execute)
    runner(torch.randn(SHAPE.image_shape(1), device=device))
    planned = [launch.name for _, launch in launches(SHAPE, torch.float16, 1, table_for(device))]
    assert seen[: len(planned)] == planned


def test_threads_share_a_runner(device: torch.device) -> None:
    """Every thread gets the result of its own images, although all go through the same buffers."""
    inside: list[int] = []

    def execute(launch: Launch) -> None:
        inside.append(threading.get_ident())
        launch.run()

    runner = VitRunner(SHAPE, random_weights(SHAPE, torch.float16, device), batches=[1], execute=execute)
    images = [torch.randn(SHAPE.image_shape(1), device=device) for _ in range(3)]
    expected = [runner(image) for image in images]
    inside.clear()
    with ThreadPoolExecutor(3) as pool:
        got = list(pool.map(runner, images))
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    turns = [thread for thread, _ in itertools.groupby(inside)]
    assert len(turns) == len(set(turns))  # nobody came between


def test_autocast_changes_nothing(device: torch.device) -> None:
    table = with_route(table_for(device), "cublas")  # with products of torch's
    weights = random_weights(SHAPE, torch.float16, device)
    images = torch.randn(SHAPE.image_shape(2), device=device)
    expected = VitRunner(SHAPE, weights, batches=[2], table=table)(images)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(VitRunner(SHAPE, weights, batches=[2], table=table)(images), expected)


@pytest.mark.gpu
def test_streams_of_the_caller() -> None:
    """Calls on several streams, none of which is waited for in between, give what one stream gives."""
    gpu = torch.device("cuda")
    runner = VitRunner(SHAPE, random_weights(SHAPE, torch.float16, gpu), batches=[8])
    images = [torch.randn(SHAPE.image_shape(8), device=gpu) for _ in range(12)]
    expected = [runner(image) for image in images]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    got = []
    for place, image in enumerate(images):
        with torch.cuda.stream(streams[place % 3]):
            got.append(runner(image))
    torch.cuda.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("route", [None, "cublas"])
def test_two_runners_on_one_gpu_run_side_by_side(route: Route | None) -> None:
    """Each on a stream of its own, one of them loaded while the other one runs in another thread."""
    gpu = torch.device("cuda")
    table = table_for(gpu) if route is None else with_route(table_for(gpu), route)
    many = [random_weights(SHAPE, torch.float16, gpu, seed) for seed in range(2)]
    images = torch.randn(SHAPE.image_shape(8), device=gpu)
    expected = [VitRunner(SHAPE, weights, batches=[8], table=table)(images) for weights in many]
    first = VitRunner(SHAPE, many[0], batches=[8], table=table)
    torch.cuda.synchronize()

    def run(runner: VitRunner) -> list[Tensor]:
        with torch.cuda.stream(torch.cuda.Stream()):
            return [runner(images) for _ in range(50)]

    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(run, first)
        second = pool.submit(VitRunner, SHAPE, many[1], batches=[8], table=table).result()
        results = [running.result(), *pool.map(run, [second])]
        again = list(pool.map(run, [first, second]))
    torch.cuda.synchronize()
    for each in (results, again):
        for got, want in zip(each, expected, strict=True):
            assert all(torch.equal(one, want) for one in got)


@pytest.mark.gpu
def test_a_runner_on_a_gpu_that_is_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    images = torch.randn(SHAPE.image_shape(2), device="cuda:0")
    one, other = (
        VitRunner(SHAPE, random_weights(SHAPE, torch.float16, f"cuda:{place}"), batches=[2])(images)
        for place in range(2)
    )
    assert (one.device.index, other.device.index, torch.cuda.current_device()) == (0, 1, 0)
    assert error(other.cpu(), one.cpu().double()) < 5e-3


def test_bad_images(device: torch.device) -> None:
    runner = VitRunner(SHAPE, random_weights(SHAPE, torch.float16, device), batches=[2])
    with pytest.raises(UnsupportedError, match="a batch of 3, and the runner was prepared for 1 to 2"):
        runner(torch.zeros(SHAPE.image_shape(3)))
    with pytest.raises(UnsupportedError, match="a batch of 0"):
        runner(torch.zeros(SHAPE.image_shape(0)))
    with pytest.raises(UnsupportedError, match=r"images must be \(3, 16, 24\) torch.float32"):
        runner(torch.zeros(SHAPE.image_shape(1), dtype=torch.float16))


@pytest.mark.slow
def test_launches_need_no_memory() -> None:
    shape = VitShape(width=1280, depth=32, heads=16, mlp_width=5120, patch=14)
    planned = launches(shape, torch.bfloat16, 256, table_for(torch.device("cpu")))
    assert len(planned) == 1 + 31 * 5 + 8
    assert all(
        value.device.type == "meta"
        for _, launch in planned
        for value in launch.arguments.values()
        if isinstance(value, Tensor)
    )
