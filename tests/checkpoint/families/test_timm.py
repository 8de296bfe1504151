from __future__ import annotations

import json
import shutil
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.helpers.paths import ORACLES
from vitdeploy.checkpoint.families.base import Foreign
from vitdeploy.checkpoint.families.timm import FAMILY
from vitdeploy.checkpoint.families.timm_names import width_of
from vitdeploy.checkpoint.opening import Checkpoint, open_model
from vitdeploy.config import Rotary, SwinConfig
from vitdeploy.errors import CheckpointError, MissingDependency
from vitdeploy.model.reference import forward_float64
from vitdeploy.model.registry import build_reference

RECORDED = ORACLES / "timm"
CASES = sorted(folder.name for folder in RECORDED.iterdir() if folder.is_dir())


def load(folder: Path, **keywords: Any) -> Checkpoint:
    opened = open_model(str(folder), **keywords)
    assert isinstance(opened, Checkpoint)
    assert opened.family == "timm"
    return opened


def run(opened: Checkpoint, pixels: Tensor) -> Tensor:
    return forward_float64(build_reference(opened.config, opened.state), pixels)


def copy(case: str, tmp_path: Path, **config: Any) -> Path:
    """A recorded folder with other settings; None deletes one."""
    folder = tmp_path / case
    shutil.copytree(RECORDED / case, folder)
    content = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return folder


def arguments(case: str, **changes: Any) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RECORDED / case / "config.json").read_text())
    merged = content["model_args"] | changes
    return {key: value for key, value in merged.items() if value is not None}


@pytest.mark.parametrize("case", CASES)
def test_output_equals_timm(case: str) -> None:
    answer = load_file(RECORDED / case / "answer.safetensors")
    opened = load(RECORDED / case)
    torch.testing.assert_close(run(opened, answer["pixels"]), answer["output"], rtol=0, atol=1e-10)
    assert (answer["output"][0] - answer["output"][1]).abs().max() > 1e-2


@pytest.mark.parametrize("case", CASES)
def test_resampled_positions_equal_timm(case: str) -> None:
    answer = load_file(RECORDED / case / "answer.safetensors")
    size = tuple(answer["other.pixels"].shape[2:])
    opened = load(RECORDED / case, image_size=size)
    assert opened.preprocess.size == size
    assert opened.state["pos_embed"].dtype == torch.float32
    # The table is resampled in float32, where builds of torch may differ in the last bit.
    torch.testing.assert_close(run(opened, answer["other.pixels"]), answer["other.output"], rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case not in ("not_square", "mean_then_norm", "no_cls")]
)
def test_bare_weights_tell_all_but_heads_and_activation(case: str, tmp_path: Path) -> None:
    whole = load(RECORDED / case)
    shutil.copy(RECORDED / case / "model.safetensors", tmp_path / "weights.safetensors")
    bare = open_model(checkpoint=tmp_path / "weights.safetensors")
    assert isinstance(bare, Checkpoint)
    told = {"heads": whole.config.heads, "activation": whole.config.activation}
    assert {**vars(bare.config), **told} == vars(whole.config)
    assert any("heads" in note for note in bare.notes)
    assert any("preprocessing" in note for note in bare.notes)


def test_the_head_of_a_published_clip_is_its_projection(tmp_path: Path) -> None:
    """As timm converts them: no labels, a bias of zeros."""
    folder = copy("clip", tmp_path, label_names=None)
    assert load(folder).config.classes == 5
    state = load_file(folder / "model.safetensors")
    bias = state["head.bias"].clone()
    state["head.bias"].zero_()
    save_file(state, folder / "model.safetensors")
    opened, answer = load(folder), load_file(RECORDED / "clip" / "answer.safetensors")
    assert (opened.config.outputs[0], opened.config.projection) == ("embedding", 5)
    expected = answer["output"] - bias.double()
    expected /= expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(run(opened, answer["pixels"]), expected, rtol=0, atol=1e-10)
    assert any("CLIP's projection" in note for note in opened.notes)


