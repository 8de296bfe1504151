"""Publishing a hub folder, by the hub's own library and only where it was asked for."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from vitdeploy.errors import ExportError, MissingDependency, UsageError
from vitdeploy.packaging.target import PackageSettings

_WORD = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_REPOSITORY = re.compile(rf"(?=.{{3,96}}\Z){_WORD}/{_WORD}")
_HINT = (
    "check the network, and HF_TOKEN or `hf auth login`; the folder is whole: hf upload {repository} {folder}"
)


def require_pushing(repository: str | None, private: bool | None) -> None:
    """See that a folder could be pushed, before it is written.

    Raises:
        UsageError: this cannot be a repository, or nothing is to be pushed into a private one.
        MissingDependency: the hub's library is not installed.
    """
    if repository is None:
        if private:
            raise UsageError("--private is about the repository that --push names", hint="--push OWNER/NAME")
        return
    if not _REPOSITORY.fullmatch(repository):
        raise UsageError(
            f"--push {repository!r}: no name of a repository",
            hint="--push OWNER/NAME: letters, digits, - _ and ., not first or last, at most 96 in all",
        )
    if find_spec("huggingface_hub") is None:
        raise MissingDependency("huggingface-hub", extra="hub", purpose="--push")


def push(folder: Path, settings: PackageSettings) -> tuple[str, ...]:
    """Upload the folder as one commit; the repository is made where there is none. Returns where it is.

    The library finds the token by itself: ``HF_TOKEN``, or what ``hf auth login`` has kept.

    Raises:
        ExportError: the hub refuses, or cannot be reached; the folder stays.
    """
    from huggingface_hub import HfApi

    repository = settings.push
    assert repository is not None
    api = HfApi(library_name="vitdeploy")
    try:
        api.create_repo(repository, private=settings.private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Verified with vitdeploy"
        )
    except Exception as error:  # the library raises HTTP, cache and validation errors of many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportError(
            f"--push {repository}: the hub did not take {folder}: {reason}",
            hint=_HINT.format(repository=repository, folder=folder),
        ) from error
    return (f"pushed to {repository}: {commit.commit_url}",)
