"""BEiT against transformers: logits, codes, features and tokens, and tables of positions at other sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitdeploy.checkpoint.opening import Checkpoint, open_model
from vitdeploy.errors import CheckpointError
from vitdeploy.model.reference import forward_float64
from vitdeploy.model.registry import build_reference

Save = Callable[..., Path]
Agree = Callable[..., Checkpoint]
SHARED: dict[str, Any] = {"use_shared_relative_position_bias": True}
EACH: dict[str, Any] = {"use_relative_position_bias": True}
ABSOLUTE: dict[str, Any] = {"use_absolute_position_embeddings": True}


def tiny(**changes: Any) -> transformers.BeitConfig:
    settings: dict[str, Any] = {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 80,
        "image_size": 32,
        "patch_size": 8,
        "num_labels": 7,
    }
    return transformers.BeitConfig(**(settings | changes))


def classifier(**changes: Any) -> Any:
    return transformers.BeitForImageClassification(tiny(**changes))


def masked(**changes: Any) -> Any:
    """As the published models of the pre-training are."""
    return transformers.BeitForMaskedImageModeling(
        tiny(**{"vocab_size": 30, "use_mask_token": True, **SHARED, **changes})
    )


@pytest.mark.slow
@pytest.mark.parametrize("size", [None, (48, 16)])
@pytest.mark.parametrize(
    "changes",
    [
        EACH,
        SHARED,
        ABSOLUTE,
        EACH | ABSOLUTE,
        EACH | {"image_size": [24, 48], "num_channels": 1},
        EACH | ABSOLUTE | {"image_size": [32, 128]},
        EACH | {"use_mean_pooling": False, "layer_scale_init_value": 0.0, "hidden_act": "quick_gelu"},
    ],
)
def test_logits_equal_transformers(
    save: Save, agree: Agree, changes: dict[str, Any], size: tuple[int, int] | None
) -> None:
    model = classifier(**changes)
    opened = agree(model, save(model), size)
    assert (opened.family, opened.config.key_bias) == ("beit", False)
    assert opened.config.pool == ("mean" if changes.get("use_mean_pooling", True) else "cls")


@pytest.mark.slow
@pytest.mark.parametrize("size", [(64, 64), (16, 16), (24, 56)])
def test_resized_tables_equal_transformers(save: Save, agree: Agree, size: tuple[int, int]) -> None:
    model = classifier(**SHARED, **ABSOLUTE)
    opened = agree(model, save(model), size)
    assert opened.preprocess.size == size
    assert {opened.state[name].dtype for name in ("pos_embed", "blocks.2.attn.score_bias")} == {torch.float64}
    assert any("interpolated from 32x32" in note for note in opened.notes)


@pytest.mark.slow
@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("size", [None, (24, 40)])
def test_tokens_and_features_are_those_of_a_model_without_head(
    save: Save, agree: Agree, mean: bool, size: tuple[int, int] | None
) -> None:
    model = transformers.BeitModel(tiny(**EACH, use_mean_pooling=mean))
    folder = save(model)
    opened = agree(model, folder, size, output="tokens")
    assert agree(model, folder, size, output="features").config.classes == 0
    assert opened.config.final_norm == ("pooled" if mean else "tokens")


@pytest.mark.parametrize("changes", [{}, {"image_size": [24, 48]}, ABSOLUTE])
@pytest.mark.parametrize("size", [None, (48, 24)])
def test_codes_equal_transformers(
    save: Save, agree: Agree, changes: dict[str, Any], size: tuple[int, int] | None
) -> None:

    model = masked(**changes)
    opened = agree(model, save(model), size, output="codes")
    assert opened.config.outputs == ("codes", "features", "embedding", "tokens")
    assert opened.config.output_shape("codes") == (opened.config.patches, 30)


@pytest.mark.parametrize("make", [classifier, masked])
@pytest.mark.parametrize("table", [EACH, SHARED])
def test_state_dict_in_memory_has_other_names(
    save: Save, make: Callable[..., Any], table: dict[str, Any]
) -> None:
    neither = dict.fromkeys((*EACH, *SHARED), False)
    model = make(**{**neither, **table, **ABSOLUTE})
    folder = save(model)
    from_file = open_model(str(folder))
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    from_memory = open_model(str(folder))
    assert isinstance(from_file, Checkpoint)
    assert isinstance(from_memory, Checkpoint)
    assert from_memory.config == from_file.config
    assert all(torch.equal(from_memory.state[name], tensor) for name, tensor in from_file.state.items())


@pytest.mark.slow
def test_weights_alone_need_a_variant(save: Save) -> None:
    config = tiny(
        hidden_size=192, num_attention_heads=3, intermediate_size=768, num_hidden_layers=12, **SHARED
    )
    folder = save(transformers.BeitForImageClassification(config))
    whole = open_model(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_model(checkpoint=folder / "model.safetensors")
    alone = open_model("vit_tiny_patch8_32", checkpoint=folder / "model.safetensors")
    assert isinstance(whole, Checkpoint)
    assert isinstance(alone, Checkpoint)
    assert alone.config == whole.config


def test_indices_of_elder_files_are_not_needed(save: Save) -> None:
    folder = save(classifier(**EACH))
    state = load_file(folder / "model.safetensors")
    place = "beit.encoder.layer.0.attention.attention.relative_position_bias.relative_position_index"
    save_file(state | {place: torch.zeros(17, 17, dtype=torch.int64)}, folder / "model.safetensors")
    assert isinstance(open_model(str(folder)), Checkpoint)


def test_blocks_have_a_shared_table_each_to_themselves(save: Save) -> None:
    opened = open_model(str(save(classifier(**SHARED))))
    assert isinstance(opened, Checkpoint)
    tables = [opened.state[f"blocks.{i}.attn.score_bias"] for i in range(3)]
    assert len({table.data_ptr() for table in tables}) == 3
    assert torch.equal(tables[0], tables[2])


def test_two_final_norms_are_refused(save: Save) -> None:
    with pytest.raises(CheckpointError, match="two final norms in a row"):
        open_model(str(save(masked(use_mean_pooling=False))))


@pytest.mark.parametrize(
    "lost, told",
    [
        ("beit.pooler.layernorm.", "pooler.layernorm.weight"),
        ("beit.encoder.layer.1.lambda_2", "beit.encoder.layer.1.lambda_2"),
        ("beit.encoder.relative_position_bias.", "beit.encoder.relative_position_bias"),
    ],
)
def test_what_is_missing_is_named_as_files_name_it(save: Save, lost: str, told: str) -> None:
    folder = save(classifier(**SHARED))
    state = load_file(folder / "model.safetensors")
    save_file({k: t for k, t in state.items() if not k.startswith(lost)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="missing") as caught:
        open_model(str(folder))
    assert told in caught.value.message


def reversed_offsets(table: Tensor) -> Tensor:
    """As if a bias were of key and query, not of query and key."""
    return torch.cat([table[:-3].flip(0), table[[-2, -3, -1]]])


def test_a_transposed_table_is_noticed(save: Save, agree: Agree) -> None:
    model = classifier(**EACH)
    opened = agree(model, save(model))
    names = [name for name in opened.state if name.endswith("score_bias")]
    wrong = {name: reversed_offsets(opened.state[name]) for name in names}
    assert len(names) == 3
    assert _differs(opened, wrong) > 1e-3


def test_a_shared_table_in_one_block_only_is_noticed(save: Save, agree: Agree) -> None:
    model = classifier(**SHARED)
    opened = agree(model, save(model))
    names = [f"blocks.{i}.attn.score_bias" for i in (1, 2)]
    assert _differs(opened, {name: torch.zeros_like(opened.state[name]) for name in names}) > 1e-3


@pytest.mark.slow
def test_a_table_as_it_lies_in_the_file_is_noticed_at_a_size_that_is_not_square(
    save: Save, agree: Agree
) -> None:
    """transformers takes its rows for its columns, at its own size too."""
    model = classifier(**EACH, image_size=[24, 48])
    opened = agree(model, save(model))
    table = "relative_position_bias.relative_position_bias_table"
    in_file = model.float().state_dict()
    assert "positions interpolated at their own 24x48 pixels, as beit does" in opened.notes
    plain = {f"blocks.{i}.attn.score_bias": in_file[f"beit.layers.{i}.{table}"] for i in range(3)}
    assert _differs(opened, plain) > 1e-3


def _differs(opened: Checkpoint, wrong: dict[str, Tensor]) -> float:
    pixels = torch.randn(2, opened.config.channels, *opened.config.image_size, dtype=torch.float64)
    faulty = replace(opened, state={**opened.state, **wrong})
    a, b = (forward_float64(build_reference(c.config, c.state), pixels) for c in (opened, faulty))
    return float((a - b).abs().max())


def test_photographs_are_seen_as_by_transformers(save: Save, seen_alike: Callable[..., None]) -> None:
    model = classifier(**EACH)
    processor = transformers.BeitImageProcessorPil(size={"height": 32, "width": 32})
    seen_alike(model, processor, save(model), "logits")


@pytest.mark.slow
@pytest.mark.parametrize("make", [classifier, masked])
def test_an_export_computes_the_same(
    save: Save, exported: Callable[[Path, Tensor], Tensor], make: Callable[..., Any]
) -> None:
    model = make(**SHARED)
    pixels = torch.randn(2, 3, 32, 32)
    answer = exported(save(model), pixels)
    with torch.inference_mode():
        theirs = model.double()(pixels.double()).logits
    assert answer.shape == theirs.shape
    assert torch.linalg.vector_norm(answer - theirs) <= 1e-4 * torch.linalg.vector_norm(theirs)