def test_labels_come_in_words_where_timm_has_them(tmp_path: Path) -> None:
    assert load(RECORDED / "vit").labels == ("n00", "n01", "n02", "n03", "n04")
    described = copy("vit", tmp_path / "a", label_descriptions={"n01": "goldfish"})
    assert load(described).labels == ("n00", "goldfish", "n02", "n03", "n04")
    numbered = copy("vit", tmp_path / "b", label_names={str(i): f"c{i}" for i in range(5)})
    assert load(numbered).labels == ("c0", "c1", "c2", "c3", "c4")
    for wrong in (["a", "b"], {"0": "a", "2": "c"}, {str(i): "x" for i in range(6)}):
        with pytest.raises(CheckpointError, match="the head has 5 classes"):
            load(copy("vit", tmp_path / str(len(wrong)) / type(wrong).__name__, label_names=wrong))


def test_preprocessing_follows_the_resolution_as_timm_rounds_it() -> None:
    assert load(RECORDED / "vit", image_size=(32, 32)).preprocess.resize_edge == 35  # floor(32 / 0.9)


ARCHITECTURES: dict[str, dict[str, Any]] = json.loads((RECORDED / "architectures.json").read_text())
LOOK_ALIKES: list[str] = json.loads((RECORDED / "look_alikes.json").read_text())


def named(name: str, facts: dict[str, Any], **config: Any) -> Foreign:
    """A model without values, of this architecture, and a config.json without model_args, as until 2024."""
    width, gated = facts["width"], facts["activation"] == "SiLU"
    state = {
        "patch_embed.proj.weight": torch.empty(width, 3, 2, 2, device="meta"),
        "pos_embed": torch.empty(1, 4, width, device="meta"),
        "blocks.0.attn.qkv.weight": torch.empty(3 * width, width, device="meta"),
        "blocks.0.mlp.fc1.weight": torch.empty(128 if gated else 64, width, device="meta"),
        "blocks.0.mlp.fc2.weight": torch.empty(width, 64, device="meta"),
    }
    if "_clip_" in name:
        state["norm_pre.weight"] = torch.empty(width, device="meta")
    return Foreign(name, state, {"architecture": name, "global_pool": "avg", **config})


def test_every_plain_architecture_of_timm_has_its_heads_and_activation() -> None:
    names = {"gelu": "GELU", "gelu_tanh": "GELUTanh", "quick_gelu": "QuickGELU", "silu": "SiLU"}
    assert len(ARCHITECTURES) > 100
    for name, facts in ARCHITECTURES.items():
        config = FAMILY.read(named(name, facts), None).config
        assert (name, config.heads) == (name, facts["heads"])
        assert (name, names[config.activation]) == (name, facts["activation"])
        assert (name, config.norm_eps) == (name, facts["norm_eps"])
        assert (name, width_of(name)) in ((name, None), (name, facts["width"]))


def test_every_other_architecture_with_these_tensors_is_refused_by_name() -> None:
    assert len(LOOK_ALIKES) > 100
    others = {"vit_small_patch16_rope_ape_224", "vit_so150m_patch16_reg4_map_256", "test_vit3"}
    assert {"vit_base_patch16_rpn_224", *others} < set(LOOK_ALIKES)
    unexplained = []
    for name in [*LOOK_ALIKES, "vit_of_tomorrow_patch16_224"]:
        with pytest.raises(CheckpointError, match=f"timm's architecture {name} .*is not supported") as caught:
            FAMILY.read(named(name, ARCHITECTURES["vit_base_patch16_224"]), None)
        assert "-m timm:NAME --checkpoint" in (caught.value.hint or "")
        if "(" not in caught.value.message:
            unexplained.append(name)
    assert unexplained == ["vit_of_tomorrow_patch16_224"]


def test_names_that_timm_gave_up_for_tags() -> None:
    """As in register_model_deprecations of timm's vision_transformer.py and deit.py."""
    for name in (
        "vit_base_patch16_224_in21k",
        "vit_base_patch16_224_miil_in21k",
        "vit_small_patch8_224_dino",
        "vit_base_patch32_224_sam",
        "deit3_huge_patch14_224_in21ft1k",
    ):
        assert FAMILY.read(named(name, ARCHITECTURES["vit_base_patch16_224"]), None).config.heads == 12


