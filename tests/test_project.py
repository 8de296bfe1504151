"""The promises of the project itself: what is installed, what an import costs, what a wheel holds."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from tests.helpers.environments import link, needed, normal
from tests.helpers.live_server import serving
from tests.helpers.paths import ROOT

PACKAGES = ("vitdeploy", "vitdeploy_kernels")
HEAVY = (
    "torch",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "openvino",
    "transformers",
    "timm",
    "tokenizers",
    "sklearn",
    "tensorrt_rtx",
    "cuda",
    "pyarrow",
    "ray",
    "starlette",
    "tritonclient",
)


def run(*command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=cwd, check=False)


def imported_by(code: str) -> set[str]:
    """Top-level names of the modules that are loaded after running ``code`` in a fresh interpreter."""
    done = run(sys.executable, "-c", f"{code}\nimport sys; print('LOADED', *sys.modules)")
    assert done.returncode == 0, done.stderr
    loaded = next(line for line in done.stdout.splitlines() if line.startswith("LOADED"))
    return {name.partition(".")[0] for name in loaded.split()[1:]}


def tracked_files() -> list[Path]:
    listed = run("git", "ls-files", "-z", cwd=ROOT)
    assert listed.returncode == 0, listed.stderr
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in files if path.is_file()]


def python_files() -> list[Path]:
    return [path for path in tracked_files() if path.suffix == ".py"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    done = run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return path


def test_wheel_holds_both_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    info = next(name.partition("/")[0] for name in names if ".dist-info/" in name)
    assert {name.partition("/")[0] for name in names} == {*PACKAGES, info}
    assert f"{info}/licenses/LICENSE" in names
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)


def test_wheel_holds_the_digits_model(wheel: Path) -> None:
    files = sorted(p for p in (ROOT / "vitdeploy/data/digits").rglob("*") if p.is_file())
    with zipfile.ZipFile(wheel) as archive:
        assert len(files) > 10
        for path in files:
            assert archive.read(path.relative_to(ROOT).as_posix()) == path.read_bytes()


def test_wheel_holds_the_report_s_template(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {"vitdeploy/benchmark/report.html", "vitdeploy/benchmark/report.css"} <= names
    assert {"vitdeploy/explanation/page.html", "vitdeploy/explanation/page.css"} <= names


@pytest.mark.slow
def test_wheel_installs_into_an_empty_environment(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    venv.create(tmp_path, with_pip=False)
    python = tmp_path / "bin" / "python"
    done = run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    assert done.returncode == 0, done.stdout + done.stderr
    query = "from importlib.metadata import files; print(*{str(f).split('/')[0] for f in files('vitdeploy')})"
    top = set(run(python, "-c", query, cwd=tmp_path).stdout.split())
    assert {name for name in top if ".dist-info" not in name and name != ".."} == set(PACKAGES)
    assert (tmp_path / "bin" / "vitdeploy").is_file()
    show = "import vitdeploy.errors, vitdeploy_kernels; print(vitdeploy.errors.__file__)"
    where = run(python, "-c", show, cwd=tmp_path)
    assert where.stdout.startswith(str(tmp_path)), where.stderr


@pytest.mark.slow
def test_wheel_exports_predicts_and_serves_in_an_environment_of_its_own(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``pip install vitdeploy[export,serve]``, but nothing is downloaded.

    Pip installs the wheel into a fresh environment. What it depends on is linked there from this one, and the
    wheel's own metadata says what that is: what the wheel lacks, or does not name, is not found.
    """
    venv.create(tmp_path / "venv", with_pip=False)
    python, command = tmp_path / "venv/bin/python", tmp_path / "venv/bin/vitdeploy"
    done = run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    assert done.returncode == 0, done.stdout + done.stderr
    (site,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    (installed,) = metadata.distributions(name="vitdeploy", path=[str(site)])
    for distribution in needed(installed, {"export", "serve"}):
        link(distribution, site)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(tmp_path)
    others = (
        "import importlib.util as u; print(*(n for n in ('openvino', 'ray', 'pytest') if u.find_spec(n)))"
    )
    assert run(python, "-c", others).stdout.split() == []

    done = run(command, "export", "-m", "digits", "-o", "digits.bundle")
    assert done.returncode == 0, done.stderr
    image = site / "vitdeploy/data/digits/images/3_0045.png"
    done = run(command, "predict", "digits.bundle", image, "--json")
    assert done.returncode == 0, done.stderr
    best = json.loads(done.stdout)["images"][0]["predictions"][0]
    assert best["label"] == "3"
    with serving("digits.bundle", "--port", "0", command=(str(command), "serve")) as server:
        reply = server.ask("POST", "/v1/models/digits:predict", image.read_bytes())
        assert server.ask("GET", "/").status == 200  # a page that the wheel has to hold
    assert reply.document["predictions"][0][0] == pytest.approx(best, abs=1e-6)


def test_public_names_are_pinned() -> None:
    import vitdeploy

    assert sorted(vitdeploy.__all__) == [
        "__version__",
        "add_engines",
        "bench",
        "explain",
        "export",
        "load",
        "verify",
    ]
    assert all(hasattr(vitdeploy, name) for name in vitdeploy.__all__)


@pytest.mark.slow
def test_every_module_is_reached_by_its_name() -> None:
    """After ``import vitdeploy.a.b``, ``vitdeploy.a.b`` is that module: no function hides a room."""
    for name in ("bench", "explain", "export", "load", "verify"):
        assert not (ROOT / "vitdeploy" / name).exists()
        assert not (ROOT / "vitdeploy" / f"{name}.py").exists()
    code = """
import functools, importlib, pkgutil, sys
import vitdeploy
public = {name: getattr(vitdeploy, name) for name in vitdeploy.__all__}
names = [found.name for found in pkgutil.walk_packages(vitdeploy.__path__, "vitdeploy.")]
for name in names:
    if name == "vitdeploy.__main__" or ".templates" in name:
        continue
    module = importlib.import_module(name)
    assert functools.reduce(getattr, name.split(".")[1:], vitdeploy) is module, name
assert len(names) > 100
assert all(getattr(vitdeploy, name) is value for name, value in public.items())
"""
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr


def test_version_is_said_once() -> None:
    import vitdeploy

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project
    assert vitdeploy.__version__ == metadata.version("vitdeploy")
    assert f"[{vitdeploy.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_a_plain_tree_imports(tmp_path: Path) -> None:
    """A copy of the packages that nobody installed, in an environment with nothing else in it."""
    shutil.copytree(ROOT / "vitdeploy", tmp_path / "vitdeploy", ignore=shutil.ignore_patterns("data"))
    code = "import vitdeploy; print(vitdeploy.__version__, vitdeploy.__file__)"
    done = run(sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}")
    assert done.stdout.split() == [metadata.version("vitdeploy"), f"{tmp_path}/vitdeploy/__init__.py"], (
        done.stderr
    )


def test_importing_the_package_is_light() -> None:
    assert imported_by("import vitdeploy").isdisjoint(HEAVY)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--help"], ["export", "--help"], ["predict", "--help"]], ids=" ".join)
def test_help_is_light(arguments: list[str]) -> None:
    code = f"""
import sys, vitdeploy.cli
sys.argv = ["vitdeploy", *{arguments!r}]
try:
    vitdeploy.cli.main()
except SystemExit as end:
    assert not end.code
"""
    assert imported_by(code).isdisjoint(HEAVY)


def test_constraints_pin_every_dependency_that_is_tested() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", pin) for pin in pins)
    pinned = {normal(pin.partition("==")[0]) for pin in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    tested = [*project["dependencies"]]
    for name in makefile_extras():
        tested += extras[name]
    assert {normal(re.split(r"[<>=\[]", line)[0]) for line in tested} <= pinned


def makefile_extras() -> list[str]:
    """What `make` installs, and with it the tests."""
    found = re.search(r"^EXTRAS := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert found is not None
    return found[1].split(",")


@pytest.mark.slow
def test_imports_go_one_way() -> None:
    done = run(Path(sys.executable).with_name("lint-imports"), "--no-cache", cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_nothing_names_the_machine_it_was_written_on() -> None:
    # Spelled in pieces, so that this file does not find itself.
    private = (
        "/" + "root/",
        "/" + "home/",
        "/" + "work/",
        "/" + "tmp/w",
        "files.python" + "hosted.org",
        "pypi" + ".org/simple",
    )
    found = []
    for path in tracked_files():
        content = path.read_bytes()
        found += [f"{path.relative_to(ROOT)}: {text}" for text in private if text.encode() in content]
    assert found == []
