"""What the documents show is what happens: their commands and programs run, in order, in an empty folder.

In a ``console`` block a line that begins with ``$ `` is a command and the lines below it are what it prints;
``...`` stands for any lines. A ``python`` block is a program, and a ``text`` block right after it is what it
prints. Measured numbers may differ; words, columns, labels and counts may not.

A command that ends with ``&`` stays in the background once it has printed what is shown; ``kill %1`` ends it,
and shows what it printed since. Its ports are any free ones. Besides ``vitdeploy``, ``curl`` is run.

The folder has the images of the digits model, and what a document takes for granted (``GIVEN``), README for
instance ``my-vit``, a fine-tuned model as transformers saves it, and ``photo.png``. An export that several
documents or tests need is run once.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import export_digits
from tests.helpers.commands import ISOLATED, Result, prefork
from tests.helpers.exports import Exports
from tests.helpers.paths import ROOT
from tests.helpers.processes import wait_for
from tests.helpers.triton_server import free_ports

RUN = (
    "README.md",
    *(
        f"docs/{n}.md"
        for n in ("quickstart", "python", "checkpoints", "families", "cli", "precision", "gpu", "tensorrt")
    ),
    *(f"docs/{n}.md" for n in ("benchmark", "serving", "verify", "zero-shot", "explain")),
    *(f"docs/tasks/{n}.md" for n in ("fine-tuned", "timm", "zero-shot", "int8")),
    *(f"docs/tasks/{n}.md" for n in ("tensorrt", "triton-server", "colleague")),
)
IMAGES = "vitdeploy/data/digits/images"

_BLOCK = re.compile(r"^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
_LANGUAGES = {"console", "python", "text", "json", "sh", "yaml", "mermaid", ""}

_EXPORT = re.compile(r"vitdeploy export -m (\S+) (?!.*--(?:dry-run|force)).*-o (?P<bundle>\S+\.bundle)\b.*")
_ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")

_MEASURED = (
    (re.compile(r"\d{4}-\d\d-\d\dT[\d:]+Z by (\S+ \S+) on .*"), r"<time> by \1 on <platform>"),
    (re.compile(r"\d+(\.\d+)?e[-+]\d+"), "<number>"),
    (re.compile(r"\d+(\.\d+)? (B|kB|MB|GB)\b"), "<size>"),
    (re.compile(r"\d+(\.\d+)? ms\b"), "<number> ms"),
    (re.compile(r"\d+( interleaved)? rounds"), r"<number>\1 rounds"),
    (re.compile(r"plan: \d+ sessions? of .*"), "plan: <plan>"),
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
    def words(self) -> list[str]:
        """The command without what stands before it."""
        words = shlex.split((self.command or "").removesuffix("&"))
        return [*itertools.dropwhile(_ASSIGNMENT.fullmatch, words)]

    @property
    def forks(self) -> bool:
        """Whether a fork of a process that has imported PyTorch runs it, in the same environment."""
        return self.command is None or (self.words[0] == "vitdeploy" and not self.environment)

    @property
    def arguments(self) -> list[str]:
        name, *arguments = self.words
        if name == "curl":
            return [name, *arguments]
        assert name == "vitdeploy", f"{self.place}: {self.command}: the test runs vitdeploy and curl only"
        # -P: the folder it runs in has a vitdeploy/ of its own, with nothing but images.
        return [sys.executable, "-P", "-m", "vitdeploy", *arguments]


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


class Background:
    """A command that runs on while others do."""

    def __init__(self, step: Step, folder: Path, environment: dict[str, str]) -> None:
        self._log = folder.with_suffix(".background.txt")
        self._seen = 0
        with self._log.open("wb") as stream:
            self._process = subprocess.Popen(
                step.arguments, cwd=folder, env=environment, stdout=stream, stderr=subprocess.STDOUT
            )

    def show(self, step: Step) -> None:
        """Wait until it has printed what the step shows, since the last one that showed something."""
        wait_for(lambda: matches(step.shown, self._printed()) or self._process.poll() is not None, 60)
        printed = self._printed()
        what = f"{step.place}: {step.command}"
        assert matches(step.shown, printed), f"{what}\nshows\n{step.shown}\nprints\n{printed}"
        self._seen += len(printed)

    def _printed(self) -> str:
        return self._log.read_text(encoding="utf-8")[self._seen :]

    def end(self) -> int:
        self._process.terminate()
        return self._process.wait(60)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def with_free_ports(found: Sequence[Step]) -> Sequence[Step]:
    """The steps of a document with a server, asking it where nobody else listens."""
    if not any((step.command or "").endswith("&") for step in found):
        return found
    ports = dict(zip(("8000", "8001"), map(str, free_ports(2)), strict=True))

    def moved(text: str) -> str:
        return re.sub(r"\b800[01]\b", lambda port: ports[port[0]], text)

    return [
        replace(
            step,
            command=step.command and moved(step.command),
            program=moved(step.program),
            shown=moved(step.shown),
        )
        for step in found
    ]


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


@dataclass
class Shell:
    """Runs a document's steps in a folder, one after the other."""

    folder: Path
    environment: dict[str, str]
    exports: Exports
    models: frozenset[str] = frozenset({"digits"})
    """That are the same in every document that exports them."""
    code: int = 0
    """Of the last command; 0 where the document has shown it."""
    server: Background | None = None

    def run(self, step: Step) -> None:
        if step.command == "echo $?":
            assert step.shown.strip() == str(self.code), f"{step.place}: the exit code is {self.code}"
            self.code = 0
            return
        assert self.code == 0, f"before {step.place}: exit code {self.code}, which the document does not show"
        if step.command == "kill %1":
            assert self.server is not None, f"{step.place}: nothing runs in the background"
            self.code = self.server.end()
            self.server.show(step)
            self.server = None
        elif step.command and step.command.endswith("&"):
            assert self.server is None, f"{step.place}: the test runs one server at a time"
            self.server = Background(step, self.folder, self.environment | step.environment)
            self.server.show(step)
        else:
            self._foreground(step)

    def _foreground(self, step: Step) -> None:
        export = _EXPORT.fullmatch(step.command or "")
        if export is None or export[1] not in self.models or (self.folder / export["bundle"]).exists():
            done = self._run(step)
        else:
            done = self._export(step, self.folder / export["bundle"])
        self.code = done.code
        what = f"{step.place}: {step.command or 'the program'}"
        assert step.command or not self.code, f"{what} failed:\n{done.err}"
        assert matches(step.shown, done.out), f"{what}\nshows\n{step.shown}\nprints\n{done.out}"

    def _export(self, step: Step, bundle: Path) -> Result:
        """Documents that show the same export share its bundle."""

        if "--int8" in step.words:  # which takes long, and is what the tests share
            flags = [word.replace(IMAGES, f"{ROOT / IMAGES}") for word in step.words[4:]]
            assert flags[-2:] == ["-o", bundle.name], f"{step.place}: -o comes last"
            exported = export_digits(self.exports, *flags[:-2])
            shutil.copytree(exported.folder, bundle)
            return Result(0, exported.result.err + exported.result.out, "")

        def make(folder: Path) -> Result:
            done = self._run(step)
            if not done.code:
                bundle.rename(folder)
            return done

        made = self.exports.get(f"{step.command}", make)
        shutil.copytree(made.folder, bundle)
        return made.result

    def _run(self, step: Step) -> Result:
        done = self._fork(step) if step.forks else self._process(step)
        return Result(done.returncode, done.stdout, done.stderr or "")

    def _fork(self, step: Step) -> subprocess.CompletedProcess[str]:
        if step.command is None:
            return prefork().run(program=step.program, cwd=self.folder)
        return prefork().run(arguments=step.words[1:], cwd=self.folder, merged=True)

    def _process(self, step: Step) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            step.arguments,
            cwd=self.folder,
            env=self.environment | step.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            check=False,
        )


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    return {**os.environ, **ISOLATED}