def test_a_size_that_the_patch_does_not_divide() -> None:
    """timm drops what is beyond the last whole patch: vit_so400m_patch14_siglip_gap_384 sees 378 of 384."""
    uneven = {name: facts["image_size"] for name, facts in ARCHITECTURES.items()}
    uneven = {n: size for n, size in uneven.items() if size[0] % ARCHITECTURES[n]["patch_size"]}
    assert uneven == {f"vit_so400m_patch14_siglip_{gap}384": [384, 384] for gap in ("", "gap_")}
    facts = {"width": 1152, "activation": "GELU"}
    foreign = named("vit_so400m_patch14_siglip_gap_384", facts, pretrained_cfg={"input_size": [3, 5, 5]})
    with pytest.raises(CheckpointError, match="feeds 5x5 pixels, of which patches of 2 use 4x4") as caught:
        FAMILY.read(foreign, None)
    assert "--image-size 4x4" in (caught.value.hint or "")
    assert FAMILY.read(replace(foreign, wanted=(4, 4)), None).config.image_size == (4, 4)


def flat(tmp_path: Path, **settings: Any) -> Path:
    """A folder with config.json as timm wrote it before pretrained_cfg."""
    folder = copy("vit", tmp_path, model_args=None, pretrained_cfg=None, label_names=None)
    given = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 5,
        "input_size": [3, 16, 16],
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "crop_pct": 0.8,
        "interpolation": "bilinear",
        "labels": list("abcde"),
    }
    (folder / "config.json").write_text(json.dumps(given | settings))
    return folder


def test_elder_config_without_pretrained_cfg(tmp_path: Path) -> None:
    opened = load(flat(tmp_path))
    assert opened.labels == ("a", "b", "c", "d", "e")
    spec = opened.preprocess
    assert (spec.mean, spec.std, spec.resample) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear")
    assert (spec.size, spec.resize_edge) == ((16, 16), 20)
    # Its name says a width of 192 and so 3 heads; it was built with another.
    guess = "1, as usual for width 16, is taken, and --heads settles it"
    assert opened.notes == (f"the file does not tell the number of heads: {guess}",)


def wrapped(tmp_path: Path, **config: Any) -> Path:
    """What transformers' TimmWrapperForImageClassification saves."""
    kinds = {"model_type": "timm_wrapper", "architectures": ["TimmWrapperForImageClassification"]}
    folder = copy("vit", tmp_path, **{**kinds, **config})
    state = load_file(folder / "model.safetensors")
    save_file({f"timm_model.{name}": tensor for name, tensor in state.items()}, folder / "model.safetensors")
    return folder


def test_models_that_transformers_wraps(tmp_path: Path) -> None:
    plain, opened = load(RECORDED / "vit"), load(wrapped(tmp_path / "a"))
    assert opened.config == plain.config
    assert all(torch.equal(opened.state[name], tensor) for name, tensor in plain.state.items())
    # load_image of transformers turns photographs.
    assert opened.preprocess == replace(plain.preprocess, exif=True)
    assert (opened.labels, opened.scores) == (plain.labels, "softmax")
    several = load(wrapped(tmp_path / "b", problem_type="multi_label_classification"))
    assert several.scores == "sigmoid"


def test_a_wrapped_model_without_its_head(tmp_path: Path) -> None:
    folder = wrapped(tmp_path, architectures=["TimmWrapperModel"])
    state = load_file(folder / "model.safetensors")
    save_file({k: t for k, t in state.items() if ".head." not in k}, folder / "model.safetensors")
    assert load(folder).config.classes == 0


@pytest.mark.parametrize("place", ["head.1", "head.fc"])
def test_a_head_under_another_name(tmp_path: Path, place: str) -> None:
    """A dropout before the one linear layer moves its name."""
    folder = copy("vit", tmp_path)
    state = load_file(folder / "model.safetensors")
    save_file({k.replace("head.", f"{place}."): t for k, t in state.items()}, folder / "model.safetensors")
    opened = load(folder)
    assert torch.equal(opened.state["head.weight"], state["head.weight"])
    assert f"the head is the linear layer {place!r}" in opened.notes


