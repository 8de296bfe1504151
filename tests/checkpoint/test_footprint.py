"""A resolution that no memory holds is refused before any is taken; one that fits is not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.helpers.commands import Run, in_this_process
from vitdeploy.checkpoint import footprint
from vitdeploy.config import ViTConfig
from vitdeploy.errors import UsageError
from vitdeploy.variants import decode_variant

GB = 10**9


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return lambda *arguments: in_this_process(capsys, *arguments)


def with_memory(monkeypatch: pytest.MonkeyPatch, count: int | None) -> None:
    monkeypatch.setattr(footprint, "total_memory", lambda: count)


def test_attention_of_all_golden_images_is_counted() -> None:
    base = decode_variant("B/16")
    # 8 images, 12 heads, 197 x 197 pairs, before and behind the softmax; 197 tokens in and out; 8 bytes each.
    assert footprint.needed_bytes(base) == 8 * 8 * (12 * 197 * 197 * 2 + 2 * 197 * 768)


@pytest.mark.slow
def test_the_count_is_what_pytorch_takes() -> None:
    """Held against the allocations that PyTorch itself records."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from vitdeploy.bundle.golden import GOLDEN_NAMES
    from vitdeploy.checkpoint.opening import random_state
    from vitdeploy.model.reference import forward_float64
    from vitdeploy.model.registry import build_reference

    config = ViTConfig(
        image_size=(160, 160), patch_size=8, width=32, depth=1, heads=4, mlp_width=64, classes=3
    )
    model = build_reference(config, random_state(config, 0))
    pixels = torch.zeros(len(GOLDEN_NAMES), 3, 160, 160)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        forward_float64(model, pixels)
    held = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    needed = footprint.needed_bytes(config)
    assert needed <= peak <= 2 * needed


@pytest.mark.slow
@pytest.mark.parametrize("name, size", [("B/16", 32000), ("H/14", 14000), ("Ti/16", 16000)])
def test_too_large_a_resolution(name: str, size: int, run: Run, tmp_path: Path) -> None:
    """On the machine as it is: the command ends at once instead of being killed."""
    for flags in (["--dry-run"], []):
        result = run("export", "-m", name, "--image-size", size, "-o", tmp_path / "x.bundle", *flags)
        assert (result.code, result.out) == (2, "")
        error, hint = result.err.splitlines()
        assert f"at {size}x{size} pixels the float64 reference takes" in error
        assert "TB at the least" in error
        assert hint.startswith("hint: ")
    assert list(tmp_path.iterdir()) == []


def test_the_size_that_the_hint_names_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    large = decode_variant("L/14").at_size((1400, 1400))
    with_memory(monkeypatch, 16 * GB)
    with pytest.raises(UsageError, match="and this machine has 16 GB") as caught:
        footprint.require_memory(large)
    size = int(str(caught.value.hint).split()[1])
    footprint.require_memory(large.at_size((size, size)))
    with_memory(monkeypatch, 4 * GB)  # with room for the artifacts in their largest batch
    footprint.require_memory(large.at_size((size, size)))
    with pytest.raises(UsageError):
        footprint.require_memory(large.at_size((size + 14, size + 14)))


def test_nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, 10)
    with pytest.raises(UsageError) as caught:
        footprint.require_memory(decode_variant("B/16"))
    assert caught.value.hint == "export it on a machine with more memory"


def test_a_machine_that_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, None)
    footprint.require_memory(dataclasses.replace(decode_variant("B/16"), image_size=(16000, 16000)))


@pytest.mark.slow
def test_a_batch_that_no_memory_holds(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitdeploy.exporter.subject.total_memory", lambda: 64 * GB)
    result = run("export", "-m", "Ti/16", "--batch", "1,200000,200000", "-o", tmp_path / "x")
    assert (result.code, result.out) == (2, "")
    error = result.err.splitlines()[-2:]
    assert "a batch of 200000 images is 120 GB of pixels" in error[0]
    assert error[1] == "hint: --batch 1,1024,1024"
    result = run("export", "-m", "digits", *error[1].split()[1:], "--dry-run", "-o", tmp_path / "x")
    assert result.code == 0
    assert "at once" not in result.err
    result = run("export", "-m", "digits", "--batch", "1,8,100000", "--dry-run", "-o", tmp_path / "x")
    assert result.code == 0
    assert "note: every artifact is proven with 100000 images at once" in result.err
    assert list(tmp_path.iterdir()) == []
