"""timm's DINOv3 and EVA02 against what timm itself computed (recorded)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_images
from torch import Tensor

from tests.checkpoint.families.conftest import EXACT
from tests.helpers.checkpoints import edit_weights
from tests.helpers.paths import ORACLES
from vitdeploy.checkpoint.families import timm_eva
from vitdeploy.checkpoint.families.base import Foreign
from vitdeploy.checkpoint.families.timm_eva import FAMILY
from vitdeploy.checkpoint.opening import Checkpoint, open_model
from vitdeploy.checkpoint.stated import Stated
from vitdeploy.config import Rotary, ViTConfig
from vitdeploy.errors import CheckpointError, UsageError
from vitdeploy.images.preprocess import apply
from vitdeploy.model import vit
from vitdeploy.model.positions import rotation
from vitdeploy.model.reference import forward_float64
from vitdeploy.model.registry import build_reference

RECORDED = ORACLES / "timm_eva"
CASES = sorted(folder.name for folder in RECORDED.iterdir() if folder.is_dir())
LEARNED = [case for case in CASES if case.startswith("eva02")]
ARCHITECTURES: dict[str, dict[str, Any]] = json.loads((RECORDED / "architectures.json").read_text())
ULP = 1.2e-7
"""Of a float32 near 1: builds of torch may differ in the last bit of a cosine."""


def load(folder: Path, **keywords: Any) -> Checkpoint:
    opened = open_model(str(folder), **keywords)
    assert isinstance(opened, Checkpoint)
    assert opened.family == "timm_eva"
    return opened


def config_of(opened: Checkpoint) -> ViTConfig:
    assert isinstance(opened.config, ViTConfig)
    return opened.config


def run(opened: Checkpoint, pixels: Tensor, output: str | None = None) -> Tensor:
    model = build_reference(opened.config, opened.state)
    return forward_float64(model, pixels, output or opened.config.outputs[0])


def answer_of(case: str, prefix: str) -> dict[str, Tensor]:
    answer = load_file(RECORDED / case / "answer.safetensors")
    return {name: answer[f"{prefix}{name}"] for name in ("pixels", "output", "tokens", "rope")}


def at(case: str, prefix: str) -> Checkpoint:
    size = tuple(answer_of(case, prefix)["pixels"].shape[2:])
    return load(RECORDED / case, **({"image_size": size} if prefix else {}))


def rounding(case: str, prefix: str) -> tuple[float, float]:
    """How far our table of sines and cosines is from timm's, and what outputs may differ by then."""
    opened, table = at(case, prefix), answer_of(case, prefix)["rope"].double()
    halves = "dinov3" in case
    columns = table.shape[1] // 2
    order = torch.arange(columns) if halves else torch.cat([torch.arange(i, columns, 2) for i in (0, 1)])
    sin, cos = (part[:, order] for part in table.chunk(2, dim=1))
    config = config_of(opened)
    ours = [part[config.prefix_tokens :] for part in rotation(config)]
    far = max(float((one - other).abs().max()) for one, other in zip(ours, (cos, sin), strict=True))
    return far, EXACT if far == 0 else 2e-6


both = pytest.mark.parametrize("prefix", ["", "other."], ids=["own", "other"])


@both
@pytest.mark.parametrize("case", CASES)
def test_rotations_are_timms_own_numbers(case: str, prefix: str) -> None:
    assert rounding(case, prefix)[0] <= ULP


@both
@pytest.mark.parametrize("case", CASES)
def test_output_and_tokens_equal_timm(case: str, prefix: str) -> None:
    answer, opened = answer_of(case, prefix), at(case, prefix)
    tolerance = rounding(case, prefix)[1]
    if case in LEARNED and prefix:
        # The table is resampled in float32, where builds of torch may differ in the last bit.
        assert opened.state["pos_embed"].dtype == torch.float32
        tolerance = 2e-6
    torch.testing.assert_close(run(opened, answer["pixels"]), answer["output"], rtol=0, atol=tolerance)
    tokens = run(opened, answer["pixels"], "tokens")
    torch.testing.assert_close(tokens, answer["tokens"], rtol=0, atol=tolerance)
    assert (answer["output"][0] - answer["output"][1]).abs().max() > 1e-2


def test_transformers_rounds_the_same_rotation_differently() -> None:
    """Tables of DINOv3 differ by what 32 bits do."""
    config = config_of(at("dinov3", "other."))
    theirs = replace(config, rotary=Rotary("centred", 100.0))
    far = (rotation(config)[1] - rotation(theirs)[1]).abs().max()
    assert 0 < far < 1e-6


