"""The hub's folder: what transformers and ONNX Runtime load of it gives the bundle's answers."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

import vitdeploy
from tests.fakes.hub import FakeHub
from tests.helpers.bundles import write_bundle
from tests.helpers.card_code import card_programs
from tests.helpers.commands import in_a_process
from tests.helpers.hub_bundles import logits, model_bundle, photograph_files, photographs, random_pixels
from tests.helpers.hub_folders import hub_folder
from tests.helpers.small_bundles import siblings
from vitdeploy.bundle.folder import Bundle, BundleWriter
from vitdeploy.bundle.manifest import Artifact, SizeRecord, input_spec, output_specs
from vitdeploy.checkpoint.opening import Checkpoint, open_model
from vitdeploy.config import BatchRange, ModelConfig, Preprocess, Rotary, SwinConfig, ViTConfig
from vitdeploy.errors import BundleError, ExportError, MissingDependency, UsageError
from vitdeploy.images.preprocess import apply
from vitdeploy.packaging import hub_push
from vitdeploy.packaging.target import PackageSettings
from vitdeploy.packaging.write import MARKER, write_package
from vitdeploy.verification.local import verify_bundle

LABELS = ("one", "two", "three", "four", "five")
TINY = ViTConfig(
    width=48, depth=2, heads=4, mlp_width=96, image_size=(32, 32), patch_size=8, classes=5, norm_eps=1e-5
)
DINOV2 = replace(TINY, layer_scale=True, pool="cls_mean")
BEIT = replace(
    TINY, layer_scale=True, score_bias=True, key_bias=False, position="none", position_prefix=0, pool="mean",
    final_norm="pooled",
)  # fmt: skip
CLIP = replace(TINY, pre_norm=True, patch_bias=False, activation="quick_gelu")
SIGLIP = replace(TINY, cls_token=False, position_prefix=0, activation="gelu_tanh", pool="mean")
SWIN = SwinConfig(
    width=24, depths=(2, 2), heads=(2, 4), windows=((4, 4), (4, 4)), shifts=((2, 2), (2, 2)),
    image_size=(32, 32), classes=5,
)  # fmt: skip
MODELS: dict[str, tuple[str, ModelConfig]] = {
    "vit": ("ViTForImageClassification", TINY),
    "a ViT that is not square": ("ViTForImageClassification", replace(TINY, image_size=(48, 32))),
    "a ViT whose norm is said of CLS": ("ViTForImageClassification", replace(TINY, final_norm="pooled")),
    "a ViT without biases": ("ViTForImageClassification", replace(TINY, qkv_bias=False, activation="relu")),
    "deit": ("DeiTForImageClassification", replace(TINY, distillation_token=True, position_prefix=2)),
    "deit with its teacher": (
        "DeiTForImageClassificationWithTeacher",
        replace(TINY, distillation_token=True, position_prefix=2, pool="both_heads"),
    ),
    "dinov2": ("Dinov2ForImageClassification", DINOV2),
    "dinov2, gated": (
        "Dinov2ForImageClassification",
        replace(DINOV2, gated_mlp=True, activation="silu", mlp_width=128),
    ),
    "dinov2 with registers": ("Dinov2WithRegistersForImageClassification", replace(DINOV2, registers=3)),
    "beit": ("BeitForImageClassification", BEIT),
    "beit that reads CLS": (
        "BeitForImageClassification",
        replace(BEIT, position="learned", position_prefix=1, pool="cls", final_norm="tokens"),
    ),
    "swin": ("SwinForImageClassification", SWIN),
    "swin whose windows are said otherwise": (
        "SwinForImageClassification",
        replace(SWIN, window_rule="sides", pad_first=False),
    ),
    "swin v2": (
        "Swinv2ForImageClassification",
        replace(SWIN, version=2, shifts=((2, 2), (0, 0)), window_rule="fixed", mask=-200.0),
    ),
    "siglip": ("SiglipForImageClassification", SIGLIP),
    "clip": ("CLIPForImageClassification", replace(CLIP, pool="mean", final_norm="none")),
    "clip, zero-shot": (
        "CLIPZeroShotForImageClassification",
        replace(CLIP, final_norm="pooled", projection=24, head_on="embedding"),
    ),
    "siglip, zero-shot": (
        "SiglipZeroShotForImageClassification",
        replace(SIGLIP, pool="probe", head_on="embedding"),
    ),
}


@pytest.fixture(scope="session", autouse=True)
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where transformers copies the code of folders: not at home."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", folder)
        yield


def document(folder: Path, name: str = "config.json") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("what", MODELS)
def test_transformers_computes_the_same(what: str, tmp_path: Path) -> None:
    architecture, config = MODELS[what]
    own = "ZeroShot" in architecture
    bundle = model_bundle(tmp_path / "a.bundle", config, labels=LABELS)
    made = hub_folder(bundle, tmp_path / "out")
    model, report = AutoModelForImageClassification.from_pretrained(
        made.folder, output_loading_info=True, trust_remote_code=own
    )
    assert type(model).__name__ == architecture
    assert not any(report.values()), "every tensor is there, and no other"
    assert model.dtype == torch.float32
    model.save_pretrained(tmp_path / "again")
    ours, theirs = (load_file(f / "model.safetensors") for f in (made.folder, tmp_path / "again"))
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    pixels = random_pixels(config)
    with torch.inference_mode():
        found = model.eval()(pixel_values=pixels).logits
    expected = logits(config, pixels)
    assert (found - expected).norm() <= 2e-6 * expected.norm()
    assert [model.config.id2label[number] for number in range(5)] == list(LABELS)
    assert model.config.problem_type == "single_label_classification"
    assert Bundle.open(made.folder).manifest.model == config


@pytest.mark.parametrize("what", ["clip, zero-shot", "siglip, zero-shot", "vit"])
def test_a_hub_folder_is_exported_again(what: str, tmp_path: Path) -> None:
    _, config = MODELS[what]
    bundle = model_bundle(tmp_path / "a.bundle", config, labels=LABELS, scores="sigmoid")
    again = open_model(str(hub_folder(bundle, tmp_path / "out").folder))
    assert isinstance(again, Checkpoint)
    assert (again.config, again.labels, again.scores) == (config, LABELS, "sigmoid")


def test_code_is_not_run_without_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What was trusted once is known to the process from then on.
    monkeypatch.setattr(AutoModelForImageClassification._model_mapping, "_extra_content", {})
    bundle = model_bundle(tmp_path / "a.bundle", MODELS["clip, zero-shot"][1])
    made = hub_folder(bundle, tmp_path / "out")
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForImageClassification.from_pretrained(made.folder, trust_remote_code=False)
    assert any("trust_remote_code=True" in note for note in made.notes)


def test_what_is_written_in_half_precision_stays_so(tmp_path: Path) -> None:
    bundle = model_bundle(tmp_path / "a.bundle", TINY)
    with bundle.edit() as writer:
        state = load_file(bundle.path("weights.safetensors"))
        state = {name: t.double() if name == "pos_embed" else t.bfloat16() for name, t in state.items()}
        save_file(state, writer.file("weights.safetensors"))
        writer.seal(bundle.manifest)
        bundle = writer.commit()
    made = hub_folder(bundle, tmp_path / "out")
    dtypes = {t.dtype for t in load_file(made.folder / "model.safetensors").values()}
    assert dtypes == {torch.bfloat16, torch.float32}
    assert AutoModelForImageClassification.from_pretrained(made.folder).dtype == torch.float32


# --- pixels -------------------------------------------------------------------------------------------

PIXELS = {
    "exact": Preprocess(size=(32, 32)),
    "exact, other numbers": Preprocess(
        size=(32, 32), resample="bicubic", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), rescale=1 / 128
    ),
    "shorter edge": Preprocess(size=(32, 32), resize="shortest_edge", resize_edge=37, resample="bicubic"),
    "shorter edge, padded": Preprocess(size=(32, 32), resize="shortest_edge", resize_edge=24),
    "exact and cropped": Preprocess(size=(32, 32), resize_to=(40, 37), resample="lanczos"),
    "not resized": Preprocess(size=(32, 32), resize="none"),
    "nearest": Preprocess(size=(32, 32), resample="nearest"),
}


@pytest.mark.parametrize("what", PIXELS)
def test_transformers_prepares_the_same_pixels(what: str, tmp_path: Path) -> None:
    spec = replace(PIXELS[what], exif=True)
    made = hub_folder(model_bundle(tmp_path / "a.bundle", TINY, preprocess=spec), tmp_path / "out")
    processor = AutoImageProcessor.from_pretrained(made.folder, backend="pil")
    for image in photographs():
        found = processor(image, return_tensors="np")["pixel_values"][0]
        assert np.array_equal(found, apply(image, spec)), image.size
    assert made.notes == ()


def test_what_transformers_does_otherwise_is_said(tmp_path: Path) -> None:
    spec = Preprocess(size=(32, 32), resize="shortest_edge", resize_edge=36, crop_rounding="round")
    made = hub_folder(model_bundle(tmp_path / "a.bundle", TINY, preprocess=spec), tmp_path / "out")
    card = (made.folder / "README.md").read_text(encoding="utf-8")
    for words in ("begins a pixel before", "EXIF"):
        assert any(words in note for note in made.notes)
        assert words in card


# --- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, fields, message",
    [
        (replace(TINY, gated_mlp=True, activation="silu"), {}, "gated_mlp is False, and this model's True"),
        (replace(TINY, pool="mean"), {}, "pool is 'cls', and this model's 'mean'"),
        (
            replace(TINY, position="none", position_prefix=0, rotary=Rotary("centred", 100.0)),
            {},
            "transformers has no image classifier that computes this model",
        ),
        (replace(DINOV2, image_size=(32, 48)), {}, "it takes them for those of a square"),
        (replace(TINY, classes=0), {"output": "features"}, "gives features, and a hub folder is an image"),
        (TINY, {"input": "uint8"}, "reads uint8 images"),
        (TINY, {"preprocess": None}, "says nothing of preprocessing"),
        (
            TINY,
            {"preprocess": Preprocess(size=(32, 32), resize="cover", resize_to=(32, 32))},
            "resized to cover 32x32, which no image processor of transformers does",
        ),
        (
            replace(TINY, channels=1),
            {"preprocess": Preprocess(size=(32, 32), mean=(0.5,), std=(0.5,))},
            "images of 1 channels",
        ),
    ],
)
def test_what_cannot_be_written(
    config: ModelConfig, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    bundle = model_bundle(tmp_path / "a.bundle", config, **fields)
    with pytest.raises(UsageError, match=re.escape(message)) as error:
        hub_folder(bundle, tmp_path / "out")
    assert error.value.exit_code == 2
    assert "\n" not in error.value.message
    assert siblings(tmp_path / "out") == ["a.bundle"]


def test_a_module_of_ones_own(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is of a module of one's own"):
        hub_folder(write_bundle(tmp_path / "a.bundle"), tmp_path / "out")


def of_precision(config: ModelConfig, precision: str, requested: str) -> Artifact:
    return Artifact(
        name=f"onnx-{precision}", format="onnx", precision=precision, requested=requested,
        path=f"model.{precision}.onnx", files=(f"model.{precision}.onnx",), batch=BatchRange(),
        inputs=(input_spec(config, "float"),), outputs=output_specs(config, ("logits",)),
    )  # fmt: skip


def test_precisions_without_a_name_there(tmp_path: Path) -> None:
    only = (of_precision(TINY, "bf16", "bf16"), of_precision(TINY, "fp8", "fp8"))
    bundle = model_bundle(tmp_path / "a.bundle", TINY, artifacts=only)
    with pytest.raises(UsageError, match="has no ONNX artifact in fp32, fp16 or int8"):
        hub_folder(bundle, tmp_path / "out")
    more = (*only, of_precision(TINY, "mixed", "fp16"), of_precision(TINY, "int8", "int8"))
    made = hub_folder(model_bundle(tmp_path / "b.bundle", TINY, artifacts=more), tmp_path / "out")
    names = sorted(file.path for file in made.files if file.path.startswith("onnx/"))
    assert names == ["onnx/model_fp16.onnx", "onnx/model_quantized.onnx"]
    assert any("onnx-bf16, onnx-fp8" in note for note in made.notes)
    assert any("onnx/model.onnx is missing" in note for note in made.notes)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"artifact": "fp32"}, "takes no --artifact"),
        ({"version": 3}, "takes no --model-version"),
        ({"settings": PackageSettings(threads=2)}, "takes no --threads"),
        ({"settings": PackageSettings(private=True)}, "--private is about the repository"),
        ({"settings": PackageSettings(push="alone")}, "no name of a repository"),
        ({"settings": PackageSettings(push="a/b/c")}, "no name of a repository"),
        ({"settings": PackageSettings(push="../b")}, "no name of a repository"),
    ],
)
def test_settings_that_are_refused(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        write_package(model_bundle(tmp_path / "a.bundle", TINY), "hub", tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_pushing_needs_the_hubs_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_push, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="huggingface-hub") as error:
        hub_folder(model_bundle(tmp_path / "a.bundle", TINY), tmp_path / "out", push="me/it")
    assert error.value.exit_code == 3
    assert not (tmp_path / "out").exists()


# --- a real bundle --------------------------------------------------------------------------------------


def test_it_verifies(digits_hub: Path, digits: Bundle) -> None:
    report = verify_bundle(digits_hub, backends=["onnxruntime"], batches=[1])
    report.check()
    assert (report.preprocess.images, report.preprocess.max_abs) == (2, 0)
    assert {record.artifact for record in report.parity} == {"onnx-fp32", "onnx-fp16"}
    manifest, original = Bundle.open(digits_hub).manifest, digits.manifest
    assert [artifact.path for artifact in manifest.artifacts] == ["onnx/model.onnx", "onnx/model_fp16.onnx"]
    assert (manifest.model, manifest.labels) == (original.model, original.labels)
    assert manifest.provenance.command == ""
    for name, file in (("onnx/model.onnx", "model.onnx"), ("onnx/model_fp16.onnx", "model.fp16.onnx")):
        assert manifest.files[name] == original.files[file]


def test_input_and_output_are_as_optimum_has_them(digits_hub: Path) -> None:
    for path in (digits_hub / "onnx").iterdir():
        graph = onnx.load(path).graph
        assert [value.name for value in graph.input] == ["pixel_values"]
        assert [value.name for value in graph.output] == ["logits"]


def test_a_card_may_be_edited(digits_hub: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(digits_hub, folder)
    with (folder / "README.md").open("a", encoding="utf-8") as card:
        card.write("Trained by hand.\n")
    for name in (".gitattributes", ".git/HEAD", ".cache/huggingface/download/README.md.metadata"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("of git or of the hub's client", encoding="utf-8")
    Bundle.open(folder).verify()
    (folder / "extra.py").write_text("pass\n", encoding="utf-8")
    with pytest.raises(BundleError, match=r"'extra\.py' is not listed"):
        Bundle.open(folder).verify()
    (folder / "extra.py").unlink()
    (folder / "config.json").write_bytes((folder / "config.json").read_bytes().replace(b'"0"', b'"O"', 1))
    with pytest.raises(BundleError, match=r"config\.json changed"):
        Bundle.open(folder).verify()


def test_the_same_bundle_gives_the_same_bytes(digits: Bundle, digits_hub: Path, tmp_path: Path) -> None:
    again = hub_folder(digits, tmp_path / "digits-hub").folder
    first, second = (
        {p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in (digits_hub, again)
    )
    assert first == second
    assert not [name for name, data in first.items() if str(digits_hub.parent).encode() in data]
    files = document(digits_hub, MARKER)["files"]
    assert sorted(files) == sorted(str(name) for name in first if str(name) != MARKER)


def test_the_card(digits_hub: Path, digits: Bundle) -> None:
    card = (digits_hub / "README.md").read_text(encoding="utf-8")
    block = yaml.safe_load(card.split("---\n")[1])
    assert block == {
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "onnx", "transformers.js", "vitdeploy"],
    }
    manifest = digits.manifest
    assert f"| bundle | {manifest.digest} |" in card
    for name, digest in manifest.provenance.source_files.items():
        assert f"| sha256 of {name} | {digest} |" in card
    for record in manifest.parity:
        path = {"onnx-fp32": "onnx/model.onnx", "onnx-fp16": "onnx/model_fp16.onnx"}[record.artifact]
        runtime = record.backend if record.provider == "cpu" else f"{record.backend} ({record.provider})"
        assert f"| {path} | {runtime} | {record.batch} | {record.metrics.relative:.1e} |" in card
    assert "${" not in card


def test_the_command(digits: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "digits-hub"
    words = ("package", digits.root, "--target", "hub", "-o", out, "--license", "mit", "--json")
    result = in_a_process(*words)
    assert (result.code, result.err) == (0, "")
    assert [file["path"] for file in result.document["files"]][:2] == ["README.md", "config.json"]
    assert result.document["next"] == [f"vitdeploy verify {out}", f"hf upload OWNER/digits {out}"]
    refused = in_a_process("package", digits.root, "--target", "hub", "-o", tmp_path / "b", "--push", "me")
    assert (refused.code, refused.out) == (2, "")
    assert "--push 'me': no name of a repository" in refused.err


def test_what_the_user_says_of_it(tmp_path: Path) -> None:
    bundle = model_bundle(tmp_path / "a.bundle", TINY)
    made = hub_folder(bundle, tmp_path / "out", license="apache-2.0", base_model="google/vit: base #1")
    block = yaml.safe_load((made.folder / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    assert (block["license"], block["base_model"]) == ("apache-2.0", "google/vit: base #1")


@pytest.mark.slow
@pytest.mark.parametrize("which", ["digits", "clip"])
def test_the_cards_programs(
    which: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers and ONNX Runtime, as the card uses them, give the bundle's first five."""
    folder: Path = request.getfixturevalue(f"{which}_hub")
    photograph = photograph_files()[0]
    (tmp_path / "image.jpg").write_bytes(photograph.read_bytes())
    (tmp_path / folder.name).symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    with vitdeploy.load(folder, artifact="fp32") as predictor:
        expected = predictor.predict(photograph, top_k=5)[0]
        scores = [prediction.score for prediction in expected]
    programs = card_programs((folder / "README.md").read_text(encoding="utf-8"), "python")
    assert len(programs) == 2
    for program in programs:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile(program, "README.md", "exec"), {})
        lines = [line.rpartition(" ") for line in said.getvalue().splitlines()]
        assert [label for label, _, _ in lines] == [prediction.label for prediction in expected]
        numbers = [float(number) for _, _, number in lines]
        if (
            "onnxruntime" not in program
        ):  # it prints logits; shares of one answer follow from their differences
            shares = [math.exp(number - numbers[0]) * scores[0] for number in numbers]
            assert shares == pytest.approx(scores, abs=1e-5)
        else:
            assert numbers == pytest.approx(scores, abs=1e-5)


