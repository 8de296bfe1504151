"""``vitdeploy explain``: what it writes and prints, and every way to use it wrongly."""

from __future__ import annotations

import base64
import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest

import vitdeploy
from tests.helpers.bundles import random_image, write_bundle
from tests.helpers.commands import Run
from tests.helpers.exports import Exported
from tests.helpers.models import CONFIGS
from tests.helpers.pictures import picture, pictures
from tests.helpers.weights_bundles import write_weights
from vitdeploy.data import digits_folder
from vitdeploy.errors import ImageError, UsageError
from vitdeploy.explanation.answering import Rollouts

THREE = digits_folder() / "images/3_0045.png"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_weights(tmp_path / "small.bundle", CONFIGS["vit"]).root


@pytest.fixture
def image(tmp_path: Path) -> Path:
    picture(0).save(tmp_path / "one.png")
    return tmp_path / "one.png"


@pytest.mark.slow
def test_of_a_trained_model(run: Run, digits: Exported, tmp_path: Path) -> None:
    """The digits model sees a three, where the three is."""
    result = run(
        "explain", digits.folder, THREE, "-o", tmp_path / "out", "--html", tmp_path / "p.html", "--json"
    )
    assert result.code == 0, result.err
    document = result.document
    assert document["ok"] is True
    (image,) = document["images"]
    assert image["predictions"][0]["label"] == "3"
    assert image["relevance"][0]["label"] == "3"
    assert sum(map(sum, image["rollout"])) == pytest.approx(1, abs=0.35)  # the rest stays with CLS
    assert len(document["distances"]) == len(image["norms"]) == 4
    assert {p["precision"] for p in document["precision"]} == {"fp32", "fp16", "bf16"}
    assert set(document["parity"]) == {"onnx-fp32", "onnx-fp16"}
    assert document["folder"] == str(tmp_path / "out")
    assert (tmp_path / "out/index.html").read_bytes() == (tmp_path / "p.html").read_bytes()
    assert {stage["name"] for stage in document["stages"]} >= {"load", "look", "precisions", "draw", "write"}
    told = run("explain", digits.folder, THREE, "-o", tmp_path / "out", "--force")
    assert told.code == 0, told.err
    assert "3  3" in told.out
    assert f"page: {tmp_path / 'out/index.html'}" in told.out


@pytest.mark.slow
def test_by_default_a_folder_named_after_the_bundle(
    run: Run, small: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert run("explain", small, image).code == 0
    assert (tmp_path / "work/small.explained/index.html").is_file()
    again = run("explain", small, image)
    assert (again.code, again.err.splitlines()[-1]) == (2, "hint: --force replaces an earlier explanation")
    assert run("explain", small, image, "--html", "alone.html").code == 0
    assert sorted(p.name for p in Path.cwd().iterdir()) == ["alone.html", "small.explained"]


@pytest.mark.slow
def test_a_user_s_module_shows_what_it_can(run: Run, tmp_path: Path) -> None:
    linear = write_bundle(tmp_path / "linear.bundle").root
    random_image(0).save(tmp_path / "one.png")
    result = run("explain", linear, tmp_path / "one.png", "-o", tmp_path / "out")
    assert result.code == 0, result.err
    assert "not shown: attention, rollout, relevance" in result.out
    assert "a module of your own" in result.out
    assert "module of your own" in (tmp_path / "out/index.html").read_text(encoding="utf-8")
    assert (tmp_path / "out/01-one/input.png").is_file()


@pytest.mark.slow
def test_filters_of_a_user_s_convolution(tmp_path: Path) -> None:
    """The first convolution is found among the weights by what it reads."""
    import torch

    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 40, 5, stride=4), torch.nn.Conv2d(40, 3, 3), torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
    )  # fmt: skip
    bundle = vitdeploy.export(
        module, tmp_path / "m.bundle", image_size=32, format="onnx", preprocess="imagenet"
    )
    found = vitdeploy.explain(bundle, picture(0), html=tmp_path / "m.html")
    assert found.model.filters is not None
    assert found.model.filters.shape == (28, 3, 5, 5)
    assert found.images[0].path == "image 1"
    assert found.parity


@pytest.mark.slow
def test_each_image_goes_where_it_fits(exports: object, tmp_path: Path) -> None:
    bundle = vitdeploy.export("digits", tmp_path / "s.bundle", image_size=[32, (32, 64)], format="onnx")
    found = vitdeploy.explain(bundle, [picture(0, (40, 40)), picture(1, (40, 80))], html=tmp_path / "s.html")
    assert [image.image_size for image in found.images] == [(32, 32), (32, 64)]
    assert [image.rollout.shape for image in found.images] == [(4, 4), (4, 8)]
    # A server's process chooses alike, by the server's own rule.
    rollouts, buffer = Rollouts(), io.BytesIO()
    picture(1, (40, 80)).save(buffer, "PNG")
    asked = {
        "bundle": str(bundle.root),
        "digest": bundle.manifest.digest,
        "max_pixels": 10_000,
        "image": base64.b64encode(buffer.getvalue()).decode(),
    }
    assert [rollouts.answer({**asked, "fit": rule})["size"] for rule in ("aspect", "32x32")] == [
        "32x64",
        "32x32",
    ]
    np.testing.assert_allclose(
        rollouts.answer({**asked, "fit": "aspect"})["rollout"], found.images[1].rollout, rtol=1e-4
    )


