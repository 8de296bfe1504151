"""What a bundle keeps of measurements: which choice takes the place of which, and what still holds."""

from __future__ import annotations

from vitdeploy.bundle.folder import Bundle
from vitdeploy.bundle.manifest import Artifact, Choice


def write_choices(bundle: Bundle, *choices: Choice) -> Bundle:
    """Put choices into a bundle, each in the place of an earlier one for the same.

    What is picked for throughput says how to serve, too, so that an earlier plan for that goes.

    Raises:
        BundleError: the bundle cannot be written, or changed meanwhile.
    """
    whole = bundle.whole
    gone = {choice.replaces for choice in choices}
    picked = {
        (choice.machine, choice.image_size, choice.backend, choice.provider, choice.artifact)
        for choice in choices
        if choice.goal == "throughput"
    }
    others = [old for old in whole.manifest.choices if old.replaces not in gone | picked]
    with whole.edit() as writer:
        writer.seal(whole.manifest.model_copy(update={"choices": (*others, *choices)}))
        return writer.commit()


def files_of(bundle: Bundle, artifact: Artifact | None) -> dict[str, str]:
    """An artifact as it is, in the form of ``Choice.files``."""
    return {name: bundle.manifest.files[name].sha256 for name in artifact.files} if artifact else {}
