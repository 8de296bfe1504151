"""The peers' side of the measurement: environments, files, cases, and the command that runs them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.peers import environments, run
from benchmarks.peers.catalogue import PEERS
from benchmarks.peers.common import exported, size_of
from benchmarks.peers.environments import EnvironmentFailure, ensure, requirements, run_command
from benchmarks.peers.timm_ort import timm_weights
from vitdeploy.errors import UsageError


class Shell:
    """Stands in for venv and pip: makes the interpreter, remembers the commands."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []

    def __call__(self, command: Sequence[str]) -> None:
        self.commands.append(list(command))
        if command[2] == "venv":
            python = Path(command[3], "bin", "python")
            python.parent.mkdir(parents=True)
            python.touch()


def test_an_environment_is_made_once(tmp_path: Path) -> None:
    shell = Shell()
    python = ensure("timm", tmp_path, shell)
    assert python == tmp_path / ".venv-peers-timm" / "bin" / "python"
    assert [command[1:3] for command in shell.commands] == [["-m", "venv"], ["-m", "pip"], ["-m", "pip"]]
    assert str(requirements("timm")) in shell.commands[1]
    assert ensure("timm", tmp_path, shell) == python
    assert len(shell.commands) == 3


def test_an_environment_is_made_anew_for_other_pins(tmp_path: Path) -> None:
    shell = Shell()
    python = ensure("timm", tmp_path, shell)
    (python.parents[1] / ".made-from").write_text("torch==1.0\n")
    ensure("timm", tmp_path, shell)
    assert len(shell.commands) == 6


def test_an_environment_that_fails_is_not_taken_for_made(tmp_path: Path) -> None:
    shell = Shell()

    def failing(command: Sequence[str]) -> None:
        if command[2] == "pip":
            raise EnvironmentFailure("no network")
        shell(command)

    with pytest.raises(EnvironmentFailure, match="no network"):
        ensure("optimum", tmp_path, failing)
    ensure("optimum", tmp_path, shell)
    assert len(shell.commands) == 4


def test_a_failed_command_says_its_last_words() -> None:
    with pytest.raises(EnvironmentFailure, match=r"ended with 3: .*no such package"):
        run_command(["sh", "-c", "echo no such package; exit 3"])


@pytest.mark.parametrize("name", environments.NAMES)
def test_requirements_are_pinned(name: str) -> None:
    lines = requirements(name).read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert pins
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", pin) for pin in pins)


def test_every_peer_has_a_file_an_environment_and_a_place_of_its_own() -> None:
    folder = Path(environments.__file__).parent
    for peer in PEERS.values():
        assert (folder / f"{peer.module}.py").is_file()
        assert peer.environment is None or peer.environment in environments.NAMES
    assert len({(p.backend, p.runtime, p.artifact) for p in PEERS.values()}) == len(PEERS)


def test_an_export_is_made_once_and_whole_or_not_at_all(tmp_path: Path) -> None:
    job = {"workdir": str(tmp_path / "files")}

    def broken(folder: Path) -> None:
        (folder / "half").touch()
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        exported(job, "tool", ("numpy",), broken)
    assert list((tmp_path / "files").iterdir()) == []

    def whole(folder: Path) -> None:
        (folder / "model").write_text("model")

    folder = exported(job, "tool", ("numpy",), whole)
    assert size_of(folder) == 5
    assert exported(job, "tool", ("numpy",), broken) == folder


@pytest.mark.slow
def test_timm_gets_every_weight_under_its_own_names() -> None:
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    names = [
        *(f"embeddings.{name}" for name in ("cls_token", "position_embeddings")),
        *(f"embeddings.patch_embeddings.projection.{kind}" for kind in ("weight", "bias")),
        *(f"layernorm.{kind}" for kind in ("weight", "bias")),
    ]
    layer = [
        *(f"attention.attention.{part}" for part in ("query", "key", "value")),
        *("attention.output.dense", "intermediate.dense", "output.dense"),
        *("layernorm_before", "layernorm_after"),
    ]
    names += [
        f"encoder.layer.{i}.{part}.{kind}" for i in (0, 1) for part in layer for kind in ("weight", "bias")
    ]
    saved = {f"vit.{name}": torch.full((4,), float(i)) for i, name in enumerate(names)}
    saved |= {f"classifier.{kind}": torch.zeros(4) for kind in ("weight", "bias")}
    found = timm_weights(saved, depth=2)
    assert sum(tensor.numel() for tensor in found.values()) == sum(
        tensor.numel() for tensor in saved.values()
    )
    assert len(ViTForImageClassification(config).state_dict()) == len(saved)
    query = saved["vit.encoder.layer.1.attention.attention.query.bias"]
    assert torch.equal(found["blocks.1.attn.qkv.bias"][:4], query)
    out = saved["vit.encoder.layer.1.attention.output.dense.weight"]
    assert torch.equal(found["blocks.1.attn.proj.weight"], out)
    assert torch.equal(found["blocks.0.mlp.fc2.bias"], saved["vit.encoder.layer.0.output.dense.bias"])


def test_the_command_line() -> None:
    wanted = run.parse(["--models", "vit_tiny_patch16_224", "--peers", "timm,optimum", "--batches", "1,8"])
    assert (wanted.models, wanted.peers) == (("vit_tiny_patch16_224",), ("timm", "optimum"))
    assert (wanted.batches, wanted.budget, wanted.threads) == ((1, 8), None, 2)
    assert wanted.file("m") == run.RESULTS / "cpu-m.json"
    assert run.parse([]).models == tuple(run.SIZES)
    assert run.parse([]).peers is None
    with pytest.raises(UsageError, match="no peer 'tim'"):
        run.parse(["--peers", "tim"])


def test_nothing_is_measured_for_results_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(["--models", "vit_tiny_patch16_224", "--output", str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err
