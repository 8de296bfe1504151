"""timm's Swin Transformers against what timm itself computed (recorded), and the authors' files."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.checkpoint.families.conftest import EXACT
from tests.helpers.checkpoints import edit_weights
from tests.helpers.paths import ORACLES
from vitdeploy.checkpoint.families.base import Foreign
from vitdeploy.checkpoint.families.positions import PositionRule
from vitdeploy.checkpoint.families.timm_swin import FAMILY
from vitdeploy.checkpoint.opening import Checkpoint, open_model
from vitdeploy.config import SwinConfig
from vitdeploy.errors import CheckpointError
from vitdeploy.model import swin
from vitdeploy.model.reference import forward_float64
from vitdeploy.model.registry import build_reference, parameter_count

RECORDED = ORACLES / "timm_swin"
CASES = sorted(folder.name for folder in RECORDED.iterdir() if folder.is_dir())
ARCHITECTURES: dict[str, dict[str, Any]] = json.loads((RECORDED / "architectures.json").read_text())
LOOK_ALIKES: list[str] = json.loads((RECORDED / "look_alikes.json").read_text())


def load(folder: Path, **keywords: Any) -> Checkpoint:
    opened = open_model(str(folder), **keywords)
    assert isinstance(opened, Checkpoint)
    assert opened.family == "timm_swin"
    return opened


def config_of(opened: Checkpoint) -> SwinConfig:
    assert isinstance(opened.config, SwinConfig)
    return opened.config


def run(opened: Checkpoint, pixels: Tensor) -> Tensor:
    return forward_float64(build_reference(opened.config, opened.state), pixels)


def answers(case: str) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
    """Images and timm's outputs for them, by the images' size."""
    found = load_file(RECORDED / case / "answer.safetensors")
    sizes = [tuple(map(int, name.split(".")[0].split("x"))) for name in found if name.endswith(".pixels")]
    return {(h, w): (found[f"{h}x{w}.pixels"], found[f"{h}x{w}.output"]) for h, w in sizes}


EVERY = [(case, size) for case in CASES for size in answers(case)]
RESIZED = [("v1", (8, 8)), ("v1", (8, 40)), ("v1_small", (32, 32))]
"""Where windows are of another size than in the checkpoint."""
every = pytest.mark.parametrize("case, size", EVERY, ids=[f"{case}-{h}x{w}" for case, (h, w) in EVERY])


def distance(case: str, size: tuple[int, int], opened: Checkpoint) -> float:
    pixels, output = answers(case)[size]
    return float((run(opened, pixels) - output).abs().max())


@pytest.mark.slow
@every
def test_output_equals_timm(case: str, size: tuple[int, int]) -> None:
    """Sizes that are not square, that windows do not divide, and that are smaller than a window."""
    _, output = answers(case)[size]
    own, opened = load(RECORDED / case), load(RECORDED / case, image_size=size)
    # timm resizes tables in float32; nothing else may differ.
    resized = any(
        opened.state[name] is not tensor and not torch.equal(opened.state[name], tensor)
        for name, tensor in own.state.items()
    )
    assert resized == ((case, size) in RESIZED)
    assert distance(case, size, opened) <= (2e-6 if resized else EXACT)
    assert (output[0] - output[1]).abs().max() > 1e-2


PLANTED = {
    "padding": {"pad_first": True},
    "shift": {"shifts": ((1, 1), (2, 2))},
    "mask": {"mask": 0.0},
    "windows": {"windows": ((4, 4), (4, 3))},
    "rule": {"window_rule": "square"},
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", PLANTED)
def test_what_timm_does_otherwise_is_seen(fault: str) -> None:
    """Every difference from transformers, and every number of the windows, shows in what is recorded."""
    size = (8, 40) if fault == "rule" else (40, 52)
    for case in ("v1", "v2") if fault not in ("rule", "windows") else ("v2",):
        opened = load(RECORDED / case, image_size=size)
        assert distance(case, size, opened) <= EXACT
        wrong = replace(opened, config=replace(config_of(opened), **PLANTED[fault]))
        assert distance(case, size, wrong) > 1e-4, case


def test_the_plain_interpolation_is_not_timms() -> None:
    own, opened = load(RECORDED / "v1"), load(RECORDED / "v1", image_size=(8, 8))
    plain = PositionRule().fit(own.state, own.config, (8, 8))
    assert plain
    assert distance("v1", (8, 8), replace(opened, state={**opened.state, **plain})) > 1e-4


def test_the_windows_of_the_training_are_seen() -> None:
    opened = load(RECORDED / "v2_fine_tuned")
    assert config_of(opened).pretrained_windows == ((3, 3), (2, 2))
    wrong = replace(opened, config=replace(config_of(opened), pretrained_windows=()))
    assert distance("v2_fine_tuned", (32, 32), wrong) > 1e-4


def copy(case: str, tmp_path: Path, arguments: dict[str, Any] | None = None, **config: Any) -> Path:
    folder = tmp_path / case
    shutil.copytree(RECORDED / case, folder)
    content = json.loads((folder / "config.json").read_text()) | config
    content["model_args"] |= arguments or {}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def authors(case: str) -> dict[str, Tensor]:
    """The tensors as the authors' files have them: merging at the end of a stage, the head without ``fc``."""
    state = {}
    for name, tensor in load_file(RECORDED / case / "model.safetensors").items():
        name = re.sub(r"layers\.(\d+)\.down", lambda match: f"layers.{int(match[1]) - 1}.down", name)
        state[name.replace("head.fc", "head")] = tensor
    return state


