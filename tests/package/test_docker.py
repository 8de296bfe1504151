"""The image's recipe, read as far as it can be without a Docker daemon."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from bundles import write_bundle
from packaging.requirements import Requirement

from vitdeploy.backends.base import backend_names
from vitdeploy.bundle import Bundle
from vitdeploy.errors import UsageError
from vitdeploy.package.docker import BUNDLE, EXTRAS
from vitdeploy.package.run import Package

Make = Callable[..., Package]
_KNOWN = {"FROM", "ENV", "RUN", "WORKDIR", "COPY", "USER", "EXPOSE", "HEALTHCHECK", "CMD"}


def instructions(path: Path) -> list[tuple[str, str]]:
    """A Dockerfile's instructions and what follows each, with continued lines joined."""
    text = re.sub(r"^#.*\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    found = [tuple(line.split(maxsplit=1)) for line in lines]
    assert {name for name, _ in found} <= _KNOWN
    return found  # type: ignore[return-value]


def values(path: Path, name: str) -> list[str]:
    return [value for instruction, value in instructions(path) if instruction == name]


def served(package: Package) -> list[str]:
    (command,) = values(package.folder / "Dockerfile", "CMD")
    found: list[str] = json.loads(command)
    return found


def test_the_dockerfile(package: Make, bundle: Bundle) -> None:
    made = package(bundle, "docker", name="eyes", version=4, threads=3, max_batch=4, max_delay_ms=1.5)
    path = made.folder / "Dockerfile"
    assert values(path, "FROM") == ["python:3.11-slim"]
    assert values(path, "USER") == ["10001"]
    assert values(path, "EXPOSE") == ["8000 8001"]
    order = [name for name, _ in instructions(path)]
    assert order.index("USER") < order.index("CMD")
    assert served(made)[:3] == ["vitdeploy", "serve", f"eyes@4={BUNDLE}"]
    flags = dict(zip(served(made)[3::2], served(made)[4::2], strict=True))
    assert flags == {
        "--host": "0.0.0.0",
        "--port": "8000",
        "--grpc-port": "8001",
        "--backend": "onnxruntime",
        "--artifact": "onnx-fp32",
        "--threads": "3",
        "--max-batch": "4",
        "--max-delay-ms": "1.5",
    }


def test_the_health_check_runs(package: Make, bundle: Bundle) -> None:
    (check,) = values(package(bundle, "docker").folder / "Dockerfile", "HEALTHCHECK")
    command = json.loads(check.partition("CMD ")[2])
    assert command[:2] == ["python", "-c"]
    compile(command[2], "HEALTHCHECK", "exec")
    assert "/v2/health/ready" in command[2]
    assert all(flag.startswith("--") for flag in shlex.split(check.partition("CMD ")[0]))


def test_what_is_copied_is_there_and_not_ignored(package: Make, bundle: Bundle, tmp_path: Path) -> None:
    wheel = tmp_path / "vitdeploy-0.1.0-py3-none-any.whl"
    wheel.write_bytes(b"a wheel")
    for folder, settings in (("a", {}), ("b", {"wheel": str(wheel)})):
        made = package(bundle, "docker", folder, **settings)
        ignored = (made.folder / ".dockerignore").read_text().splitlines()
        assert ignored[0] == "*"
        allowed = {line.removeprefix("!") for line in ignored[1:]}
        for copied in values(made.folder / "Dockerfile", "COPY"):
            *sources, _ = copied.split()
            for source in sources:
                assert (made.folder / source).exists(), source
                assert source.rstrip("/") in allowed


def test_the_bundle_is_complete(package: Make, bundle: Bundle) -> None:
    (bundle.root / "stray.txt").write_text("not listed")
    made = package(bundle, "docker")
    copy = Bundle.open(made.folder / BUNDLE)
    copy.verify()
    assert copy.manifest == bundle.manifest
    assert not (made.folder / BUNDLE / "stray.txt").exists()


def test_only_what_runs_is_installed(package: Make, bundle: Bundle) -> None:
    made = package(bundle, "docker")
    (line,) = (made.folder / "requirements.txt").read_text().splitlines()
    wanted = Requirement(line)
    assert (wanted.name, wanted.extras) == ("vitdeploy", {"serve"})
    assert str(wanted.specifier) == f"=={version('vitdeploy')}"
    pins = [Requirement(line) for line in (made.folder / "constraints.txt").read_text().splitlines()]
    for pin in pins:
        assert re.fullmatch(r"==[0-9][0-9a-z.]*", str(pin.specifier))
        assert version(pin.name).partition("+")[0] == str(pin.specifier)[2:]
    assert {"numpy", "pillow", "onnxruntime"} <= {pin.name for pin in pins}


@pytest.mark.parametrize("backend", ["openvino", "torch"])
def test_a_backend_brings_its_extra(package: Make, bundle: Bundle, backend: str) -> None:
    if backend == "torch":
        with pytest.raises(UsageError, match="cannot run"):  # the linear classifier is no ViT
            package(bundle, "docker", backend=backend)
        return
    made = package(bundle, "docker", backend=backend)
    wanted = Requirement((made.folder / "requirements.txt").read_text().strip())
    assert wanted.extras == {"serve", backend}
    assert served(made)[served(made).index("--backend") + 1] == backend


def test_every_backend_has_its_extra() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parent.parent.parent / "pyproject.toml").read_text())["project"]
    assert set(EXTRAS) == set(backend_names())
    assert {name for names in EXTRAS.values() for name in names} <= set(project["optional-dependencies"])


