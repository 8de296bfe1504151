"""Record small LoRA adapters of PEFT with what its merged models compute, for tests/checkpoint/test_lora.py.

    pip install peft transformers && python tests/oracles/record_lora.py

tests/oracles/lora/base is a ViT of transformers; each other folder is what PEFT saves of an adapter for it,
with ``answer.safetensors`` in it: pixels, and the logits of PEFT's merge in float64.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import save_file

FOLDER = Path(__file__).parent / "lora"
CONFIG: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 4,
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": True,
        "target_modules": ["q_proj", "fc1", "o_proj"],
        "rank_pattern": {"layers.1.attention.q_proj": 2, "fc1": 3},
        "alpha_pattern": {"fc1": 5},
    },
    "own_head": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["classifier"]},
    "dora": {"r": 4, "use_dora": True, "target_modules": ["k_proj", "fc2"]},
    "convolution": {"r": 4, "target_modules": ["projection", "q_proj"], "bias": "all"},
    "own_biases": {"r": 4, "target_modules": ["q_proj"], "bias": "lora_only"},
    "lora_bias": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], "lora_bias": True},
    "all_linear": {"r": 2, "target_modules": "all-linear"},
}


def load(**changes: Any) -> Any:
    model = transformers.ViTForImageClassification
    return model.from_pretrained(FOLDER / "base", ignore_mismatched_sizes=True, **changes).double()


def record(case: str, seed: int) -> None:
    torch.manual_seed(seed)
    classes = {"num_labels": 3} if case == "own_head" else {}
    adapted = peft.get_peft_model(load(**classes).float(), peft.LoraConfig(**CASES[case]))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    folder = FOLDER / case
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink()
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text()) | {"base_model_name_or_path": "base"}
    path.write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n")
    merged = peft.PeftModel.from_pretrained(load(**classes), folder).double().merge_and_unload().eval()
    pixels = torch.randn(2, 3, 16, 16).half()
    with torch.inference_mode():
        output = merged(pixels.double()).logits
    save_file({"pixels": pixels, "output": output}, folder / "answer.safetensors")


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**CONFIG))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(FOLDER / "base")
    for seed, case in enumerate(CASES):
        record(case, seed)
    versions = {module.__name__: module.__version__ for module in (peft, torch, transformers)}
    (FOLDER / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")


if __name__ == "__main__":
    main()
