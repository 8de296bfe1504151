"""DINOv3 against transformers; what its processor makes of photographs (it needs torchvision) is recorded."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_images
from torch import Tensor

from tests.checkpoint.families.conftest import EXACT
from tests.helpers.checkpoints import edit_config, edit_weights, refusal
from tests.helpers.paths import ORACLES
from vitdeploy.checkpoint.opening import Checkpoint, open_model
from vitdeploy.checkpoint.stated import Stated
from vitdeploy.config import Preprocess, Rotary, ViTConfig
from vitdeploy.images.preprocess import apply
from vitdeploy.model import folds, rewrites, vit
from vitdeploy.model.positions import rotation
from vitdeploy.model.precision import PrecisionPlan
from vitdeploy.model.reference import forward_float64
from vitdeploy.model.registry import build_reference

Save = Callable[..., Path]
Agree = Callable[..., Checkpoint]

RECORDED = ORACLES / "dinov3"
SETTINGS: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
    "num_register_tokens": 3,
}
GATED: dict[str, Any] = {"use_gated_mlp": True, "hidden_act": "silu"}


def make(**changes: Any) -> Any:
    return transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**(SETTINGS | changes)))


def opened(folder: Path | str, **keywords: Any) -> Checkpoint:
    checkpoint = open_model(str(folder), **keywords)
    assert isinstance(checkpoint, Checkpoint)
    assert checkpoint.family == "dinov3_vit"
    return checkpoint


@pytest.mark.parametrize("output", ["features", "tokens"])
@pytest.mark.parametrize("size", [None, (24, 56)])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        GATED,
        {"key_bias": True, "rope_theta": 20.0},
        {"query_bias": False, "value_bias": False, "num_register_tokens": 0},
        {"image_size": [32, 64], "layer_norm_eps": 1e-3},
    ],
)
def test_features_and_tokens_equal_transformers(
    save: Save, agree: Agree, output: str, size: tuple[int, int] | None, changes: dict[str, Any]
) -> None:
    model = make(**changes)
    folder = save(model)
    config = agree(model, folder, size, output).config
    assert isinstance(config, ViTConfig)
    assert (config.registers, config.outputs) == (
        model.config.num_register_tokens,
        ("features", "embedding", "tokens"),
    )


def test_a_head_of_columns_that_are_no_power_of_two(save: Save, agree: Agree) -> None:
    """Where steps of 4 / 12 are not what 32 bits hold."""
    model = make(hidden_size=36)
    assert agree(model, save(model), (40, 72), "tokens").config.rotary == Rotary("centred", 100.0)


def difference(state: dict[str, Tensor], folder: Path, model: Any) -> float:
    """Between what transformers gives and the reference with these weights."""
    config = opened(folder).config
    pixels = torch.randn(2, 3, *config.image_size, dtype=torch.float64)
    with torch.inference_mode():
        theirs = model.double().eval()(pixels).last_hidden_state
    return float((forward_float64(build_reference(config, state), pixels, "tokens") - theirs).abs().max())


@pytest.mark.slow
def test_faults_are_seen(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(key_bias=True)
    folder = save(model)
    state = dict(opened(folder).state)
    assert difference(state, folder, model) <= EXACT
    # Keys without their bias, which under rotation does not cancel.
    without = {name: t * 0 if name.endswith("attn.k.bias") else t for name, t in state.items()}
    assert difference(without, folder, model) > 1e-3
    # Neighbouring columns taken for halves.
    order = torch.cat([torch.arange(0, 16, 2), torch.arange(1, 16, 2)])
    swapped = dict(state)
    for name in (n for n in state if ".attn.q." in n or ".attn.k." in n):
        swapped[name] = state[name].unflatten(0, (3, 16))[:, order].flatten(0, 1)
    assert difference(swapped, folder, model) > 1e-3

    def registers_too(config: ViTConfig) -> tuple[Tensor, Tensor]:
        """As if registers were the first patches."""
        tables = rotation(replace(config, registers=0))
        rest = config.tokens - len(tables[0])
        cos, sin = (torch.cat([table[:1], table[1 : 1 + rest], table[1:]]) for table in tables)
        return cos, sin

    monkeypatch.setattr(vit, "rotation", registers_too)
    assert difference(state, folder, model) > 1e-3


def test_a_key_bias_that_a_rewrite_drops_is_seen(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    made = opened(save(make(key_bias=True)))
    reference = build_reference(made.config, made.state)
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = forward_float64(reference, pixels, "tokens")

    def deployed() -> Tensor:
        with torch.inference_mode():
            model = rewrites.deploy(reference, PrecisionPlan.exact(), outputs=("tokens",))
            tokens: Tensor = model(pixels)
        return tokens

    assert (deployed() - expected).abs().max() < 1e-12

    def drop(block: vit.Block) -> vit.Block:
        block = folds.edited(block)
        block.attn.k.register_parameter("bias", None)
        return block

    kept = [rewrite for rewrite in folds.BLOCK_REWRITES if rewrite is not folds.drop_key_bias]
    monkeypatch.setattr(rewrites, "BLOCK_REWRITES", (*kept, drop))
    assert (deployed() - expected).abs().max() > 1e-3


def test_a_state_dict_in_memory_has_other_names(save: Save) -> None:
    model = make(**GATED)
    folder = save(model)
    from_file = opened(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    from_memory = opened(folder)
    assert any(name.startswith("model.layer.") for name in model.state_dict())
    assert from_memory.config == from_file.config
    assert all(torch.equal(from_memory.state[name], tensor) for name, tensor in from_file.state.items())


@pytest.mark.parametrize("changes", [{}, GATED, {"key_bias": True}])
def test_bare_weights_tell_all_but_heads(save: Save, changes: dict[str, Any]) -> None:
    folder = save(make(**changes))
    whole = opened(folder)
    (folder / "config.json").unlink()
    bare = open_model(checkpoint=folder / "model.safetensors", image_size=(32, 32))
    assert isinstance(bare, Checkpoint)
    assert bare.config == replace(whole.config, heads=1)
    assert any("1, as usual for width 48, is taken, and --heads settles it" in note for note in bare.notes)


@pytest.mark.slow
def test_what_config_json_leaves_out_is_as_its_class_has_it(save: Save) -> None:
    folder = save(make(hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_register_tokens=0))
    before = opened(folder)
    gone = (
        "hidden_size",
        "num_attention_heads",
        "intermediate_size",
        "num_register_tokens",
        "layer_norm_eps",
    )
    gone += ("rope_theta", "query_bias", "key_bias", "value_bias", "proj_bias", "mlp_bias", "hidden_act")
    edit_config(folder, **dict.fromkeys(gone))
    assert opened(folder).config == before.config


@pytest.mark.parametrize(
    "changes",
    [
        {"proj_bias": False},
        {"mlp_bias": False},
        {"value_bias": False},
        {"query_bias": False, "key_bias": True},
    ],
)
def test_biases_that_are_no_models_here_are_refused(save: Save, changes: dict[str, Any]) -> None:
    error = refusal(str(save(make(**changes))))
    stated = {"query_bias": True, "key_bias": False, "proj_bias": True, **changes}
    for name, value in stated.items():
        assert f"{name} {json.dumps(value)}" in error.message
    assert "are not supported together" in error.message


def test_an_adapter_is_merged(save: Save, tmp_path: Path) -> None:
    """PEFT names layers as they are in memory."""
    folder = save(make())
    adapter, layer = tmp_path / "adapter", "model.layer.1.attention.k_proj"
    adapter.mkdir()
    a, b = torch.randn(2, 48), torch.randn(48, 2)
    parts = {f"base_model.model.{layer}.lora_A.weight": a, f"base_model.model.{layer}.lora_B.weight": b}
    save_file(parts, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "base_model_name_or_path": str(folder)}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    merged, base = opened(adapter).state, opened(folder).state
    expected = base["blocks.1.attn.k.weight"].double() + 3 * b.double() @ a.double()
    torch.testing.assert_close(merged["blocks.1.attn.k.weight"], expected, rtol=0, atol=1e-12)
    assert torch.equal(merged["blocks.0.attn.k.weight"], base["blocks.0.attn.k.weight"])


def test_registers_must_be_there_as_config_json_says(save: Save) -> None:
    folder = save(make())
    edit_config(folder, num_register_tokens=0)
    assert "unexpected (embeddings.register_tokens)" in refusal(str(folder)).message
    edit_config(folder, num_register_tokens=3)
    edit_weights(folder, lambda state: state.update({"embeddings.register_tokens": torch.zeros(1, 0, 48)}))
    assert "missing (embeddings.register_tokens)" in refusal(str(folder)).message


def test_photographs_give_the_features_of_processor_and_model_together() -> None:
    answer = load_file(RECORDED / "answer.safetensors")
    made = opened(RECORDED)
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    pixels = torch.from_numpy(np.stack([apply(image, made.preprocess) for image in photographs]))
    # torchvision resizes in float32, and so does Pillow here.
    torch.testing.assert_close(pixels, answer["pixels"], rtol=0, atol=1e-5)
    features = forward_float64(build_reference(made.config, made.state), pixels, "features")
    torch.testing.assert_close(features.float(), answer["features"], rtol=0, atol=1e-3)
    assert (answer["features"][0] - answer["features"][1]).abs().max() > 1e-2
    preset = Stated(preprocess="dinov3").prepare(Preprocess(size=(32, 32), exif=True))[0]
    assert preset == made.preprocess
    rounded = replace(made.preprocess, resample="bilinear")
    worse = np.stack([apply(image, rounded) for image in photographs]) - answer["pixels"].numpy()
    assert np.abs(worse).max() > 1e-3


def test_without_a_processors_file_preprocessing_is_that_of_published_models(save: Save) -> None:
    folder = save(make(image_size=224, patch_size=32))
    made = opened(folder)
    assert any("preprocessing is that of published dinov3_vit models" in note for note in made.notes)
    (folder / "preprocessor_config.json").write_text(
        '{"image_processor_type": "DINOv3ViTImageProcessorFast"}'
    )
    assert opened(folder).preprocess == made.preprocess
    assert (made.preprocess.resample, made.preprocess.resize) == ("bilinear_float", "exact")


@pytest.mark.slow
def test_exports_pass_and_their_graph_is_small(
    save: Save, exported: Callable[[Path, Tensor], Tensor], tmp_path: Path
) -> None:
    folder = save(make(), spread=0.1)
    made = opened(folder)
    pixels = torch.randn(2, 3, 32, 32)
    expected = forward_float64(build_reference(made.config, made.state), pixels, "features")
    torch.testing.assert_close(exported(folder, pixels).double(), expected, rtol=0, atol=1e-4)
    for name in ("model.onnx", "model.fp16.onnx"):
        graph = onnx.load(tmp_path / "out.bundle" / name).graph
        blocks = Counter(
            node.name.split("/")[0].split(".")[1] for node in graph.node if node.name[:7] == "blocks."
        )
        assert set(blocks) == {"0", "1"}
        assert max(blocks.values()) <= 32
        assert {"Shape", "If", "Tile", "Loop"}.isdisjoint(node.op_type for node in graph.node)
