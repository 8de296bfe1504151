"""Bad input of every verb: one error line and at most one hint, short, exit 2 or 3, nothing left behind."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest

from tests.helpers.bundles import random_image, write_bundle
from tests.helpers.commands import Run
from vitdeploy.bundle.manifest import MANIFEST

# In a folder that has linear.bundle and, beside it, what people have in such places.
CASES = """
nonsense
--nonsense
export -m digitz
export -m ./nowhere
export -m owner/name/more
export -m linear.bundle
export -m empty
export -m notes.txt
export -m lfs.safetensors
export --checkpoint nowhere.safetensors
export --checkpoint notes.txt
export -m digits --opset x
export -m digits --opset 16
export -m digits --opset 99
export -m digits --batch x
export -m digits --batch 1,2
export -m digits --batch 8,4,2
export -m digits --batch 0
export -m digits --image-size big
export -m digits --image-size 0
export -m digits --image-size 7
export -m digits --image-size 32,32
export -m digits --image-size 32,33x64
export -m B/16 --image-size 32000
export -m digits --precision fp8x
export -m digits --int8
export -m digits --int8 --calibration nowhere
export -m digits --int8 --calibration empty
export -m digits --int8 --calibration notes.txt
export -m digits --int8 --calibration linear.bundle
export -m digits --int8 --calibration . --weight-bits 9
export -m digits --fp8 --calibration . --opset 18
export -m digits --fp8 --calibration . --image-size 32,64
export -m digits --calibration .
export -m digits --format onxx
export -m digits --input uint9
export -m digits --output logit
export -m digits --output logits,layers:9
export -m digits --output logits,logits
export -m digits --output layers:x
export -m digits --scores soft
export -m digits --atol -1
export -m digits --atol x
export -m digits --format triton-aot --fp16 --arch sm_1
export -m digits -o linear.bundle
export -m digits -o notes.txt --force
export -m digits -o notes.txt/x.bundle
export -m nomodule:build
export -m timm:
optimize -m digitz
optimize -m linear.bundle
optimize -m digits --goal speed
optimize -m digits --batch 0
optimize -m digits --budget soon
optimize -m digits --backend none
optimize -m digits --max-drop 1
optimize -m digits --data nowhere
optimize -m digits --data photos --max-drop 101
optimize -m digits --image-size 28,32
optimize -m digits -o linear.bundle
optimize -m digits -o notes.txt --force
optimize -m digits -o notes.txt/x.bundle
inspect linear.bundle --explain-choice
inspect notes.txt --explain-choice
engine nope.bundle --format tensorrt-rtx
engine linear.bundle --format tensort
engine linear.bundle --opt-level 9
engine linear.bundle --workspace much
engine linear.bundle --profile 1,2
verify nope.bundle
verify linear.bundle/model.onnx/x
verify damaged.bundle
verify newer.bundle
verify short.bundle
verify linear.bundle --backend onnxrutime
verify linear.bundle --batch x
verify linear.bundle --data nowhere
verify linear.bundle --data empty
verify linear.bundle --data photos
verify linear.bundle --model x
verify linear.bundle --url nowhere
verify linear.bundle --url http://127.0.0.1:1
verify linear.bundle --url grpc://127.0.0.1:1 --backend onnxruntime
verify linear.bundle --threads 0
bench nope.bundle
bench linear.bundle/model.onnx
bench linear.bundle --budget soon
bench linear.bundle --backend none
bench linear.bundle --batch 10000
bench linear.bundle --pick fastest
bench linear.bundle --max-latency-ms 3
bench linear.bundle --compare notes.txt
bench linear.bundle --compare nowhere.json
bench linear.bundle --tolerance lots
bench linear.bundle -o nowhere/results.json
bench linear.bundle --concurrency 0
inspect nope.bundle
inspect notes.txt
inspect fake.onnx
inspect fake.plan
inspect empty
predict nope.bundle photos
predict linear.bundl photos
predict linear.bundle nowhere.png
predict linear.bundle empty
predict linear.bundle notes.txt
predict linear.bundle ftp://example.org//x.png
predict linear.bundle photos --fit 9x9
predict linear.bundle photos --fit nearest
predict linear.bundle photos --top-k 0
predict linear.bundle photos --top-k many
predict linear.bundle photos --threads 0
predict linear.bundle photos --backend nothing
predict linear.bundle photos --artifact int4
predict linear.bundle photos --provider cuda
predict linear.bundle photos --json --csv
predict linear.bundle photos --engine spark
predict linear.bundle photos --engine ray
predict linear.bundle photos --batch 3
predict linear.bundle - --engine ray -o out
predict linear.bundle photos -o vectors.npy
predict features.bundle photos --csv
predict features.bundle photos --top-k 3
predict features.bundle photos --dimensions 3
predict features.bundle photos -o vectors.csv
predict features.bundle photos -o nowhere/vectors.npy
explain nope.bundle photos
explain linear.bundle nowhere.png
explain linear.bundle notes.txt
explain linear.bundle photos -o notes.txt
explain linear.bundle photos -o linear.bundle/figures
explain linear.bundle photos -o photos --force
explain linear.bundle photos --html nowhere/page.html
serve nope.bundle
serve linear.bundle/model.onnx
serve a=linear.bundle a@1=linear.bundle
serve linear.bundle --port 70000
serve linear.bundle --max-body huge
serve linear.bundle --timeout never
serve linear.bundle --instances 0
serve linear.bundle --buckets 1,x
package nope.bundle --target docker -o out
package linear.bundle --target dokcer -o out
package linear.bundle -o out
package linear.bundle --target docker -o photos
package linear.bundle --target docker -o linear.bundle/out
package linear.bundle --target kserve -o out
package linear.bundle --target kserve -o out --storage-uri nowhere
package linear.bundle --target docker -o out --wheel notes.txt
package linear.bundle --target triton-server -o out --top-k 0
package linear.bundle --target triton-server -o out --max-batch 0
tune nope.bundle
tune linear.bundle --budget x
tune linear.bundle --batch x
list CLIP-B/32
export -m CLIP-B/33
export -m dinov3-s/16
doctor extra
""".strip().splitlines()


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder, once."""
    folder = tmp_path_factory.mktemp("bad") / "folder"
    linear = write_bundle(folder / "linear.bundle", precisions=("fp32", "fp16")).root
    write_bundle(folder / "features.bundle", output="features", labels=None)
    for name in ("damaged", "newer", "short"):
        shutil.copytree(linear, folder / f"{name}.bundle")
    (folder / "damaged.bundle" / MANIFEST).write_text('{"generator": "vitdeploy')
    newer = (linear / MANIFEST).read_text().replace('"schema_version": ', '"schema_version": 9')
    (folder / "newer.bundle" / MANIFEST).write_text(newer)
    (folder / "short.bundle" / "model.onnx").write_bytes(b"")
    (folder / "empty").mkdir()
    (folder / "photos").mkdir()
    random_image(0).save(folder / "photos" / "one.png")
    for name in ("notes.txt", "fake.onnx", "fake.plan"):
        (folder / name).write_text("nothing of that kind\n")
    (folder / "lfs.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"
    )
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, where the command runs."""
    monkeypatch.chdir(shutil.copytree(made, tmp_path / "folder"))
    return Path.cwd()


def content(folder: Path) -> list[tuple[str, int]]:
    """Every file and folder, and when files were written."""
    return sorted((str(path), path.stat().st_mtime_ns if path.is_file() else 0) for path in folder.rglob("*"))


@pytest.mark.slow
@pytest.mark.parametrize("command", CASES)
def test_one_line_and_a_hint(run: Run, folder: Path, command: str) -> None:
    before = content(folder)
    result = run(*shlex.split(command))
    lines = result.err.splitlines()
    assert result.code in (2, 3), (result.code, lines)
    assert lines[0].startswith("error: "), lines
    assert [line.partition(":")[0] for line in lines] in (["error"], ["error", "hint"]), lines
    assert sum(len(line.partition(": ")[2]) for line in lines) <= 400, lines
    assert "Traceback" not in result.err
    assert "bug in vitdeploy" not in result.err
    assert result.out == "" or ("--json" in command and result.document["ok"] is False)
    assert content(folder) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "command, hint, followed",
    [
        ("predict linear.bundl photos", "'linear.bundle'", "predict linear.bundle photos"),
        ("predict nope photos", ", linear.bundle,", "predict linear.bundle photos"),
        ("verify linear.bundle/model.onnx/x", "folder: linear.bundle", "inspect linear.bundle"),
        (
            "predict linear.bundle photos --artifact int4",
            "onnx-fp16",
            "predict linear.bundle photos --artifact onnx-fp16",
        ),
        ("predict linear.bundle photos --top-k 0", "vitdeploy predict --help", "predict --help"),
        ("export -m digitz --dry-run", "'digits'", "export -m digits --dry-run"),
        ("export -m digits --dry-run --opset 99", "17 to 23", "export -m digits --dry-run --opset 23"),
        ("export -m digits --dry-run --image-size 7", "8x8", "export -m digits --dry-run --image-size 8x8"),
        (
            "export -m digits --dry-run --batch 1,2",
            "--batch 1,8,32",
            "export -m digits --dry-run --batch 1,8,32",
        ),
        ("export -m digits --dry-run --format onxx", "'onnx'", "export -m digits --dry-run --format onnx"),
        ("export -m Ti/16 --dry-run --image-size 32000", "--image-size ", ""),
        (
            "package linear.bundle --target dokcer -o out",
            "'docker'",
            "package linear.bundle --target docker -o out",
        ),
        ("export -m eva02-ti/14 --dry-run", "'EVA02-Ti/14'", "export -m EVA02-Ti/14 --dry-run"),
        ("export -m CLIP-B/33 --dry-run", "`vitdeploy list`", "list"),
        ("doctor extra", "vitdeploy doctor --help", "doctor --help"),
    ],
)
def test_following_the_hint_works(run: Run, folder: Path, command: str, hint: str, followed: str) -> None:
    """Where it names a value or a command: what is typed next is in the lines, and ends well."""
    refused = run(*shlex.split(command))
    assert refused.code == 2
    assert hint in refused.err
    if not followed:
        size = refused.err.partition("hint: ")[2].split()[1]
        followed = command.replace("32000", str(min(int(size), 224)))
    assert run(*shlex.split(followed)).code == 0
