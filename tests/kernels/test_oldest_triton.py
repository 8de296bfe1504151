"""The kernels in Triton 3.6's interpreter: the GPU machines' PyTorch brings that version."""

from __future__ import annotations

import re
from pathlib import Path

from tests.helpers import oldest_triton

CHOSEN = {
    "test_linear_residual.py": "plus_linear or ragged_tiles or extreme or layernorm_needs",
    "test_layernorm_linear.py": "is_layernorm_linear or ragged_tiles or activations",
    "test_attention.py": "lengths and 65",
    "test_layernorm_attention.py": "test_widths and 33",
    "test_absorbed.py": "2-17-33 or (test_head_linear and 17-2)",
    "test_patch_embed.py": "ragged_tiles or wide_tiles",
    "test_add_layernorm.py": "ragged_rows or extreme",
}
"""Of each kernel's tests those that reach most of its code, by pytest's -k."""


def test_it_is_that_version() -> None:
    done = oldest_triton.run(["-c", "import triton; print(triton.__version__)"])
    assert done.stdout.strip() == oldest_triton.VERSION, done.stderr


def test_every_kernel_computes_what_it_should() -> None:
    here = Path(__file__).parent
    names = [here / name for name in CHOSEN]
    expression = " or ".join(f"({name.removesuffix('.py')} and ({tests}))" for name, tests in CHOSEN.items())
    options = ["-x", "-q", "--tb=short", "-p", "no:cacheprovider", "-m", "not gpu"]
    done = oldest_triton.run(["-m", "pytest", *names, "-k", expression, *options])
    assert done.returncode == 0, done.stdout[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 2 * len(CHOSEN)