def buffers(opened: Checkpoint) -> dict[str, Tensor]:
    """What they keep beside: masks, and where offsets lie."""
    config, state = config_of(opened), {}
    for stage, block in config.blocks:
        window, place = config.window(stage), f"layers.{stage}.blocks.{block}"
        state[f"{place}.attn.relative_position_index"] = swin.offsets_of(window)
        if config.version == 2:
            measure = config.pretrained_windows[stage] if config.pretrained_windows else window
            table = swin.log_offsets(window, measure)
            sides = [2 * side - 1 for side in window]
            state[f"{place}.attn.relative_coords_table"] = table.reshape(1, *sides, 2)
        if config.shift(stage, block) != (0, 0):
            mask = swin.mask_of(config.padded(stage), window, config.shift(stage, block), -100.0)
            state[f"{place}.attn_mask"] = mask.float()
    return state


@pytest.mark.parametrize("case", ["v1", "v2", "v2_fine_tuned"])
def test_the_authors_files_tell_all(case: str, tmp_path: Path) -> None:
    described = load(RECORDED / case)
    torch.save({"model": authors(case) | buffers(described)}, tmp_path / "swin.pth")
    opened = open_model(checkpoint=tmp_path / "swin.pth")
    assert isinstance(opened, Checkpoint)
    assert (opened.family, opened.preprocess) == ("timm_swin", described.preprocess)
    assert {name: tensor.tolist() for name, tensor in opened.state.items()} == {
        name: tensor.tolist() for name, tensor in described.state.items()
    }
    assert opened.config == described.config
    assert not any("image size" in note for note in opened.notes)


@pytest.mark.slow
def test_bare_weights_of_version_1_tell_all_but_the_image_size(tmp_path: Path) -> None:
    shutil.copy(RECORDED / "v1" / "model.safetensors", tmp_path / "weights.safetensors")
    opened = open_model(checkpoint=tmp_path / "weights.safetensors")
    assert isinstance(opened, Checkpoint)
    assert opened.config == load(RECORDED / "v1").config
    note = "the file does not tell its image size: 32x32 is taken, and --image-size settles it"
    assert note in opened.notes
    sized = open_model(checkpoint=tmp_path / "weights.safetensors", image_size=(40, 52))
    assert isinstance(sized, Checkpoint)
    assert note not in sized.notes
    assert distance("v1", (40, 52), sized) <= EXACT


def test_bare_weights_of_version_2_do_not_tell_their_windows(tmp_path: Path) -> None:
    shutil.copy(RECORDED / "v2" / "model.safetensors", tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match="does not tell the size of its windows") as caught:
        open_model(checkpoint=tmp_path / "weights.safetensors")
    assert "-m timm:NAME --checkpoint FILE" in (caught.value.hint or "")


@pytest.mark.parametrize(
    "stated, windows",
    [
        (4, ((4, 4), (4, 4))),
        ([4, 2], ((4, 2), (4, 2))),
        ([[4, 4], [2, 4]], ((4, 4), (2, 4))),
        ([4, [2, 2]], ((4, 4), (4, 4))),
    ],
)
def test_windows_as_timm_states_them(stated: Any, windows: Any, tmp_path: Path) -> None:
    if stated == [4, [2, 2]]:
        with pytest.raises(CheckpointError, match="window_size"):
            load(copy("v2", tmp_path, {"window_size": stated}))
        return
    assert config_of(load(copy("v2", tmp_path, {"window_size": stated}))).windows == windows


def test_windows_of_fixed_size_are_padded(tmp_path: Path) -> None:
    config = config_of(load(copy("v2", tmp_path, {"always_partition": True}), image_size=(8, 8)))
    assert (config.window(0), config.padded(1), config.shift(0, 1)) == ((4, 4), (4, 4), (2, 2))