def test_weights_beside_the_graph(digits: Bundle, tmp_path: Path) -> None:
    original = digits.artifact("fp32")
    with_data = tmp_path / "a.bundle"
    with BundleWriter(with_data) as writer:
        for name in digits.manifest.files:
            if name != original.path:
                writer.file(name).write_bytes(digits.path(name).read_bytes())
        model = onnx.load(digits.path(original.path))
        path = writer.file(original.path)
        onnx.save(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=1024)
        moved = original.model_copy(update={"files": ("model.onnx", "model.onnx.data")})
        artifacts = tuple(moved if a is original else a for a in digits.manifest.artifacts)
        writer.seal(digits.manifest.model_copy(update={"artifacts": artifacts, "files": {}, "digest": ""}))
        external = writer.commit()
    made = hub_folder(external, tmp_path / "out")
    assert (made.folder / "onnx/model.onnx_data").stat().st_size > 1e6
    assert document(made.folder)["transformers.js_config"] == {"use_external_data_format": {"model.onnx": 1}}
    golden = Bundle.open(made.folder).golden()
    session = onnxruntime.InferenceSession(made.folder / "onnx/model.onnx")
    (found,) = session.run(["logits"], {"pixel_values": golden["pixel_values"][:2]})
    assert np.allclose(found, golden["reference"][:2], atol=1e-4)
    verify_bundle(made.folder, backends=["onnxruntime"], batches=[1]).check()


