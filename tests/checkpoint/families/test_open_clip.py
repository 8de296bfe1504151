from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.checkpoints import opened, refusal
from tests.helpers.paths import ORACLES
from vitdeploy.checkpoint.opening import Checkpoint
from vitdeploy.checkpoint.stated import Stated
from vitdeploy.images.preprocess import apply
from vitdeploy.model.reference import outputs_float64
from vitdeploy.model.registry import build_reference

RECORDED = ORACLES / "open_clip"
TOWERS, TRUNKS = ("clip", "quick_gelu", "clipa"), ("siglip", "projected_trunk", "trunk_with_head")
WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
SIZES = [(16, 16), (24, 12), (8, 32)]


def recorded(case: str, size: tuple[int, int]) -> dict[str, Tensor]:
    """Pixels and outputs of this size."""
    start = f"{size[0]}x{size[1]}."
    answers = load_file(RECORDED / case / "answer.safetensors")
    return {name.removeprefix(start): t for name, t in answers.items() if name.startswith(start)}


def run(model: Checkpoint, pixels: Tensor) -> dict[str, Tensor]:
    found = outputs_float64(
        build_reference(model.config, model.state), pixels, ("embedding", "features", "tokens")
    )
    if model.family == "open_clip":  # whose tokens are the patches alone
        found["tokens"] = found["tokens"][:, 1:]
    return found


def copy(case: str, tmp_path: Path, *, vision: dict[str, Any] | None = None, **model: Any) -> Path:
    """A recorded folder with other settings of its model."""
    folder = tmp_path / case
    shutil.copytree(RECORDED / case, folder)
    content = json.loads((folder / CONFIG).read_text())
    content["model_cfg"] |= model
    content["model_cfg"]["vision_cfg"] |= vision or {}
    (folder / CONFIG).write_text(json.dumps(content))
    return folder


def edit(folder: Path, change: Any) -> None:
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*TOWERS, *TRUNKS])
@pytest.mark.parametrize("size", SIZES)
def test_outputs_equal_open_clip(case: str, size: tuple[int, int]) -> None:
    # Of a trunk's heads, timm's name for it tells; these are narrower than what bears it.
    heads = Stated(heads=2) if case in TRUNKS else None
    model = opened(str(RECORDED / case), image_size=size, stated=heads)
    assert model.family == ("open_clip" if case in TOWERS else "open_clip_timm")
    answer = recorded(case, size)
    # A table for another size is resampled in float32, where builds of torch may differ in the last bit.
    own = size == (16, 16) or (size == (8, 32) and case in TOWERS)
    for name, found in run(model, answer["pixels"]).items():
        torch.testing.assert_close(found, answer[name], rtol=0, atol=1e-10 if own else 2e-6, msg=name)
        assert (answer[name][0] - answer[name][1]).abs().max() > 1e-2
    assert any("the text model of the checkpoint is left out" in note for note in model.notes)
    assert model.preprocess.size == size


def test_a_table_of_as_many_rows_stays_as_it_is() -> None:
    """open_clip counts rows: that of 4x4 patches serves 2x8, in the order in which it lies."""
    table = load_file(RECORDED / "clip" / WEIGHTS)["visual.positional_embedding"]
    assert torch.equal(opened(str(RECORDED / "clip"), image_size=(8, 32)).state["pos_embed"], table)


@pytest.mark.parametrize(
    "case,activation", [("clip", "gelu"), ("quick_gelu", "quick_gelu"), ("clipa", "gelu_tanh")]
)
def test_the_activation_is_what_the_configuration_says(case: str, activation: str) -> None:
    assert opened(str(RECORDED / case)).config.activation == activation


@pytest.mark.slow
def test_another_activation_is_seen(tmp_path: Path) -> None:
    answer = recorded("quick_gelu", (16, 16))
    wrong = run(opened(str(copy("quick_gelu", tmp_path, quick_gelu=False))), answer["pixels"])
    assert all((found - answer[name]).abs().max() > 1e-3 for name, found in wrong.items())


@pytest.mark.parametrize("case", ["clip", "siglip"])
def test_a_file_alone(case: str, tmp_path: Path) -> None:
    """Nothing tells the activation then; that of timm's models is as usual, too."""
    described = opened(str(RECORDED / case))
    shutil.copy(RECORDED / case / WEIGHTS, tmp_path / "epoch_1.safetensors")
    alone = opened(checkpoint=tmp_path / "epoch_1.safetensors")
    told = {"heads": 1, "activation": "gelu"}  # of 16 columns
    assert vars(alone.config) == vars(described.config) | told
    assert any("--heads settles it" in note for note in alone.notes)
    assert any("preprocessing is that of OpenAI's CLIP" in note for note in alone.notes)
    if case == "clip":
        assert any("--activation quick_gelu" in note for note in alone.notes)


def test_names_and_openais_own_files_mean_quick_gelu(tmp_path: Path) -> None:
    state = load_file(RECORDED / "clip" / WEIGHTS)
    save_file(state, tmp_path / "ViT-B-32-quickgelu.safetensors")
    numbers = {"input_resolution": 16, "context_length": 6, "vocab_size": 20}
    openai = {name: tensor.half() for name, tensor in state.items()}
    torch.save(openai | {name: torch.tensor(n) for name, n in numbers.items()}, tmp_path / "ViT-B-32.pt")
    for name in ("ViT-B-32-quickgelu.safetensors", "ViT-B-32.pt"):
        assert opened(checkpoint=tmp_path / name).config.activation == "quick_gelu"


