"""What a folder or a file is, where it is not what was hoped for: one line and what to do."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from vitdeploy.errors import CheckpointError

_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})(?P<suffix>\.\w+)")
_QUANTISED: Mapping[str, str] = {
    ".SCB": "bitsandbytes",
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".qweight": "GPTQ or AWQ",
    "._packed_params": "PyTorch's dynamic quantisation",
}
"""Ends of names that quantised layers have."""


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
