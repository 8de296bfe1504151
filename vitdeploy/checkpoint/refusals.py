"""What a folder or a file is, where it is not what was hoped for: one line and what to do."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from vitdeploy.errors import CheckpointError

OTHER_MODEL = "for a model of another architecture, --model module:function exports any nn.Module"
CORRECT = "correct config.json, which describes the weights beside it"
"""Hints."""

_SIGNS: Mapping[str, str] = {
    r"lora_[AB]\.": "a LoRA adapter, which needs its folder with adapter_config.json",
    r"decoder_blocks\.|decoder_embed\.": "MAE's pretraining with its decoder",
    r"visual\.(layer\d|attnpool)": "CLIP with a ResNet",
    r"text_model\.|transformer\.resblocks\.|logit_scale": "a text model of CLIP or SigLIP",
    r"layers\.\d+\.blocks\.\d+\..*relative_position_bias_table|\.swin\.|^swin": "Swin",
    r"relative_position|rel_pos\.|attn\.q_bias|lambda_1": "BEiT, EVA or a ViT with relative positions",
    r"rope|rotary|freqs": "a model with rotary positions (those of DINOv3 and EVA02 open as timm has them)",
    r"attn\.[qk]_norm\.": "a ViT with norms of its queries and keys",
    r"attn\.lambda_q1": "a ViT with differential attention",
    r"attn\.rel_pos_[hw]": "SAM's image encoder",
    r"attn\.norm\.|mlp\.norm\.": "a ViT with norms inside its branches (EVA02-CLIP, BEiT-3)",
    r"mlp\.fc1_[gx]\.": "a ViT with another gated MLP (AIMv2)",
    r"patch_embed\.backbone\.": "a hybrid, with another ResNet before the blocks than those that open",
    r"blocks_token_only\.": "CaiT",
    r"\.attns\.|\.ffns\.": "a ViT with parallel branches",
    r"downsample": "a model in stages, as Swin and ConvNeXt are",
    r"^conv1\.|layer\d\.\d+\.conv\d": "a ResNet",
}
"""Patterns in names of tensors, and the architecture that has such; the surest first."""

_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})(?P<suffix>\.\w+)")
_QUANTISED: Mapping[str, str] = {
    ".SCB": "bitsandbytes",
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".qweight": "GPTQ or AWQ",
    "._packed_params": "PyTorch's dynamic quantisation",
}
"""Ends of names that quantised layers have."""


def looks_like(names: Iterable[str]) -> str:
    """``"; it looks like X"`` where names of tensors tell, or nothing."""
    every = list(names)
    sign = (what for pattern, what in _SIGNS.items() if any(re.search(pattern, name) for name in every))
    found = next(sign, None)
    return f"; it looks like {found}" if found else ""


def some(items: Sequence[str], most: int) -> str:
    """The first of them, none too long, and how many more there are."""
    first = [cut(item, 120) for item in items[:most]]
    rest = len(items) - most
    return ", ".join(first if rest <= 0 else (*first, f"{rest} more"))


def cut(text: str, most: int = 60) -> str:
    """A text of somebody else's, as far as an error has room for it."""
    return text if len(text) <= most else f"{text[: most - 4]} ..."


def shown(value: object) -> str:
    """A value of somebody else's, as far as an error has room for it."""
    return cut(repr(value))


def not_there(source: str) -> CheckpointError:
    return CheckpointError(
        f"{source}: no such file or folder",
        hint="check the path; a relative one begins in the working directory",
    )


def refuse_shard(path: Path, source: str) -> None:
    """Refuse one file of several that make up a checkpoint.

    Raises:
        CheckpointError: it is one.
    """
    found = _SHARD.fullmatch(path.name)
    if found is None or int(found["count"]) < 2:
        return
    index = path.with_name(f"{found['stem']}{found['suffix']}.index.json")
    hint = f"give their index, {index}" if index.is_file() else f"{index.name} belongs beside them"
    raise CheckpointError(f"{source} is one of {int(found['count'])} shards of a checkpoint", hint=hint)


def refuse_quantised(source: str, names: Collection[str], config: Mapping[str, object] | None) -> None:
    """Refuse weights that somebody has quantised: what they were cannot be had back.

    Raises:
        CheckpointError: they are.
    """
    kind = next((kind for end, kind in _QUANTISED.items() if any(name.endswith(end) for name in names)), None)
    stated = (config or {}).get("quantization_config")
    if kind is None and isinstance(stated, Mapping):
        kind = str(stated.get("quant_method") or "its config.json")
    if kind is not None:
        raise CheckpointError(
            f"{source} holds quantised weights ({kind})", hint="give the checkpoint that they were made from"
        )


def no_weights(
    folder: Path, source: str, wanted: Collection[str], others: Collection[str]
) -> CheckpointError:
    """Why a folder without weights of these names has none.

    Args:
        others: files in it that may be weights under other names.
    """
    names = {entry.name for entry in folder.iterdir()}
    snapshots = sorted(folder.glob("snapshots/*/"), key=lambda entry: entry.stat().st_mtime)
    if "adapter_config.json" in names:
        return CheckpointError(
            f"{source} is an adapter without its weights", hint="adapter_model.safetensors belongs beside it"
        )
    if snapshots:
        return CheckpointError(f"{source} is a cache of the hub", hint=f"give what it holds: {snapshots[-1]}")
    nothing = f"{source}: none of {', '.join(wanted)} is there"
    if others:
        return CheckpointError(nothing, hint=f"give the file itself: {folder / min(others)}")
    if any(name.startswith(("tf_model", "flax_model")) or name == "saved_model.pb" for name in names):
        return CheckpointError(
            f"{source} holds weights of TensorFlow or Flax only",
            hint="save the model as safetensors with the library that wrote it",
        )
    if exports := sorted(path for pattern in ("*.onnx", "onnx/*.onnx") for path in folder.glob(pattern)):
        return CheckpointError(
            f"{source} holds an ONNX export ({exports[0].name}) and no checkpoint",
            hint="give the checkpoint that it was made from",
        )
    return CheckpointError(nothing, hint="a folder needs model.safetensors")
