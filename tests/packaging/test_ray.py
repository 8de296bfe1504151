"""``--target ray``: the folder, held against Ray's own schema; what cannot be packaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.bundles import write_bundle
from vitdeploy.backends.aotinductor import AotInductor
from vitdeploy.backends.base import all_backends
from vitdeploy.backends.triton import Triton
from vitdeploy.bundle.folder import Bundle
from vitdeploy.config import BatchRange
from vitdeploy.errors import UsageError
from vitdeploy.packaging.target import PackageSettings
from vitdeploy.packaging.write import write_package
from vitdeploy.ray.serving import DEPLOYMENT, DeploymentSettings


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "linear", precisions=("fp32", "fp16"), batch=BatchRange(1, 4, 16))


def packaged(bundle: Bundle, **settings: Any) -> tuple[Path, dict[str, Any]]:
    """The folder, and its Serve config as Ray's own schema reads it."""
    from ray.serve.schema import ServeDeploySchema

    output = bundle.root.parent / "package"
    write_package(bundle, "ray", output, settings=PackageSettings(**settings), force=output.exists())
    document = yaml.safe_load((output / "serve_config.yaml").read_text())
    ServeDeploySchema(**document)
    return output, document


@pytest.mark.slow
def test_the_folder(bundle: Bundle) -> None:
    output, document = packaged(bundle)
    assert {"app.py", "serve_config.yaml", "README.md", "model.bundle"} <= {p.name for p in output.iterdir()}
    copied = Bundle.open(output / "model.bundle")
    copied.verify()
    assert copied.manifest == bundle.manifest
    (app,) = document["applications"]
    assert app["import_path"] == "app:build"
    settings = DeploymentSettings(**app["args"])
    assert (settings.name, settings.version, settings.backend) == ("linear", "1", "onnxruntime")
    assert (settings.artifact, settings.max_batch, settings.provider) == ("onnx-fp32", 4, None)
    (deployment,) = app["deployments"]
    assert deployment["name"] == DEPLOYMENT
    assert deployment["ray_actor_options"] == {"num_cpus": 1, "num_gpus": 0}
    assert deployment["max_ongoing_requests"] == 8
    scaling = deployment["autoscaling_config"]
    assert scaling == {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 4}
    readme = (output / "README.md").read_text()
    assert "/v1/models/linear:predict" in readme
    assert "${" not in readme


@pytest.mark.slow
def test_every_setting(bundle: Bundle) -> None:
    _, document = packaged(
        bundle, threads=3, max_batch=16, max_delay_ms=0, top_k=2, min_replicas=0, max_replicas=7
    )
    (app,) = document["applications"]
    settings = DeploymentSettings(**app["args"])
    assert (settings.threads, settings.max_batch, settings.max_delay_ms, settings.top_k) == (3, 16, 0, 2)
    (deployment,) = app["deployments"]
    assert deployment["ray_actor_options"]["num_cpus"] == 3
    assert deployment["autoscaling_config"]["min_replicas"] == 0
    assert deployment["autoscaling_config"]["max_replicas"] == 7
    _, document = packaged(bundle, min_replicas=9)
    assert document["applications"][0]["deployments"][0]["autoscaling_config"]["max_replicas"] == 9


@pytest.mark.slow
def test_a_gpu(bundle: Bundle) -> None:
    _, document = packaged(bundle, device="gpu")
    (app,) = document["applications"]
    assert app["args"]["provider"] == "cuda"
    assert app["deployments"][0]["ray_actor_options"]["num_gpus"] == 1


@pytest.mark.slow
def test_every_backend_brings_its_extra(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in all_backends():
        monkeypatch.setattr(type(backend), "supports", lambda *_: None)
        output, document = packaged(bundle, backend=backend.name)
        extras = ",".join(("ray", *backend.traits.extras))
        assert f'pip install "vitdeploy[{extras}]"\n' in (output / "README.md").read_text()
        (app,) = document["applications"]
        gpus = app["deployments"][0]["ray_actor_options"]["num_gpus"]
        assert (app["args"]["backend"], gpus) == (backend.name, int(backend.traits.needs_gpu))


@pytest.mark.slow
def test_a_backend_for_gpus_only(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Triton, "supports", lambda *_: None)
    with pytest.raises(UsageError, match="onnx-fp32: the triton backend runs on a GPU only"):
        packaged(bundle, backend="triton", device="cpu")


def test_the_next_command_installs_the_backend(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AotInductor, "supports", lambda *_: None)
    settings = PackageSettings(backend="aotinductor")
    made = write_package(bundle, "ray", bundle.root.parent / "package", settings=settings)
    assert made.next[0] == 'pip install "vitdeploy[ray,export]"'


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_batch": 17}, "--max-batch 17: onnx-fp32 takes at most 16 images"),
        ({"backend": "openvino", "device": "gpu"}, "not with the openvino backend"),
        ({"namespace": "x"}, "takes no --namespace"),
        ({"min_replicas": 3, "max_replicas": 2}, "--min-replicas 3 is more than"),
    ],
)
def test_what_does_not_fit(bundle: Bundle, settings: dict[str, Any], message: str) -> None:
    output = bundle.root.parent / "package"
    with pytest.raises(UsageError, match=message):
        write_package(bundle, "ray", output, settings=PackageSettings(**settings))
    assert not output.exists()


def test_no_classes(tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "f", output="features", labels=None)
    with pytest.raises(UsageError, match="no classes of an image"):
        write_package(made, "ray", tmp_path / "package")


@pytest.mark.parametrize("name", ["on", "123", "1e3", "a.b-c_d", "null"])
def test_names_stay_text_in_yaml(bundle: Bundle, name: str, tmp_path: Path) -> None:
    write_package(bundle, "ray", tmp_path / "p", name=name, version=7)
    (app,) = yaml.safe_load((tmp_path / "p" / "serve_config.yaml").read_text())["applications"]
    assert (app["name"], app["args"]["name"], app["args"]["version"]) == (name, name, "7")