GIVEN = {
    "README.md": ("my-vit", "photo.png"),
    "docs/cli.md": ("wide.png",),
    "docs/tasks/fine-tuned.md": ("my-vit", "photo.png", "held_out"),
    "docs/tasks/timm.md": ("my-timm",),
    "docs/tasks/zero-shot.md": ("my-clip", "labels.txt", "photo.png"),
    "docs/tasks/colleague.md": ("my-vit",),
}
"""What a document takes for granted."""


def give(folder: Path, name: str) -> None:
    """Put there what stands for the reader's own."""
    photo, path = ROOT / IMAGES / "3_0045.png", folder / name
    if name == "my-vit":
        from tests.helpers.checkpoints import save_digits  # brings transformers: not for the quick tests

        save_digits(path)
    elif name == "my-clip":
        from tests.helpers.text_checkpoints import save_clip

        save_clip(path)
    elif name == "my-timm":
        shutil.copytree(ROOT / "tests/oracles/timm/vit", path, ignore=shutil.ignore_patterns("answer*"))
    elif name == "labels.txt":
        path.write_text("cat\ndog\nowl\n", encoding="utf-8")
    elif name == "held_out":
        words = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
        for image in (ROOT / IMAGES).iterdir():
            (path / words[int(image.name[0])]).mkdir(parents=True, exist_ok=True)
            shutil.copy(image, path / words[int(image.name[0])])
    elif name == "photo.png":
        shutil.copy(photo, path)
    else:
        assert name == "wide.png"
        with Image.open(photo) as image:
            image.resize((64, 32)).save(path)