@pytest.mark.parametrize(
    "case,config,message",
    [
        ("no_cls", {"architecture": "vit_base_patch16_rpn_224"}, "architecture vit_base_patch16_rpn_224"),
        ("vit", {"model_args": arguments("vit", pool_include_prefix=True)}, "pool_include_prefix"),
        ("vit", {"model_args": arguments("vit", norm_layer="rmsnorm")}, "norm_layer 'rmsnorm'"),
        ("vit", {"model_args": arguments("vit", act_layer="gelu_tan")}, "did you mean 'gelu_tanh'"),
        ("vit", {"model_args": arguments("vit", global_pool="prr")}, "pooling by 'prr' is not supported"),
        ("vit", {"model_args": arguments("vit", global_pool="map")}, "beside 1 other tokens"),
        ("no_cls", {"model_args": arguments("no_cls", global_pool="map")}, "attn_pool.latent"),
        ("vit", {"model_args": arguments("vit", num_heads=3)}, "width 16 is not divisible by 3 heads"),
        ("vit", {"model_args": arguments("vit", num_heads="two")}, "num_heads must be a whole number"),
        ("vit", {"model_args": [1]}, "model_args must be an object"),
    ],
)
def test_what_shapes_cannot_tell_is_refused(
    tmp_path: Path, case: str, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError) as error:
        load(copy(case, tmp_path, **config))
    assert message in error.value.message


