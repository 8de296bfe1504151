"""The InferenceService: what it says, and that KServe's own Python models take every word of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.bundles import write_bundle
from tests.helpers.kserve import in_kserve_python
from tests.helpers.quantised_bundles import write_quantised
from vitdeploy.bundle.folder import Bundle
from vitdeploy.errors import MissingDependency, UsageError
from vitdeploy.packaging.kserve import SERVICE, _resources
from vitdeploy.packaging.write import Package

Make = Callable[..., Package]
URI = "s3://models/linear"


def model_config(path: Path) -> Any:
    """A model's configuration, as the server reads it."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    return text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())


def service(package: Package) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((package.folder / SERVICE).read_text(encoding="utf-8"))
    return found


def test_the_service(package: Make, bundle: Bundle) -> None:
    made = package(bundle, "kserve", storage_uri=URI + "/", threads=4, instances=2, namespace="vision")
    found = service(made)
    assert (found["apiVersion"], found["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    assert found["metadata"]["name"] == "linear"
    assert found["metadata"]["namespace"] == "vision"
    assert found["metadata"]["annotations"]["vitdeploy-bundle"] == bundle.manifest.digest
    predictor = found["spec"]["predictor"]
    assert (predictor["minReplicas"], predictor["maxReplicas"]) == (1, 3)
    model = predictor["model"]
    assert model["modelFormat"] == {"name": "triton", "version": "2"}
    assert (model["protocolVersion"], model["storageUri"]) == ("v2", URI)
    assert model["runtimeVersion"].endswith("-py3")
    assert model["resources"]["requests"] == model["resources"]["limits"] == {"cpu": "8", "memory": "2Gi"}
    assert (made.folder / "models/linear/config.pbtxt").exists()
    assert any(URI in line for line in made.next)


def test_a_quantised_service(package: Make, tmp_path: Path) -> None:
    made = package(write_quantised(tmp_path / "b"), "kserve", storage_uri=URI, artifact="int8")
    annotations = service(made)["metadata"]["annotations"]
    assert annotations["vitdeploy-artifact"] == "onnx-int8"
    config = model_config(made.folder / "models/linear/config.pbtxt")
    assert config.parameters["vitdeploy_artifact"].string_value == "onnx-int8"
    assert config.output[0].label_filename == "labels.txt"


def test_the_server_starts_the_threads_that_the_service_asks_for(package: Make, bundle: Bundle) -> None:
    """On the CPU; ORT's own processors would be those of the node, not of the pod."""
    for number, (given, threads, instances, cpus) in enumerate(
        [({}, 2, 1, "2"), ({"threads": 3}, 3, 1, "3"), ({"instances": 2}, 2, 2, "4")]
    ):
        made = package(bundle, "kserve", str(number), storage_uri=URI, **given)
        model = service(made)["spec"]["predictor"]["model"]
        assert model["resources"]["requests"]["cpu"] == model["resources"]["limits"]["cpu"] == cpus
        environment = {one["name"]: one["value"] for one in model["env"]}
        assert environment == {"ORT_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": str(threads)}
        config = model_config(made.folder / "models/linear/config.pbtxt")
        assert config.parameters["intra_op_thread_count"].string_value == str(threads)
        assert config.instance_group[0].count == instances
    on_gpu = service(package(bundle, "kserve", "gpu", storage_uri=URI, device="gpu", artifact="fp16"))
    assert on_gpu["spec"]["predictor"]["model"]["env"] == [{"name": "ORT_DISABLE_TELEMETRY", "value": "1"}]


def test_image_files_need_an_image(package: Make, bundle: Bundle) -> None:
    plain = package(bundle, "kserve", "a", storage_uri=URI)
    assert [path.name for path in (plain.folder / "models").iterdir()] == ["linear"]
    assert any("--image" in note for note in plain.notes)
    assert not (plain.folder / "Dockerfile").exists()
    made = package(bundle, "kserve", "b", storage_uri=URI, image="registry.example/triton-pillow:1")
    assert (made.folder / "models/linear_image/config.pbtxt").exists()
    assert "pillow==" in (made.folder / "Dockerfile").read_text()
    predictor = service(made)["spec"]["predictor"]
    assert predictor["model"]["image"] == "registry.example/triton-pillow:1"
    assert "runtimeVersion" not in predictor["model"]
    assert predictor["volumes"][0]["name"] == predictor["model"]["volumeMounts"][0]["name"]


def test_scaling(package: Make, bundle: Bundle) -> None:
    found = service(package(bundle, "kserve", storage_uri=URI, min_replicas=0, max_replicas=9, instances=2))
    assert found["spec"]["predictor"]["minReplicas"] == 0
    assert found["spec"]["predictor"]["maxReplicas"] == 9
    assert found["metadata"]["annotations"]["autoscaling.knative.dev/target"] == "4"
    many = service(package(bundle, "kserve", "b", storage_uri=URI, min_replicas=5))
    assert many["spec"]["predictor"]["maxReplicas"] == 5


def test_a_gpu_is_asked_for(package: Make, bundle: Bundle) -> None:
    found = service(package(bundle, "kserve", storage_uri=URI, device="gpu", artifact="fp16"))
    limits = found["spec"]["predictor"]["model"]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "1"
    assert _resources.__doc__


def test_names_that_clusters_allow(package: Make, tmp_path: Path) -> None:
    made = package(write_bundle(tmp_path / "b.bundle", name="ViT_B.16"), "kserve", storage_uri=URI)
    assert service(made)["metadata"]["name"] == "vit-b-16"
    assert (made.folder / "models/ViT_B.16/config.pbtxt").exists()
    assert any("vit-b-16" in note for note in made.notes)


@pytest.mark.parametrize(
    "uri",
    [
        None,
        "",
        "models/linear",
        "/models",
        "file:///models",
        "S3://models",
        "s3://",
        "s3:///models",
        "s3://a b",
        "s3://a\nkind: Secret",
        "s3://a/../b",
        "https://example.com/models",
    ],
)
def test_places_that_are_refused(package: Make, bundle: Bundle, uri: str | None) -> None:
    with pytest.raises(UsageError, match="storage-uri") as caught:
        package(bundle, "kserve", storage_uri=uri)
    assert caught.value.hint


@pytest.mark.parametrize(
    "uri, command",
    [
        ("s3://a/b", "aws s3 sync models s3://a/b"),
        ("gs://a/b", "gcloud storage rsync"),
        ("pvc://claim/b", "kubectl cp models/. POD:/mnt/b"),
        ("https://example.com/models.tar.gz", "tar -czf"),
        ("https://me.blob.core.windows.net/c/b", "# copy what is in models/"),
        ("hf://me/models", "# copy what is in models/"),
    ],
)
def test_places(package: Make, bundle: Bundle, uri: str, command: str) -> None:
    made = package(bundle, "kserve", storage_uri=uri)
    assert command in (made.folder / "README.md").read_text()
    assert service(made)["spec"]["predictor"]["model"]["storageUri"] == uri


@pytest.mark.parametrize("namespace", ["", "A", "a_b", "-a", "a\nb", "a" * 64])
def test_namespaces_that_are_refused(package: Make, bundle: Bundle, namespace: str) -> None:
    with pytest.raises(UsageError, match="namespace"):
        package(bundle, "kserve", storage_uri=URI, namespace=namespace)


def test_the_readme_s_shell(package: Make, bundle: Bundle) -> None:
    made = package(bundle, "kserve", storage_uri=URI, namespace="vision", image="r/t:1")
    text = (made.folder / "README.md").read_text()
    for block in text.split("```\n")[1::2]:
        done = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True, check=False)
        assert done.returncode == 0, (block, done.stderr)
    assert "kubectl get -n vision inferenceservice linear" in text
    assert "docker build -t r/t:1 ." in text


def test_without_yaml(package: Make, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(MissingDependency) as caught:
        package(bundle, "kserve", storage_uri=URI)
    assert caught.value.hint == 'pip install "vitdeploy[package]"'


# --- KServe's own models -----------------------------------------------------------------------------

# Reads documents with the class that KServe's Python client generates from its schema. The client leaves out
# what a class does not know, so a document has to come back as it went in.
_READ = """
import json, sys
from types import SimpleNamespace
from kubernetes.client import ApiClient
from kserve import models
client = ApiClient()
import kserve.models, kubernetes.client.models
for name in dir(kserve.models):
    setattr(kubernetes.client.models, name, getattr(kserve.models, name))
answers = []
for document in json.load(sys.stdin):
    try:
        read = client.deserialize(SimpleNamespace(data=json.dumps(document)), "V1beta1InferenceService")
        answers.append(client.sanitize_for_serialization(read))
    except Exception as error:
        answers.append(f"{type(error).__name__}: {error}")
json.dump(answers, sys.stdout)
"""


def kserve_reads(documents: list[dict[str, Any]]) -> list[Any]:
    """What KServe's models make of documents."""
    found: list[Any] = in_kserve_python(_READ, stdin=json.dumps(documents))
    return found


@pytest.mark.slow
def test_kserve_s_own_models_take_every_word(package: Make, bundle: Bundle) -> None:
    documents = [
        service(package(bundle, "kserve", "a", storage_uri=URI)),
        service(package(bundle, "kserve", "b", storage_uri=URI, image="r/t:1", namespace="vision")),
        service(
            package(bundle, "kserve", "c", storage_uri=URI, device="gpu", min_replicas=0, max_replicas=8)
        ),
    ]
    wrong = json.loads(json.dumps(documents[0]))
    wrong["spec"]["predictor"]["minReplica"] = 1
    worse = json.loads(json.dumps(documents[0]))
    del worse["spec"]["predictor"]["model"]["modelFormat"]
    read = kserve_reads([*documents, wrong, worse])
    for one in read[:-1]:
        assert one["spec"]["predictor"]["model"].pop("name") == ""  # a default of theirs
    assert read[: len(documents)] == documents
    assert read[-2] != wrong  # the comparison does notice a word that KServe does not know
    assert isinstance(read[-1], str)
    assert "model_format" in read[-1]
