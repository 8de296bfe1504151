"""What the documents show is what happens: their commands and programs run, in order, in an empty folder.

In a ``console`` block a line that begins with ``$ `` is a command and the lines below it are what it prints;
``...`` stands for any lines. A ``python`` block is a program, and a ``text`` block right after it is what it
prints. Measured numbers may differ; words, columns, labels and counts may not.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RUN = ("README.md", *(f"docs/{n}.md" for n in ("quickstart", "precision", "gpu", "tensorrt", "benchmark")))
DOCUMENTS = (*RUN, *(f"docs/{name}.md" for name in ("architecture", "bundle", "checkpoints", "cli")))
IMAGES = "vitdeploy/data/digits/images"

_BLOCK = re.compile(r"^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
_LANGUAGES = {"console", "python", "text", "json", "sh", "mermaid", ""}

_ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")

_MEASURED = (
    (re.compile(r"\d{4}-\d\d-\d\dT[\d:]+Z by (\S+ \S+) on .*"), r"<time> by \1 on <platform>"),
    (re.compile(r"\d+(\.\d+)?e[-+]\d+"), "<number>"),
    (re.compile(r"\d+(\.\d+)? (B|kB|MB|GB)\b"), "<size>"),
    (re.compile(r"\d+( interleaved)? rounds"), r"<number>\1 rounds"),
    # Shares and FLOPs are computed, not measured.
    (re.compile(r"\b\d+\.\d+\b(?! %| [kMGT]?FLOPs)"), "<number>"),
    (re.compile(r"─+"), "─"),
    (re.compile(r"[ \t]+"), " "),
)


@dataclass(frozen=True)
class Step:
    """A command line or a program of a document, and what it is said to print."""

    place: str
    command: str | None
    program: str
    shown: str

    @property
    def environment(self) -> dict[str, str]:
        """What stands before the command: ``NAME=value vitdeploy ...``."""
        words = itertools.takewhile(_ASSIGNMENT.fullmatch, shlex.split(self.command or ""))
        return dict(word.split("=", 1) for word in words)

    @property
    def arguments(self) -> list[str]:
        # -P: the folder it runs in has a vitdeploy/ of its own, with nothing but images.
        python = [sys.executable, "-P"]
        if self.command is None:
            return [*python, "-c", self.program]
        name, *arguments = itertools.dropwhile(_ASSIGNMENT.fullmatch, shlex.split(self.command))
        assert name == "vitdeploy", f"{self.place}: {self.command}: the test runs vitdeploy only"
        return [*python, "-m", "vitdeploy", *arguments]


def steps(document: str) -> Iterator[Step]:
    text = (ROOT / document).read_text(encoding="utf-8")
    blocks = list(_BLOCK.finditer(text))
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        line = text.count("\n", 0, block.start()) + 1
        language, body = block["language"], block["body"]
        assert language in _LANGUAGES, f"{document}:{line}: {language} is no kind of block that is checked"
        if language == "console":
            assert body.startswith("$ "), f"{document}:{line}: a console block begins with a command"
            for part in re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]:
                command, _, shown = part.partition("\n")
                yield Step(f"{document}:{line}", command, "", shown)
        elif language == "python":
            near = following is not None and not text[block.end() : following.start()].strip()
            shown = following["body"] if following and near and following["language"] == "text" else ""
            yield Step(f"{document}:{line}", None, body, shown)


def skeleton(text: str) -> list[str]:
    """Lines with whatever is measured taken out, and without empty ones."""
    lines = []
    for line in text.splitlines():
        for pattern, replacement in _MEASURED:
            line = pattern.sub(replacement, line)
        lines.append(line.strip())
    return [line for line in lines if line]


def matches(shown: str, printed: str) -> bool:
    expected = ("(?:.*\n)*?" if line == "..." else re.escape(line) + "\n" for line in skeleton(shown))
    return re.fullmatch("".join(expected), "".join(f"{line}\n" for line in skeleton(printed))) is not None


@pytest.mark.slow
@pytest.mark.parametrize("document", RUN)
def test_commands_and_programs_do_what_the_document_shows(document: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / IMAGES, tmp_path / IMAGES)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    code = 0
    for step in steps(document):
        if step.command == "echo $?":
            assert step.shown.strip() == str(code), f"{step.place}: the exit code is {code}"
            code = 0
            continue
        assert code == 0, f"before {step.place}: exit code {code}, which the document does not show"
        done = subprocess.run(
            step.arguments,
            cwd=tmp_path,
            env=environment | step.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if step.command else subprocess.PIPE,
            encoding="utf-8",
            check=False,
        )
        code = done.returncode
        what = f"{step.place}: {step.command or 'the program'}"
        assert step.command or not code, f"{what} failed:\n{done.stderr}"
        assert matches(step.shown, done.stdout), f"{what}\nshows\n{step.shown}\nprints\n{done.stdout}"
    assert code == 0, f"{document} ends with a command that fails with exit code {code}"


def test_every_vitdeploy_command_of_the_readme_is_run() -> None:
    commands = [step.command.split() for step in steps("README.md") if step.command]
    verbs = {command[1] for command in commands if command[0] == "vitdeploy"}
    assert verbs == {"export", "predict", "verify", "inspect", "bench"}
    for document in RUN:
        for block in _BLOCK.finditer((ROOT / document).read_text(encoding="utf-8")):
            hidden = block["language"] == "sh" and re.search(r"^\W*vitdeploy ", block["body"], re.MULTILINE)
            assert not hidden, f"{document}: a command in a block that is not run:\n{block['body']}"


TABLE = """\
file        precision  nodes    size
────────────────────────────────────
model.onnx  fp32          95  1.3 MB
6 exact rewrites, 22.3 % of 11.1 MFLOPs saved
  parity fp32         0.2 s  relative error 9.5e-07 on onnxruntime, batch 1, 8
    0.9704      3  three
"""


@pytest.mark.parametrize(
    "before, after",
    [("1.3 MB", "987 kB"), ("0.2 s", "14.0 s"), ("9.5e-07", "1.1e-06"), ("0.9704", "0.9713"), ("────", "──")],
)
def test_what_is_measured_may_differ(before: str, after: str) -> None:
    assert before in TABLE
    assert matches(TABLE, TABLE.replace(before, after))


@pytest.mark.parametrize(
    "before, after",
    [
        ("nodes", "operators"),
        ("  95", "  96"),
        ("22.3 %", "22.4 %"),
        ("11.1 M", "11.2 M"),
        ("batch 1, 8", "batch 1"),
        ("three", "eight"),
        ("model.onnx", "model.fp16.onnx"),
        ("    0.9704      3  three\n", ""),
    ],
)
def test_what_is_not_measured_may_not(before: str, after: str) -> None:
    assert before in TABLE
    assert not matches(TABLE, TABLE.replace(before, after))


def test_an_ellipsis_stands_for_any_lines() -> None:
    assert matches("a\n...\nd\n", "a\nb\nc\nd\n")
    assert matches("a\n...\n", "a\n")
    assert not matches("a\n...\nd\n", "a\nb\n")


@pytest.mark.parametrize("document", [*DOCUMENTS, "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_to_files(document: str) -> None:
    page = ROOT / document
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path = target.partition("#")[0]
        if path and "://" not in target:
            assert (page.parent / path).exists(), f"{document} links to {target}"