def test_a_wheel(package: Make, bundle: Bundle, tmp_path: Path) -> None:
    wheel = tmp_path / "vitdeploy-0.1.0-py3-none-any.whl"
    wheel.write_bytes(b"a wheel")
    made = package(bundle, "docker", wheel=str(wheel))
    assert (made.folder / wheel.name).read_bytes() == b"a wheel"
    wanted = Requirement((made.folder / "requirements.txt").read_text().strip())
    assert wanted.url == f"file:///app/{wheel.name}"
    assert wanted.extras == {"serve"}


@pytest.mark.parametrize(
    "name, message", [("none.whl", "no such file"), ("other-1-py3-none-any.whl", "not a wheel")]
)
def test_wheels_that_are_refused(
    package: Make, bundle: Bundle, tmp_path: Path, name: str, message: str
) -> None:
    if message != "no such file":
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UsageError, match=message):
        package(bundle, "docker", wheel=str(tmp_path / name))


def test_the_compose_files(package: Make, bundle: Bundle) -> None:
    for target, settings in (
        ("docker", {}),
        ("triton-server", {}),
        ("triton-server", {"tensors_only": True}),
        ("triton-server", {"device": "gpu", "artifact": "fp16"}),
    ):
        made = package(bundle, target, f"{target}{len(str(settings))}", **settings)
        (service,) = yaml.safe_load((made.folder / "compose.yaml").read_text())["services"].values()
        assert ("build" in service) == (made.folder / "Dockerfile").exists()
        assert ":" in service["image"] or "build" in service
        assert {str(port).partition(":")[0] for port in service["ports"]} >= {"8000", "8001"}
        assert ("deploy" in service) == ("device" in settings)
        for volume in service.get("volumes", []):
            assert (made.folder / volume.partition(":")[0]).is_dir()


def test_commands_that_servers_know(package: Make, tmp_path: Path) -> None:
    """Every flag in CMD is one that `vitdeploy serve` has."""
    import typer

    from vitdeploy.cli.app import build

    commands: Any = typer.main.get_command(build())
    flags = {flag for parameter in commands.commands["serve"].params for flag in parameter.opts}
    made = package(write_bundle(tmp_path / "b.bundle"), "docker", threads=1, max_batch=2, max_delay_ms=3.0)
    assert {word for word in served(made) if word.startswith("--")} <= flags