def named(name: str, facts: dict[str, Any]) -> Foreign:
    """A model without values, of this architecture, and a block in each stage."""
    width, heads = facts["width"], facts["heads"]
    state: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (width, 3, 4, 4),
        "head.fc.weight": (21841 if name.endswith("window12_192") else 1000, 8 * width),
    }
    for stage, depth in enumerate(facts["depths"]):
        for block in range(depth):
            place, columns = f"layers.{stage}.blocks.{block}", width * 2**stage
            state[f"{place}.attn.qkv.weight"] = (3 * columns, columns)
            state[f"{place}.mlp.fc1.weight"] = (4 * columns, columns)
            if facts["version"] == 2:
                state[f"{place}.attn.logit_scale"] = (heads[stage], 1, 1)
                state[f"{place}.attn.q_bias"] = (columns,)
            else:
                state[f"{place}.attn.relative_position_bias_table"] = (169, heads[stage])
                state[f"{place}.attn.qkv.bias"] = (3 * columns,)
    tensors = {key: torch.empty(shape, device="meta") for key, shape in state.items()}
    pretrained = {"input_size": [3, *facts["image_size"]]}
    return Foreign(name, tensors, {"architecture": name, "pretrained_cfg": pretrained})


@pytest.mark.slow
def test_every_swin_of_timm_is_read_by_its_name() -> None:
    assert len(ARCHITECTURES) == 21
    for name, facts in ARCHITECTURES.items():
        foreign = named(name, facts)
        assert FAMILY.claims(foreign)
        config = FAMILY.read(foreign, None).config
        assert isinstance(config, SwinConfig)
        pretrained = config.pretrained_windows or ((0, 0),) * 4
        found = {
            "version": config.version,
            "width": config.width,
            "depths": list(config.depths),
            "heads": list(config.heads),
            "windows": [list(window) for window in config.windows],
            "pretrained_windows": [list(window) for window in pretrained],
            "image_size": list(config.image_size),
            "parameters": parameter_count(config),
        }
        assert found == facts, name


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_look_alikes_are_refused_by_what_sets_them_apart(name: str) -> None:
    state = {
        "patch_embed.proj.weight": torch.empty(96, 3, 4, 4, device="meta"),
        "stages.0.blocks.0.attn.meta_mlp.fc1.weight": torch.empty(384, 2, device="meta"),
    }
    foreign = Foreign(name, state, {"architecture": name})
    assert FAMILY.claims(foreign)
    with pytest.raises(CheckpointError, match=f"timm's architecture {name} .another network") as caught:
        FAMILY.read(foreign, None)
    assert "-m timm:NAME" in (caught.value.hint or "")


@pytest.mark.parametrize(
    "arguments, what",
    [
        ({"norm_layer": "rmsnorm"}, "norm_layer 'rmsnorm'"),
        ({"global_pool": "max"}, "global_pool 'max'"),
        ({"head_dim": 32}, "head_dim 32"),
    ],
)
def test_what_is_not_computed_is_refused(arguments: dict[str, Any], what: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"timm's {what} is not supported"):
        load(copy("v1", tmp_path, arguments))


def test_missing_tensors_are_called_as_in_the_file(tmp_path: Path) -> None:
    folder = copy("v1", tmp_path)
    edit_weights(folder, lambda state: state.pop("layers.1.downsample.norm.weight"))
    with pytest.raises(CheckpointError, match=r"1 missing \(layers\.1\.downsample\.norm\.weight\)"):
        load(folder)


def test_a_variant_beside_the_file_is_checked() -> None:
    with pytest.raises(CheckpointError, match="another architecture than the variant named") as caught:
        open_model("Swin-T", checkpoint=RECORDED / "v1")
    assert "width 8, not 96; depths (2, 2), not (2, 2, 6, 2)" in caught.value.message
    with pytest.raises(CheckpointError, match="variant named: its kind swin, not vit"):
        open_model("B/16", checkpoint=RECORDED / "v1")
    with pytest.raises(CheckpointError, match="variant named: its kind vit, not swin"):
        open_model("Swin-T", checkpoint=ORACLES / "timm" / "vit")


def test_a_replaced_head(tmp_path: Path) -> None:
    folder = copy("v1", tmp_path)
    state = load_file(folder / "model.safetensors")
    save_file({k.replace("head.fc", "head.1"): t for k, t in state.items()}, folder / "model.safetensors")
    opened = load(folder)
    assert torch.equal(opened.state["head.weight"], state["head.fc.weight"])
    assert "the head is the linear layer 'head.1'" in opened.notes


def test_models_that_transformers_wraps(tmp_path: Path) -> None:
    kinds = {"model_type": "timm_wrapper", "architectures": ["TimmWrapperForImageClassification"]}
    folder = copy("v2", tmp_path, **kinds)
    state = load_file(folder / "model.safetensors")
    save_file({f"timm_model.{name}": tensor for name, tensor in state.items()}, folder / "model.safetensors")
    assert load(folder).config == load(RECORDED / "v2").config


def test_preprocessing_and_labels_are_timms() -> None:
    opened = load(RECORDED / "v1")
    seen = opened.preprocess
    assert (seen.size, seen.resize, seen.resize_edge, seen.resample) == (
        (32, 32),
        "shortest_edge",
        35,
        "bicubic",
    )
    assert seen.mean == (0.485, 0.456, 0.406)
    assert opened.labels == ("n00", "n01", "n02", "n03", "n04")