@pytest.mark.slow
def test_an_image_tower_that_was_saved_alone(tmp_path: Path) -> None:
    whole = opened(str(RECORDED / "clip"))
    state = load_file(RECORDED / "clip" / WEIGHTS)
    names = {n.removeprefix("visual."): tensor for n, tensor in state.items() if n.startswith("visual.")}
    for start in ("", "module.", "visual."):
        save_file({f"{start}{name}": tensor for name, tensor in names.items()}, tmp_path / "a.safetensors")
        alone = opened(checkpoint=tmp_path / "a.safetensors")
        assert all(torch.equal(alone.state[name], tensor) for name, tensor in whole.state.items())


def test_a_trunk_that_was_saved_alone_keeps_its_configuration(tmp_path: Path) -> None:
    whole = opened(str(RECORDED / "siglip"))
    folder = copy("siglip", tmp_path)

    def alone(state: dict[str, Tensor]) -> None:
        for name in [name for name in state if not name.startswith("visual.")]:
            del state[name]

    edit(folder, alone)
    found = opened(str(folder))
    assert (found.family, found.config) == ("open_clip_timm", whole.config)
    assert found.config.activation == "gelu_tanh"


def test_pickles_and_training_files(tmp_path: Path) -> None:
    folder = copy("clip", tmp_path)
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    assert opened(str(folder)).config == opened(str(RECORDED / "clip")).config
    training = {"epoch": 3, "name": "run", "state_dict": {f"module.{name}": t for name, t in state.items()}}
    torch.save(training, tmp_path / "epoch_3.pt")
    assert opened(checkpoint=tmp_path / "epoch_3.pt").family == "open_clip"


def test_another_config_beside_it_is_about_another_file(tmp_path: Path) -> None:
    """Repositories of the hub have transformers' model and open_clip's side by side."""
    folder = copy("clip", tmp_path)
    (folder / "config.json").write_text('{"model_type": "clip", "vision_config": {}}')
    found = opened(checkpoint=folder / WEIGHTS)
    assert found.family == "open_clip"
    assert {WEIGHTS, CONFIG} == found.provenance.keys()


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pixels_equal_those_of_open_clip(tmp_path: Path, mode: str, interpolation: str) -> None:
    record = load_file(RECORDED / "preprocess.safetensors")
    folder = copy("clip", tmp_path)
    content = json.loads((folder / CONFIG).read_text())
    content["preprocess_cfg"] |= {"resize_mode": mode, "interpolation": interpolation}
    (folder / CONFIG).write_text(json.dumps(content))
    pixels = apply(Image.fromarray(record["picture"].numpy()), opened(str(folder)).preprocess)
    np.testing.assert_allclose(pixels, record[f"{mode}.{interpolation}"].numpy(), atol=1e-6)


@pytest.mark.parametrize(
    "vision,message",
    [
        ({"attentional_pool": True}, "attentional_pool True"),
        ({"qk_norm": True, "scale_fc": True}, "qk_norm True, scale_fc True"),
        ({"pool_type": "none"}, "pool_type 'none'"),
        ({"act_kwargs": {"approximate": "sigmoid"}}, "'sigmoid'"),
        ({"head_width": 0}, "head_width is 0"),
        ({"head_width": "wide"}, "head_width must be a whole number"),
        ({"image_size": 18}, "open_clip feeds 18x18 pixels, of which patches of 4 use 16x16"),
    ],
)
def test_settings_that_are_refused(tmp_path: Path, vision: dict[str, Any], message: str) -> None:
    assert message in refusal(str(copy("clip", tmp_path, vision=vision))).message


def test_ways_to_resize_that_are_none(tmp_path: Path) -> None:
    folder = copy("clip", tmp_path)
    content = json.loads((folder / CONFIG).read_text())
    content["preprocess_cfg"]["resize_mode"] = "stretch"
    (folder / CONFIG).write_text(json.dumps(content))
    assert "resize_mode 'stretch' is none of shortest" in refusal(str(folder)).message


def test_towers_that_are_no_vits(tmp_path: Path) -> None:
    trunk = copy("projected_trunk", tmp_path, vision={"timm_model_name": "convnext_base"})
    edit(
        trunk, lambda state: state.update({"visual.trunk.stem.0.weight": state.pop("visual.trunk.pos_embed")})
    )
    edit(trunk, lambda state: state.pop("visual.trunk.patch_embed.proj.weight"))
    assert "its image tower is of timm 'convnext_base', and no plain ViT" in refusal(str(trunk)).message
    rotary = copy("siglip", tmp_path, vision={"timm_model_name": "vit_pe_core_base_patch16_224"})
    assert "timm's architecture vit_pe_core_base_patch16_224" in refusal(str(rotary)).message
    resnet = tmp_path / "resnet"
    resnet.mkdir()
    names = ("visual.layer1.0.conv1.weight", "visual.attnpool.c_proj.weight", "logit_scale")
    save_file({name: torch.ones(1) for name in names}, resnet / WEIGHTS)
    assert "it looks like CLIP with a ResNet" in refusal(str(resnet)).message


def test_a_projection_with_a_bias_is_refused(tmp_path: Path) -> None:
    folder = copy("trunk_with_head", tmp_path)
    edit(folder, lambda state: state["visual.trunk.head.bias"].add_(1))
    assert "a projection with a bias (visual.trunk.head.bias)" in refusal(str(folder)).message


@pytest.mark.parametrize(
    "case,lost",
    [
        ("clip", "visual.ln_pre.weight"),
        ("clip", "visual.transformer.resblocks.1.ln_1.bias"),
        ("siglip", "visual.trunk.attn_pool.latent"),
        ("siglip", "visual.trunk.blocks.1.norm1.bias"),
    ],
)
def test_what_is_missing_is_named_as_the_file_names_it(tmp_path: Path, case: str, lost: str) -> None:
    folder = copy(case, tmp_path)
    edit(folder, lambda state: state.pop(lost))
    assert f"1 missing ({lost})" in refusal(str(folder)).message