def refused(run: Run, *arguments: object) -> str:
    result = run("explain", *arguments)
    assert result.code == 2, result.err
    lines = result.err.splitlines()
    assert [line.partition(":")[0] for line in lines] in (["error"], ["error", "hint"])
    assert sum(map(len, lines)) <= 420
    return lines[0]


@pytest.mark.slow
def test_bad_input_writes_nothing(run: Run, small: Path, image: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(THREE.read_bytes()[:100])
    (tmp_path / "text.png").write_text("no image\n")
    out = tmp_path / "out"
    assert "broken.png is damaged" in refused(run, small, image, tmp_path / "broken.png", "-o", out)
    assert "text.png is not an image" in refused(run, small, tmp_path / "text.png", "-o", out)
    assert "nowhere.png does not exist" in refused(run, small, tmp_path / "nowhere.png", "-o", out)
    many = pictures(tmp_path / "many", 65, (8, 8))
    assert "65 images: figures are drawn of 1 to 64" in refused(run, small, many, "-o", out)
    assert "is a file" in refused(run, small, image, "-o", image)
    assert "is inside of the bundle" in refused(run, small, image, "-o", small / "figures")
    assert "does not exist" in refused(run, small, image, "--html", tmp_path / "no/page.html")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    assert "is not an explanation" in refused(run, small, image, "-o", tmp_path / "mine", "--force")
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_a_folder_with_something_else_in_it_stays(run: Run, small: Path, image: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("explain", small, image, "-o", out).code == 0
    (out / "notes.txt").write_text("mine")
    assert "holds what vitdeploy did not write: notes.txt" in refused(run, small, image, "-o", out, "--force")


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_to(run: Run, small: Path, image: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert "cannot be written" in refused(run, small, image, "-o", locked / "out")


@pytest.mark.slow
def test_a_disk_that_refuses(
    small: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vitdeploy.bundle.staging import StagedFolder

    def full(self: StagedFolder, *, replace: bool) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(StagedFolder, "commit", full)
    with pytest.raises(UsageError, match="cannot be written: No space left on device"):
        vitdeploy.explain(small, image, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".vitdeploy-*"))


def test_a_place_that_refuses_is_known_before_anything_is_computed(
    small: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vitdeploy.explanation import run as explanation

    monkeypatch.setattr(explanation, "looker_of", lambda *_: pytest.fail("something was computed"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"file/out: cannot be written: Not a directory"):
        vitdeploy.explain(small, image, tmp_path / "file/out")


@pytest.mark.parametrize("library", ["matplotlib", "jinja2"])
def test_what_draws_is_missing(
    run: Run, small: Path, image: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    result = run("explain", small, image)
    assert result.code == 3
    assert f"the page of figures needs the library '{library}'" in result.err
    assert 'pip install "vitdeploy[report]"' in result.err


def test_without_weights(tmp_path: Path, image: Path) -> None:
    from tests.helpers.weights_bundles import SPEC
    from vitdeploy.bundle.folder import Bundle, BundleWriter
    from vitdeploy.explanation.looking import looker_of

    whole = write_weights(tmp_path / "whole.bundle", CONFIGS["vit"])
    with BundleWriter(tmp_path / "bare.bundle") as writer:
        writer.seal(whole.manifest.model_copy(update={"files": {}, "digest": ""}))
        writer.commit()
    with pytest.raises(UsageError, match=r"has no weights\.safetensors"):
        looker_of(Bundle.open(tmp_path / "bare.bundle"), SPEC)


def test_a_bundle_that_images_cannot_go_into(tmp_path: Path, image: Path) -> None:
    silent = write_weights(tmp_path / "silent.bundle", CONFIGS["vit"], preprocess=None)
    with pytest.raises(UsageError, match="says nothing of preprocessing"):
        vitdeploy.explain(silent, image)


def test_an_image_of_python_that_is_none(small: Path) -> None:
    with pytest.raises(ImageError):
        vitdeploy.explain(small, b"nothing")
    with pytest.raises(UsageError, match="0 images"):
        vitdeploy.explain(small, [])


def test_attention_that_does_not_fit(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.helpers.weights_bundles import SPEC
    from vitdeploy.bundle.folder import Bundle
    from vitdeploy.explanation import looking

    monkeypatch.setattr(looking, "total_memory", lambda: 10_000)
    with pytest.raises(UsageError, match=r"takes 0\.0 GB with its gradients"):
        looking.looker_of(Bundle.open(small), SPEC)
