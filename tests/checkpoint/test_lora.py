"""LoRA adapters with their bases, against PEFT's own merge; what is not merged here is named."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.checkpoints import TINY, opened, refusal
from tests.helpers.paths import ORACLES
from vitdeploy.errors import VitdeployError
from vitdeploy.model.reference import forward_float64
from vitdeploy.model.registry import build_reference

RECORDED = ORACLES / "lora"
CASES = sorted(path.parent.name for path in RECORDED.glob("*/adapter_config.json"))


def copied(case: str, tmp_path: Path, **settings: Any) -> Path:
    """A recorded adapter beside its base, with other settings; None deletes one."""
    shutil.copytree(RECORDED / "base", tmp_path / "base")
    folder = tmp_path / case
    shutil.copytree(RECORDED / case, folder)
    path = folder / "adapter_config.json"
    content = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return folder


def edited(folder: Path, state: dict[str, Tensor]) -> Path:
    save_file(state, folder / "adapter_model.safetensors")
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def difference(folder: Path, case: str) -> float:
    """The largest distance of the merged model's logits from PEFT's."""
    answer, model = load_file(RECORDED / case / "answer.safetensors"), opened(str(folder))
    ours = forward_float64(build_reference(model.config, model.state), answer["pixels"])
    return float((ours - answer["output"]).abs().max())


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_peft(case: str) -> None:
    assert difference(RECORDED / case, case) < 1e-10
    answer = load_file(RECORDED / case / "answer.safetensors")
    base = opened(str(RECORDED / "base"))
    plain = forward_float64(build_reference(base.config, base.state), answer["pixels"])
    assert plain.shape != answer["output"].shape or (plain - answer["output"]).abs().max() > 1e-2


def test_what_was_merged_is_said_and_is_float64(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = copied("plain", tmp_path)
    monkeypatch.chdir(tmp_path)
    model = opened("plain")
    assert "LoRA adapter (rank 4, 4 layers) merged in float64 into base" in model.notes
    assert model.state["blocks.0.attn.q.weight"].dtype == torch.float64
    assert model.state["blocks.0.attn.k.weight"].dtype == torch.float32
    assert {"adapter_config.json", "adapter_model.safetensors", "config.json", "model.safetensors"} <= set(
        model.provenance
    )
    assert opened(str(folder / "adapter_model.safetensors")).notes[1:] == opened(str(folder)).notes[1:]


def test_ranks_of_patterns(tmp_path: Path) -> None:
    assert any("(rank 2 to 4, 6 layers)" in note for note in opened(str(copied("patterns", tmp_path))).notes)


def test_names_of_transformers_4_and_pickles(tmp_path: Path) -> None:
    """Adapters that were trained with transformers 4, saved as PEFT did by default then."""
    elder = {
        ".layers.": ".encoder.layer.",
        ".attention.q_proj.": ".attention.attention.query.",
        ".attention.o_proj.": ".attention.output.dense.",
        ".mlp.fc1.": ".intermediate.dense.",
    }
    folder = copied(
        "patterns",
        tmp_path,
        rank_pattern={"layer.1.attention.attention.query": 2, "intermediate.dense": 3},
        alpha_pattern={"intermediate.dense": 5},
    )
    state = {}
    for name, tensor in weights(folder).items():
        for new, old in elder.items():
            name = name.replace(new, old)
        state[name] = tensor
    (folder / "adapter_model.safetensors").unlink()
    torch.save(state, folder / "adapter_model.bin")
    assert difference(folder, "patterns") < 1e-10


def test_a_base_without_a_head(tmp_path: Path) -> None:
    """Most adapters are trained on a pretrained body, whose file has other names and no classifier."""
    folder = copied("own_head", tmp_path)
    state = load_file(tmp_path / "base" / "model.safetensors")
    body = {name.removeprefix("vit."): t for name, t in state.items() if name.startswith("vit.")}
    save_file(body, tmp_path / "base" / "model.safetensors")
    config = json.loads((tmp_path / "base" / "config.json").read_text()) | {"architectures": ["ViTModel"]}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    assert difference(folder, "own_head") < 1e-10


def test_labels_of_a_head_of_its_own(tmp_path: Path) -> None:
    folder = copied("own_head", tmp_path)
    model = opened(str(folder))
    assert (model.config.classes, model.labels) == (3, None)
    assert "the base's labels are not those of the adapter's 3 classes" in model.notes
    labels = {"0": "cat", "1": "dog", "2": "owl"}
    config = json.loads((tmp_path / "base" / "config.json").read_text()) | {"id2label": labels}
    (folder / "config.json").write_text(json.dumps(config))
    assert opened(str(folder)).labels == ("cat", "dog", "owl")


def test_a_missing_base_and_the_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = copied("plain", tmp_path, base_model_name_or_path="elsewhere/vit")
    error = refusal(str(folder))
    assert "is a LoRA adapter, and its base 'elsewhere/vit' is not here" in error.message
    assert "merge_and_unload" in (error.hint or "")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "base").rename(tmp_path / "elsewhere" / "vit")
    assert difference(folder, "plain") < 1e-10


def test_a_base_in_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = copied("plain", tmp_path, base_model_name_or_path="someone/vit")
    repository = tmp_path / "cache" / "models--someone--vit"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c0ffee")
    (repository / "snapshots").mkdir()
    (tmp_path / "base").rename(repository / "snapshots" / "c0ffee")
    assert difference(folder, "plain") < 1e-10
    assert "hub revision c0ffee" in opened(str(folder)).notes


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"peft_type": "LOHA"}, "is an adapter of the kind LOHA"),
        ({"peft_type": None}, "is an adapter of the kind None"),
        ({"use_qalora": True}, "is a LoRA adapter with use_qalora"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "with layer_replication"),
        ({"target_parameters": ["weight"]}, "with target_parameters"),
        ({"init_lora_weights": "pissa"}, "with init_lora_weights 'pissa'"),
        ({"init_lora_weights": "olora"}, "with init_lora_weights 'olora'"),
        ({"something_new": 3}, "with something_new"),
        ({"r": 5}, "vit.layers.0.attention.q_proj is of rank 4, where adapter_config.json says 5"),
        ({"lora_alpha": "x"}, "lora_alpha must be a number, not 'x'"),
        ({"alpha_pattern": {"(": 3}}, "alpha_pattern has no pattern '('"),
        ({"use_dora": True}, "is without the lengths of DoRA"),
        ({"base_model_name_or_path": None}, "does not name its base"),
        ({"base_model_name_or_path": "plain"}, "its base 'plain' is an adapter, too"),
    ],
)
def test_other_adapters_are_refused_by_name(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    error = refusal(str(copied("plain", tmp_path, **settings)))
    assert message in error.message
    assert error.hint


@pytest.mark.parametrize(
    "name, shape, message",
    [
        ("vit.layers.0.attention.q_proj.lora_A.weight", (4, 7), "16x4 by 4x7, which do not make up 16x16"),
        ("vit.layers.0.attention.q_proj.lora_A.weight", (), "16x4 by a scalar"),
        ("vit.layers.9.attention.q_proj.lora_A.weight", (4, 16), "is no layer of"),
        ("vit.layers.0.mlp.fc1.lora_A.weight", (4, 16), "is half an adapter"),
        ("vit.embeddings.lora_embedding_A", (4, 16), "a part of an adapter that is not merged here"),
        ("vit.layers.0.attention.q_proj.lora_magnitude_vector", (3,), "DoRA of a layer that is not linear"),
        ("vit.layers.0.router.weight", (4, 16), "1 unexpected (vit.layers.0.router.weight)"),
    ],
)
def test_tensors_that_fit_nothing_are_named(
    tmp_path: Path, name: str, shape: tuple[int, ...], message: str
) -> None:
    folder = copied("plain", tmp_path)
    error = refusal(str(edited(folder, weights(folder) | {f"base_model.model.{name}": torch.ones(shape)})))
    assert message in error.message


def test_an_adapter_without_layers(tmp_path: Path) -> None:
    folder = edited(copied("plain", tmp_path), {"base_model.model.classifier.bias": torch.ones(4)})
    assert "holds no LoRA layers" in refusal(str(folder)).message


def test_a_base_of_beit(tmp_path: Path) -> None:
    """PEFT names what it adapts as transformers 5 does in memory."""
    config = transformers.BeitConfig(**TINY, use_shared_relative_position_bias=True)
    transformers.BeitForImageClassification(config).save_pretrained(tmp_path / "base")
    folder = tmp_path / "adapter"
    folder.mkdir()
    settings = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 6,
        "base_model_name_or_path": str(tmp_path / "base"),
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    down, up = torch.randn(2, 32), torch.randn(32, 2)
    layer = "base_model.model.beit.layers.1.attention.q_proj"
    edited(folder, {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up})
    base, merged = opened(str(tmp_path / "base")), opened(str(folder))
    expected = base.state["blocks.1.attn.q.weight"].double() + 3 * up.double() @ down.double()
    torch.testing.assert_close(merged.state["blocks.1.attn.q.weight"], expected, rtol=0, atol=1e-12)


def test_a_timm_base(tmp_path: Path) -> None:
    """PEFT names timm's modules, whose query, key and value are one layer; the oracle is the sum itself."""
    shutil.copytree(ORACLES / "timm" / "vit", tmp_path / "base")
    name = "blocks.1.attn.qkv"
    a, b = torch.randn(3, 16), torch.randn(48, 3)
    (tmp_path / "adapter").mkdir()
    parts = {f"base_model.model.{name}.lora_{part}.weight": t for part, t in (("A", a), ("B", b))}
    edited(tmp_path / "adapter", parts)
    settings = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "base_model_name_or_path": "base"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    model = opened(str(tmp_path / "adapter"))
    state = load_file(tmp_path / "base" / "model.safetensors")
    expected = state[f"{name}.weight"].double() + 2 * (b.double() @ a.double())
    ours = torch.cat([model.state[f"blocks.1.attn.{part}.weight"] for part in "qkv"])
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-14)
    assert model.labels == opened(str(tmp_path / "base")).labels


@pytest.mark.slow
def test_no_wrong_shape_or_setting_escapes_as_another_error(tmp_path: Path) -> None:
    dice = random.Random(3)
    shapes = [(), (0,), (1,), (4, 0), (16,), (16, 16), (4, 16), (16, 4, 1, 1), (2, 3, 4, 5)]
    values: list[Any] = [-1, 0, 3, 1e9, "x", True, [], {}, [1], {"q_proj": 1}, {"q_proj": "x"}, {"(": 2}]
    for case in ("plain", "dora", "convolution", "lora_bias", "own_head"):
        folder = copied(case, tmp_path / case)
        state, settings = weights(folder), json.loads((folder / "adapter_config.json").read_text())
        for _ in range(20):
            changed = state | {dice.choice(sorted(state)): torch.ones(dice.choice(shapes))}
            wrong = settings | {dice.choice(sorted(settings)): dice.choice(values)}
            (folder / "adapter_config.json").write_text(
                json.dumps(wrong | {"base_model_name_or_path": "base"})
            )
            with contextlib.suppress(VitdeployError):
                opened(str(edited(folder, changed)))