@pytest.mark.slow
@pytest.mark.parametrize("document", RUN)
def test_commands_and_programs_do_what_the_document_shows(
    document: str, environment: dict[str, str], exports: Exports, tmp_path: Path
) -> None:
    shutil.copytree(ROOT / IMAGES, tmp_path / IMAGES)
    given = GIVEN.get(document, ())
    for name in given:
        give(tmp_path, name)
    shell = Shell(tmp_path, environment, exports, frozenset({"digits", *given} & {"digits", "my-vit"}))
    try:
        for step in with_free_ports([*steps(document)]):
            shell.run(step)
    finally:
        if shell.server is not None:
            shell.server.kill()
    assert shell.code == 0, f"{document} ends with a command that fails with exit code {shell.code}"


def verbs(*documents: str) -> set[str]:
    commands = [step.command.split() for document in documents for step in steps(document) if step.command]
    return {words[1] for words in commands if words[0] == "vitdeploy"}


def test_every_vitdeploy_command_of_the_readme_is_run() -> None:
    assert verbs("README.md") == {"export", "verify", "predict", "serve", "package"}
    assert verbs(*RUN) >= {"export", "predict", "verify", "inspect", "bench", "serve", "package"}
    for document in RUN:
        for block in _BLOCK.finditer((ROOT / document).read_text(encoding="utf-8")):
            hidden = block["language"] == "sh" and re.search(r"^\W*vitdeploy ", block["body"], re.MULTILINE)
            assert not hidden, f"{document}: a command in a block that is not run:\n{block['body']}"


def test_every_task_has_a_page_that_is_run() -> None:
    pages = {f"docs/tasks/{path.name}" for path in (ROOT / "docs/tasks").glob("*.md")}
    assert pages - {"docs/tasks/README.md"} == {name for name in RUN if name.startswith("docs/tasks/")}
    assert GIVEN.keys() <= {*RUN}
    index = (ROOT / "docs/tasks/README.md").read_text(encoding="utf-8")
    assert all(f"]({page.rpartition('/')[2]})" in index for page in pages - {"docs/tasks/README.md"})


def test_the_readme_is_read_in_a_minute() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 170


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