@pytest.mark.slow
def test_an_int8_bundle(digits_int8: Bundle, tmp_path: Path) -> None:
    made = hub_folder(digits_int8, tmp_path / "out")
    assert any("look at them before you publish" in note for note in made.notes)
    assert (made.folder / "onnx/model_quantized.onnx").exists()
    assert not (made.folder / "calibration.safetensors").exists()
    verify_bundle(made.folder, backends=["onnxruntime"], batches=[1]).check()


def test_of_several_sizes_it_has_the_first(tmp_path: Path) -> None:
    further = SizeRecord(image_size=(64, 48), preprocess=Preprocess(size=(64, 48)))
    bundle = model_bundle(tmp_path / "a.bundle", TINY, sizes=(further,))
    made = hub_folder(bundle, tmp_path / "out")
    assert "a hub folder is of one image size: 32x32, without 64x48" in made.notes
    assert Bundle.open(made.folder).sizes == ((32, 32),)
    assert document(made.folder)["image_size"] == 32


# --- pushing --------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub on this machine, which the library takes for the hub."""
    with FakeHub(token="hf_secret") as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield server


def test_pushing(hub: FakeHub, tmp_path: Path) -> None:
    bundle = model_bundle(tmp_path / "a.bundle", TINY, labels=LABELS)
    made = hub_folder(bundle, tmp_path / "out", push="me/my-vit", private=True)
    assert hub.created == [{"name": "my-vit", "organization": "me", "private": True}]
    found = {
        p.relative_to(made.folder).as_posix(): p.read_bytes() for p in made.folder.rglob("*") if p.is_file()
    }
    assert hub.files == found
    assert made.notes[-1].startswith("pushed to me/my-vit: ")
    card = found["README.md"].decode()
    assert 'from_pretrained("me/my-vit")' in card
    assert "hf download me/my-vit --local-dir some-model" in card


@pytest.mark.parametrize("token", ["hf_wrong", None])
def test_a_hub_that_refuses(
    hub: FakeHub, token: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token or "")
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1" if token is None else "0")
    with pytest.raises(ExportError, match="--push me/my-vit: the hub did not take") as error:
        hub_folder(model_bundle(tmp_path / "a.bundle", TINY), tmp_path / "out", push="me/my-vit")
    assert error.value.exit_code == 4
    assert "hf upload me/my-vit" in (error.value.hint or "")
    assert "\n" not in error.value.message
    assert hub.files == {}
    Bundle.open(tmp_path / "out").verify()
