"""``vitdeploy verify``: exit codes, the table, JSON."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.helpers.bundles import WEIGHT, answer_images, random_image, write_bundle
from tests.helpers.commands import Run, in_a_process
from tests.helpers.exports import Exported
from vitdeploy.bundle.folder import Bundle

ORT = ("--backend", "onnxruntime")


def test_a_right_bundle(run: Run, bundle: Bundle) -> None:
    result = run("verify", bundle.root, *ORT, "--batch", "1,8")
    assert result.code == 0
    rows = [line for line in result.out.splitlines() if line.startswith("onnx-")]
    assert len(rows) == 4
    assert all(row.endswith("ok") for row in rows)
    assert "verified: 3 files intact" in result.out
    assert "hashes" in result.err


def test_json(run: Run, bundle: Bundle) -> None:
    result = run("verify", bundle.root, *ORT, "--json")
    assert result.code == 0
    assert result.document["ok"] is True
    assert len(result.document["parity"]) == 6
    assert all(record["passed"] for record in result.document["parity"])


def test_a_wrong_artifact_exits_5_with_the_table(run: Run, tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "w.bundle", weight=WEIGHT[:, ::-1].copy())
    result = run("verify", made.root, *ORT)
    assert result.code == 5
    assert result.out.count("FAILED") == 3
    assert "verified" not in result.out
    assert "error: " in result.err
    assert "relative error" in result.err
    as_json = run("verify", made.root, *ORT, "--json")
    assert as_json.code == 5
    assert as_json.document["ok"] is False
    assert as_json.document["error"]["kind"] == "ParityError"
    assert not any(record["passed"] for record in as_json.document["parity"])


def test_nan_is_counted(run: Run, tmp_path: Path) -> None:
    weight = WEIGHT.copy()
    weight[0, 0] = np.nan
    result = run("verify", write_bundle(tmp_path / "n.bundle", weight=weight).root, *ORT, "--batch", 2)
    assert result.code == 5
    assert "FAILED, 8 NaN or Inf" in result.out
    assert "8 NaN or infinite values" in result.err


@pytest.mark.slow
def test_tables_are_never_cut(bundle: Bundle) -> None:
    narrow = in_a_process("verify", bundle.root, *ORT, COLUMNS="40")
    assert "…" not in narrow.out
    assert "onnx-fp16  onnxruntime" in narrow.out


def test_a_changed_byte_exits_2(run: Run, bundle: Bundle) -> None:
    path = bundle.root / "golden.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    result = run("verify", bundle.root)
    assert result.code == 2
    assert "golden.safetensors changed" in result.err


@pytest.mark.slow
def test_accuracy(run: Run, bundle: Bundle, tmp_path: Path) -> None:
    best = answer_images([random_image(seed) for seed in range(5)]).argmax(axis=1)
    for seed, label in enumerate(best):
        path = tmp_path / "data" / str(label) / f"{seed}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        random_image(seed).save(path)
    result = run("verify", bundle.root, *ORT, "--data", tmp_path / "data")
    assert "accuracy on 5 images" in result.out
    assert result.out.count("100.00 %") == 2
    document = run("verify", bundle.root, *ORT, "--data", tmp_path / "data", "--json").document
    assert [(a["correct"], a["images"], a["agree"]) for a in document["accuracy"]] == [(5, 5, 5)] * 2


@pytest.mark.parametrize(
    "flags, code, message",
    [
        (["--backend", "onnxrutnime"], 2, "did you mean 'onnxruntime'"),
        (["--backend", ","], 2, "names nothing"),
        (["--batch", "1,x"], 2, "--batch 1,x"),
        (["--batch", "64"], 2, "batch size 64"),
        (["--data", "nowhere"], 2, "nowhere"),
        (["--provider", "cuda"], 3, "no cuda provider"),
    ],
)
def test_errors(run: Run, bundle: Bundle, flags: list[str], code: int, message: str) -> None:
    result = run("verify", bundle.root, *flags)
    assert result.code == code
    assert message in result.err


@pytest.mark.slow
def test_the_digits_bundle_is_verified(run: Run, digits: Exported) -> None:
    from vitdeploy.data import digits_images

    result = run("verify", digits.folder, "--data", digits_images()[0].parent, *ORT)
    assert result.code == 0, result.err