def test_position_table_of_no_known_grid_is_refused(tmp_path: Path) -> None:
    folder = copy("vit", tmp_path)
    state = load_file(folder / "model.safetensors")
    save_file(state | {"pos_embed": torch.zeros(1, 13, 16)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="the position table has 13 rows"):
        load(folder)


@pytest.mark.parametrize(
    "lost", ["head.", "pos_embed", "cls_token", "norm.", "blocks.1.", "blocks.0.attn.qkv.bias"]
)
def test_tensors_that_are_missing_are_never_taken_for_another_architecture(tmp_path: Path, lost: str) -> None:
    folder = copy("vit", tmp_path)
    state = load_file(folder / "model.safetensors")
    save_file({k: t for k, t in state.items() if not k.startswith(lost)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError):
        load(folder)


def test_positions_are_absent_only_where_the_configuration_says_so(tmp_path: Path) -> None:
    folder = copy("vit", tmp_path, model_args=arguments("vit", pos_embed="none"))
    state = load_file(folder / "model.safetensors")
    del state["pos_embed"]
    save_file(state, folder / "model.safetensors")
    assert load(folder).config.position == "none"


@pytest.mark.slow
def test_released_spellings_of_dinov2_and_deit3(tmp_path: Path) -> None:
    """Meta's own files: other names, and in DINOv2 a position row for CLS though there are registers."""
    for case, renames in {
        "deit3": [(".ls1.gamma", ".gamma_1"), (".ls2.gamma", ".gamma_2")],
        "swiglu": [(".mlp.fc1.", ".mlp.w12."), (".mlp.fc2.", ".mlp.w3.")],
        "dinov2_registers": [("reg_token", "register_tokens")],
    }.items():
        modern = load(RECORDED / case)
        state = load_file(RECORDED / case / "model.safetensors")
        for new, old in renames:
            state = {name.replace(new, old): tensor for name, tensor in state.items()}
        state["mask_token"] = torch.zeros(1, 16)
        if case == "dinov2_registers":
            row = torch.randn(1, 1, 16)
            state |= {
                "pos_embed": torch.cat([row, state["pos_embed"]], 1),
                "cls_token": state["cls_token"] - row,
            }
        folder = copy(case, tmp_path)
        save_file(state, folder / "model.safetensors")
        pixels = torch.randn(2, 3, 16, 16)
        torch.testing.assert_close(run(load(folder), pixels), run(modern, pixels), rtol=0, atol=1e-5)


def test_a_bare_file_that_may_be_rotary_says_so(tmp_path: Path) -> None:
    """vit_*_rope_ape_* of timm has gamma_1, as DeiT III's own files; a bare file cannot tell them apart."""
    state = load_file(RECORDED / "deit3" / "model.safetensors")
    elder = {
        name.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2"): t
        for name, t in state.items()
    }
    save_file(elder, tmp_path / "deit3.safetensors")
    opened = open_model(checkpoint=tmp_path / "deit3.safetensors")
    assert any("vit_*_rope_ape_* have the same names" in note for note in opened.notes)


def test_pre_logits_of_elder_timm_are_a_tanh_layer(tmp_path: Path) -> None:
    folder = copy("vit", tmp_path)
    state = load_file(folder / "model.safetensors")
    state |= {"pre_logits.fc.weight": torch.randn(8, 16), "pre_logits.fc.bias": torch.randn(8)}
    state["head.weight"] = state["head.weight"][:, :8].contiguous()
    save_file(state, folder / "model.safetensors")
    opened = load(folder)
    pixels = torch.randn(2, 3, 16, 16)
    features = forward_float64(build_reference(opened.config, opened.state), pixels, "features")
    hidden = torch.tanh(features @ state["pre_logits.fc.weight"].double().T + state["pre_logits.fc.bias"])
    expected = hidden @ state["head.weight"].double().T + state["head.bias"]
    torch.testing.assert_close(run(opened, pixels), expected, rtol=0, atol=1e-12)


def test_library_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingDependency) as error:
        open_model("timm:vit_tiny_patch16_224")
    assert error.value.hint == 'pip install "vitdeploy[hub]"'


class VisionTransformer(nn.Module):
    """What vitdeploy asks of timm's classes."""

    def __init__(self, tensors: dict[str, Tensor], block: str = "Block") -> None:
        super().__init__()
        self.tensors = tensors
        act = type("GELUTanh", (), {})()
        attn, norm, mlp = (
            types.SimpleNamespace(num_heads=4),
            types.SimpleNamespace(eps=1e-5),
            types.SimpleNamespace(act=act),
        )
        self.blocks = [type(block, (), {"attn": attn, "norm1": norm, "mlp": mlp})()]
        self.global_pool, self.pool_include_prefix = "token", False
        self.patch_embed = types.SimpleNamespace(img_size=(16, 16))
        self.pretrained_cfg = {"input_size": (3, 16, 16), "crop_pct": 0.5, "interpolation": "bicubic"}

    def state_dict(self, *args: Any, **keywords: Any) -> dict[str, Any]:
        return self.tensors


def fake_timm(monkeypatch: pytest.MonkeyPatch, create: Any, name: str = "vit_tiny_patch16_224") -> None:
    library, data = types.ModuleType("timm"), types.ModuleType("timm.data")
    library.__dict__.update(list_models=lambda pretrained=False: [name], create_model=create)
    data.__dict__.update(infer_imagenet_subset=lambda model: None, ImageNetInfo=None)
    monkeypatch.setitem(sys.modules, "timm", library)
    monkeypatch.setitem(sys.modules, "timm.data", data)


def test_library_settles_what_its_model_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = load_file(RECORDED / "vit" / "model.safetensors")
    fake_timm(monkeypatch, lambda name, pretrained: VisionTransformer(tensors))
    opened = open_model("timm:vit_tiny_patch16_224")
    assert isinstance(opened, Checkpoint)
    assert (opened.config.heads, opened.config.activation, opened.config.norm_eps) == (4, "gelu_tanh", 1e-5)
    assert (opened.preprocess.resize_edge, opened.source) == (32, "timm:vit_tiny_patch16_224")


def test_library_builds_eva(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's class Eva has no pool_include_prefix."""
    model = type("Eva", (VisionTransformer,), {})(
        load_file(ORACLES / "timm_eva" / "dinov3" / "model.safetensors"), block="EvaBlock"
    )
    del model.pool_include_prefix
    fake_timm(monkeypatch, lambda name, pretrained: model, "vit_small_patch16_dinov3")
    opened = open_model("timm:vit_small_patch16_dinov3")
    assert isinstance(opened, Checkpoint)
    assert (opened.family, opened.config.heads, opened.config.norm_eps) == ("timm_eva", 4, 1e-5)
    assert opened.config.rotary == Rotary("centred_timm", 100.0)


def test_library_builds_swin(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's Swins have their blocks in stages; windows are those of the name."""
    tensors = load_file(ORACLES / "timm_swin" / "s3" / "model.safetensors")
    model = type("SwinTransformer", (VisionTransformer,), {})(tensors, block="SwinTransformerBlock")
    model.layers = [types.SimpleNamespace(blocks=model.blocks)]
    del model.blocks
    model.global_pool, model.patch_embed = "avg", types.SimpleNamespace(img_size=(224, 224))
    fake_timm(monkeypatch, lambda name, pretrained: model, "swin_tiny_patch4_window7_224")
    with pytest.raises(CheckpointError, match="of the wrong shape"):  # windows of 2 and 4, as s3's are
        open_model("timm:swin_tiny_patch4_window7_224")
    tensors.update({n: torch.zeros(169, t.shape[1]) for n, t in tensors.items() if n.endswith("bias_table")})
    opened = open_model("timm:swin_tiny_patch4_window7_224")
    assert isinstance(opened, Checkpoint)
    assert isinstance(opened.config, SwinConfig)
    assert (opened.family, opened.config.windows) == ("timm_swin", ((7, 7),) * 3)
    assert (opened.config.image_size, opened.config.activation) == ((224, 224), "gelu_tanh")


def test_library_without_network_or_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str, pretrained: bool) -> nn.Module:
        raise OSError("no route to host\nmore")

    fake_timm(monkeypatch, offline)
    with pytest.raises(CheckpointError, match=r"weights of vit_tiny_patch16_224: no route to host$"):
        open_model("timm:vit_tiny_patch16_224")
    with pytest.raises(CheckpointError, match="did you mean 'vit_tiny_patch16_224'"):
        open_model("timm:vit_tiny_patch16_24")


def with_channels(weight: Tensor, channels: int) -> Tensor:
    """What timm makes of an RGB patch convolution (D, 3, P, P) for ``in_chans``: summed up, or repeated."""
    weight = weight.double()  # or the sums are rounded
    if channels == 1:
        return weight.sum(dim=1, keepdim=True)
    return weight.repeat(1, -(-channels // 3), 1, 1)[:, :channels] * (3 / channels)


@pytest.mark.parametrize("described", [True, False])
def test_a_model_of_one_channel(described: bool, tmp_path: Path) -> None:
    """Its weights are summed over RGB: it gives for grey what the RGB model gives for grey in all three."""
    folder = copy("vit", tmp_path, model_args=arguments("vit", in_chans=1))
    state = load_file(folder / "model.safetensors")
    state["patch_embed.proj.weight"] = with_channels(state["patch_embed.proj.weight"], 1)
    save_file(state, folder / "model.safetensors")
    if not described:
        (folder / "config.json").unlink()
    opened = open_model(checkpoint=folder / "model.safetensors")
    assert isinstance(opened, Checkpoint)
    colour = load(RECORDED / "vit")
    assert opened.config.channels == 1
    if described:
        grey = torch.randn(2, 1, *opened.config.image_size, dtype=torch.float64)
        torch.testing.assert_close(
            run(opened, grey), run(colour, grey.expand(-1, 3, -1, -1)), rtol=0, atol=1e-10
        )
        assert opened.preprocess.mean == pytest.approx((sum(colour.preprocess.mean) / 3,))
    assert opened.preprocess.channels == 1
    assert any("images become grey" in note for note in opened.notes)


def test_a_model_of_four_channels(tmp_path: Path) -> None:
    own = {"mean": [0.1, 0.2, 0.3, 0.4], "std": [0.5, 0.6, 0.7, 0.8]}
    pretrained = json.loads((RECORDED / "vit" / "config.json").read_text())["pretrained_cfg"]
    size = [4, *pretrained["input_size"][1:]]
    folder = copy("vit", tmp_path, pretrained_cfg={**pretrained, **own, "input_size": size})
    state = load_file(folder / "model.safetensors")
    state["patch_embed.proj.weight"] = with_channels(state["patch_embed.proj.weight"], 4)
    save_file(state, folder / "model.safetensors")
    opened = load(folder)
    assert (opened.config.channels, list(opened.preprocess.mean), list(opened.preprocess.std)) == (
        4,
        *own.values(),
    )
    x = torch.randn(2, 4, *opened.config.image_size, dtype=torch.float64)
    same = torch.stack([x[:, 0] + x[:, 3], x[:, 1], x[:, 2]], dim=1) * (3 / 4)
    torch.testing.assert_close(run(opened, x), run(load(RECORDED / "vit"), same), rtol=0, atol=1e-10)
    assert any("tensors go in, not images" in note for note in opened.notes)
