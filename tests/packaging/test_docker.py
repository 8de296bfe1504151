"""The image's recipe, read as far as it can be without a Docker daemon."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
import urllib.request
import venv
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from tests.helpers.bundles import write_bundle
from tests.helpers.commands import in_a_process
from tests.helpers.paths import ROOT
from tests.helpers.triton_server import free_ports
from vitdeploy.backends.base import all_backends
from vitdeploy.bundle.folder import Bundle
from vitdeploy.data import digits_images
from vitdeploy.errors import UsageError
from vitdeploy.packaging.docker import BUNDLE
from vitdeploy.packaging.write import Package

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
    settings = {"threads": 3, "instances": 2, "max_batch": 4, "max_delay_ms": 1.5}
    made = package(bundle, "docker", name="eyes", version=4, **settings)
    path = made.folder / "Dockerfile"
    assert values(path, "FROM") == ["python:3.11-slim"]
    assert values(path, "USER") == ["10001"]
    assert values(path, "EXPOSE") == ["8000 8001"]
    order = [name for name, _ in instructions(path)]
    assert order.index("USER") < order.index("CMD")
    assert served(made)[:3] == ["vitdeploy", "serve", f"eyes@4={BUNDLE}"]
    command = [word for word in served(made)[3:] if word != "--fixed-models"]
    flags = dict(zip(command[::2], command[1::2], strict=True))
    assert flags == {
        "--host": "0.0.0.0",
        "--port": "8000",
        "--grpc-port": "8001",
        "--backend": "onnxruntime",
        "--artifact": "onnx-fp32",
        "--threads": "3",
        "--instances": "2",
        "--max-batch": "4",
        "--max-delay-ms": "1.5",
    }


def test_threads_are_the_server_s_and_the_container_s(package: Make, bundle: Bundle) -> None:
    made = package(bundle, "docker", "a", threads=3, instances=2)
    environment = dict(one.split("=", 1) for one in shlex.split(values(made.folder / "Dockerfile", "ENV")[0]))
    assert environment["ORT_DISABLE_TELEMETRY"] == "1"
    assert environment["OMP_NUM_THREADS"] == "3"
    compose = yaml.safe_load((made.folder / "compose.yaml").read_text())
    assert compose["services"]["vitdeploy"]["cpus"] == 7  # and one for what decodes
    # Without a number, the server finds out what its container gives it.
    plain = package(bundle, "docker", "b")
    assert "OMP_NUM_THREADS" not in (plain.folder / "Dockerfile").read_text()
    assert "cpus" not in yaml.safe_load((plain.folder / "compose.yaml").read_text())["services"]["vitdeploy"]
    assert "--threads" not in served(plain)


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
    assert (wanted.name, wanted.extras) == ("vitdeploy", {"serve", "grpc"})
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
    assert wanted.extras == {"serve", "grpc", backend}
    assert served(made)[served(made).index("--backend") + 1] == backend


def test_every_backend_has_its_extra() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for traits in (backend.traits for backend in all_backends()):
        required = [
            Requirement(line).name
            for extra in traits.extras
            for line in project["optional-dependencies"][extra]
        ]
        core = [Requirement(line).name for line in project["dependencies"]]
        assert set(traits.libraries) <= set(required or core), traits.name


def test_a_wheel(package: Make, bundle: Bundle, tmp_path: Path) -> None:
    wheel = tmp_path / "vitdeploy-0.1.0-py3-none-any.whl"
    wheel.write_bytes(b"a wheel")
    made = package(bundle, "docker", wheel=str(wheel))
    assert (made.folder / wheel.name).read_bytes() == b"a wheel"
    wanted = Requirement((made.folder / "requirements.txt").read_text().strip())
    assert wanted.url == f"file:///app/{wheel.name}"
    assert wanted.extras == {"serve", "grpc"}


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


@pytest.mark.slow
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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_the_recipe_without_a_container(package: Make, digits: Bundle, wheel: Path, tmp_path: Path) -> None:
    """What the Dockerfile installs into an empty environment, then CMD and HEALTHCHECK, on other ports."""
    made = package(digits, "docker", threads=1, wheel=str(wheel))
    python = tmp_path / "env/bin/python"
    venv.create(tmp_path / "env", with_pip=False)
    wanted = tmp_path / "requirements.txt"
    wanted.write_text((made.folder / "requirements.txt").read_text().replace("/app/", f"{made.folder}/"))
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-compile"]
    install = [*pip, "--constraint", "constraints.txt", "--requirement", wanted]
    done = subprocess.run(install, cwd=made.folder, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    packaging = ["package", digits.root, "--target", "triton-server", "-o", tmp_path / "triton"]
    subprocess.run([python.with_name("vitdeploy"), *packaging], check=True)  # the templates are in the wheel
    http, grpc = free_ports(2)
    moved = {"8000": str(http), "8001": str(grpc), "0.0.0.0": "127.0.0.1"}
    command = [moved.get(word, word) for word in served(made)]
    (check,) = values(made.folder / "Dockerfile", "HEALTHCHECK")
    healthy = json.loads(check.partition("CMD ")[2])[2].replace(":8000", f":{http}")
    with (tmp_path / "log.txt").open("w+") as log:
        process = subprocess.Popen(
            [python.with_name(command[0]), *command[1:]],
            cwd=made.folder,
            stderr=log,
            env={"PATH": str(python.parent)},
        )
        try:
            wait_until_healthy(process, [str(python), "-c", healthy], tmp_path / "log.txt")
            for url in (f"http://127.0.0.1:{http}", f"grpc://127.0.0.1:{grpc}"):
                verified = in_a_process("verify", digits.root, "--url", url, "--json")
                assert verified.code == 0, verified.err
            image = digits_images()[0]
            place = f"http://127.0.0.1:{http}/v1/models/digits:predict"
            request = urllib.request.Request(place, image.read_bytes(), {"Content-Type": "image/png"})
            with urllib.request.urlopen(request, timeout=120) as response:
                said = json.load(response)
            assert said["predictions"][0][0]["label"] == image.name[0]
        finally:
            process.terminate()
            assert process.wait(60) == 0


def wait_until_healthy(process: subprocess.Popen[bytes], check: list[str], log: Path) -> None:
    end = time.monotonic() + 60
    while subprocess.run(check, capture_output=True, check=False).returncode:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.2)


def test_commands_that_servers_know(package: Make, tmp_path: Path) -> None:
    """Every flag in CMD is one that `vitdeploy serve` has."""
    import typer

    from vitdeploy.cli.app import build

    commands: Any = typer.main.get_command(build())
    flags = {flag for parameter in commands.commands["serve"].params for flag in parameter.opts}
    made = package(write_bundle(tmp_path / "b.bundle"), "docker", threads=1, max_batch=2, max_delay_ms=3.0)
    assert {word for word in served(made) if word.startswith("--")} <= flags