def farther(case: str) -> float:
    answer = answer_of(case, "")
    return float((run(at(case, ""), answer["pixels"], "tokens") - answer["tokens"]).abs().max())


@pytest.mark.parametrize("case", ["eva02", "eva02_apart", "registers_alone"])
def test_neighbours_taken_for_halves_are_seen(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm_eva, "_halves", lambda heads: lambda tensor: tensor)
    assert farther(case) > 1e-3


def test_halves_taken_for_neighbours_are_seen(tmp_path: Path) -> None:
    answer = answer_of("dinov3", "")
    folder = copy("dinov3", tmp_path, arguments={"rope_rotate_half": False})
    assert (run(load(folder), answer["pixels"], "tokens") - answer["tokens"]).abs().max() > 1e-3


@pytest.mark.parametrize("case", ["dinov3", "registers_alone"])
def test_registers_that_are_turned_are_seen(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def registers_too(config: ViTConfig) -> tuple[Tensor, Tensor]:
        """As if registers were the first patches."""
        prefix = int(config.cls_token)
        cos, sin = (
            torch.cat(
                [table[:prefix], table[-config.patches :][: config.registers], table[-config.patches :]]
            )
            for table in rotation(config)
        )
        return cos, sin

    monkeypatch.setattr(vit, "rotation", registers_too)
    assert farther(case) > 1e-3


def copy(case: str, tmp_path: Path, arguments: dict[str, Any] | None = None, **config: Any) -> Path:
    folder = tmp_path / case
    shutil.copytree(RECORDED / case, folder)
    content = json.loads((folder / "config.json").read_text()) | config
    content["model_args"] |= arguments or {}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def bare(case: str, tmp_path: Path, **keywords: Any) -> Checkpoint:
    shutil.copy(RECORDED / case / "model.safetensors", tmp_path / "weights.safetensors")
    opened = open_model(checkpoint=tmp_path / "weights.safetensors", **keywords)
    assert isinstance(opened, Checkpoint)
    return opened


@pytest.mark.parametrize("case", ["dinov3", "eva02"])
def test_bare_weights_tell_all_but_heads(case: str, tmp_path: Path) -> None:
    whole, opened = load(RECORDED / case), bare(case, tmp_path, image_size=(16, 16))
    assert opened.config == replace(config_of(whole), heads=1)
    assert any("heads" in note for note in opened.notes)
    assert any("timm's default, is taken" in note for note in opened.notes) == (case == "dinov3")


@pytest.mark.parametrize("case", ["dinov3", "eva02"])
def test_heads_that_the_user_states_settle_the_order_of_columns(case: str, tmp_path: Path) -> None:
    stated = bare(case, tmp_path, image_size=(16, 16), stated=Stated(heads=2))
    whole = load(RECORDED / case)
    assert stated.config == whole.config
    assert all(torch.equal(stated.state[name], tensor) for name, tensor in whole.state.items())
    with pytest.raises(UsageError, match="width 16 is not divisible by 5 heads"):
        bare(case, tmp_path, image_size=(16, 16), stated=Stated(heads=5))


def test_arguments_that_change_the_rotation_are_followed(tmp_path: Path) -> None:
    given = {"rope_temperature": 50.0, "ref_feat_shape": 7}
    assert config_of(load(copy("eva02", tmp_path, given))).rotary == Rotary("indexed", 50.0, (7, 7))
    none = copy("eva02_apart", tmp_path, {"ref_feat_shape": None})
    assert config_of(load(none)).rotary == Rotary("indexed", 10_000.0)
    hotter = copy("dinov3", tmp_path, {"rope_temperature": 50})
    assert config_of(load(hotter)).rotary == Rotary("centred_timm", 50.0)


@pytest.mark.parametrize(
    "case, arguments, architecture, message",
    [
        ("dinov3", {"qk_norm": True}, None, "timm's qk_norm True is not supported"),
        ("dinov3", {"rope_type": "mixed"}, None, "rope_type 'mixed'"),
        ("dinov3", {"attn_type": "rope"}, None, "attn_type 'rope'"),
        (
            "eva02",
            {"rope_grid_indexing": "xy", "rope_grid_offset": 1.0},
            None,
            "rope_grid_offset 1.0, rope_grid",
        ),
        ("eva02", {"use_rot_pos_emb": False}, None, "use_rot_pos_emb False"),
        ("eva02", {"global_pool": "map"}, None, "attention pooling of the patches alone"),
        ("eva02_apart", {}, "eva02_base_patch16_clip_224", "eva02_base_patch16_clip_224 \\(other rotary"),
        ("eva02_apart", {}, "vit_large_patch16_sapiens2", "sapiens2 \\(keys shared by several heads\\)"),
    ],
)
def test_what_else_the_class_can_do_is_refused_by_name(
    tmp_path: Path, case: str, arguments: dict[str, Any], architecture: str | None, message: str
) -> None:
    named = {} if architecture is None else {"architecture": architecture}
    with pytest.raises(CheckpointError, match=message):
        load(copy(case, tmp_path, arguments, **named))


@pytest.mark.parametrize("name", ["attn.norm.weight", "attn.q_norm.weight", "attn.gate.weight"])
def test_norms_and_gates_inside_attention_are_refused(tmp_path: Path, name: str) -> None:
    folder = copy("eva02_apart", tmp_path)
    edit_weights(folder, lambda state: state.update({f"blocks.{i}.{name}": torch.ones(16) for i in range(2)}))
    with pytest.raises(CheckpointError, match=f"2 unexpected .*{name}"):
        load(folder)


def named(name: str, facts: dict[str, Any]) -> Foreign:
    """A model without values, of this architecture."""
    width, rows = facts["width"], 128 if facts["gated"] else 64
    state = {
        "patch_embed.proj.weight": torch.empty(width, 3, 2, 2, device="meta"),
        "blocks.0.attn.qkv.weight": torch.empty(3 * width, width, device="meta"),
        "blocks.0.mlp.fc1.weight": torch.empty(rows, width, device="meta"),
        "blocks.0.mlp.fc2.weight": torch.empty(width, 64, device="meta"),
    }
    if facts["table"]:
        state["pos_embed"] = torch.empty(1, 4, width, device="meta")
    return Foreign(name, state, {"architecture": name, "global_pool": "avg"})


def test_every_rotary_architecture_of_timm_is_known_with_what_no_tensor_tells() -> None:
    kinds = {"RotaryEmbeddingCat": "indexed", "RotaryEmbeddingDinoV3": "centred_timm"}
    assert len(ARCHITECTURES) > 25
    for name, facts in ARCHITECTURES.items():
        foreign = named(name, facts)
        assert FAMILY.claims(foreign), name
        reading = FAMILY.read(foreign, None)
        config = reading.config
        assert isinstance(config, ViTConfig)
        grid = None if facts["grid"] is None else tuple(facts["grid"])
        assert (name, config.heads, config.norm_eps) == (name, facts["heads"], facts["norm_eps"])
        assert config.rotary == Rotary(kinds[facts["rope"]], facts["temperature"], grid)  # type: ignore[arg-type]
        assert config.activation == {"GELU": "gelu", "SiLU": "silu"}[facts["activation"]]
        rows = torch.arange(float(config.width))
        turned = reading.layout["blocks.{i}.attn.q.bias"].pick(rows)
        assert torch.equal(turned, rows) == facts["halves"]


def test_weights_as_transformers_wraps_them(tmp_path: Path) -> None:
    folder = copy("dinov3", tmp_path, model_type="timm_wrapper", architectures=["TimmWrapperModel"])
    state = load_file(folder / "model.safetensors")
    save_file({f"timm_model.{name}": tensor for name, tensor in state.items()}, folder / "model.safetensors")
    opened, plain = load(folder), load(RECORDED / "dinov3")
    assert opened.config == plain.config
    assert all(torch.equal(opened.state[name], tensor) for name, tensor in plain.state.items())


@pytest.mark.parametrize("case", CASES)
def test_a_photograph_has_the_scores_of_timms_transform_and_model(case: str) -> None:
    opened = load(RECORDED / case)
    image = Image.fromarray(load_sample_images().images[0])
    ours = run(opened, torch.from_numpy(apply(image, opened.preprocess)[None]))[0]
    theirs = load_file(RECORDED / case / "answer.safetensors")["photograph"].double()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
    if config_of(opened).classes:
        best = ours.softmax(0).topk(5), theirs.softmax(0).topk(5)
        assert best[0].indices.tolist() == best[1].indices.tolist()
        assert np.allclose(best[0].values, best[1].values, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["eva02_apart", "dinov3_gated"])
def test_exports_pass(case: str, exported: Callable[[Path, Tensor], Tensor]) -> None:
    answer = answer_of(case, "")
    given = exported(RECORDED / case, answer["pixels"])
    torch.testing.assert_close(given.double(), answer["output"], rtol=0, atol=1e-4)
