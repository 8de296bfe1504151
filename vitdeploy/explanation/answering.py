"""Attention rollouts on request, by a process of its own: PyTorch and the weights stay out of a server.

Requests and answers are lines of JSON (``vitdeploy.machine.child``):

    {"do": "rollout", "bundle": PATH, "digest": D, "fit": RULE, "max_pixels": N, "image": BASE64}
        one image file; {"rollout": [[...]], "picture": DATA URL, "size": "HxW"}

An answer {"error": {"kind", "message", "hint"}} ends nothing. The model that was asked last stays in memory.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitdeploy.bundle.folder import Bundle
from vitdeploy.config import Size, size_name
from vitdeploy.errors import BundleError, ExportError, VitdeployError
from vitdeploy.exporter import exporting
from vitdeploy.images.decode import keep_quiet, load_image
from vitdeploy.images.fitting import fit, parse_rule
from vitdeploy.images.preprocess import shown_size
from vitdeploy.machine.child import private_pipes, record_of
from vitdeploy.machine.processors import processors

if TYPE_CHECKING:
    from vitdeploy.explanation.looking import Looker

COMMAND = (sys.executable, "-P", "-m", "vitdeploy.explanation.answering")
"""The process."""
_NICE = 10
"""Whoever is served comes first."""


class Rollouts:
    """Answers requests, with one model in memory at a time."""

    def __init__(self) -> None:
        self._key: tuple[str, str, Size | None] | None = None
        self._looker: Looker | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """What one request asks for.

        Raises:
            MissingDependency: PyTorch is not installed.
            ImageError: the image cannot be read.
            UsageError: the model has no rollout.
            BundleError: the bundle is damaged, or no longer the one that is meant.
        """
        with exporting("the attention rollout"):
            from vitdeploy.explanation.figures import numbers
            from vitdeploy.explanation.looking import preprocess_of
            from vitdeploy.explanation.pictures import data_url, easily_seen, encoded, over

        bundle = Bundle.open(Path(request["bundle"]))
        if bundle.manifest.digest != request["digest"]:
            raise BundleError(f"{bundle.root}: was replaced, and is not yet the one that is served")
        spec = preprocess_of(bundle)
        image = load_image(base64.b64decode(request["image"]), request["max_pixels"])
        several = len(bundle.sizes) > 1
        size = fit(shown_size(image, spec), bundle.sizes, parse_rule(request["fit"])) if several else None
        picture, rollout = self._looker_of(bundle, size).rollout(image)
        drawn = over(easily_seen(picture), rollout)
        return {
            "rollout": numbers(rollout),
            "picture": data_url(encoded(drawn, "WEBP"), "WEBP"),
            "size": size_name(size or picture.shape[:2]),
        }

    def _looker_of(self, bundle: Bundle, size: Size | None) -> Looker:
        from vitdeploy.explanation.looking import looker_of, preprocess_of

        key = (str(bundle.root), bundle.manifest.digest, size)
        if self._looker is None or self._key != key:
            self._looker = None  # before the next one is loaded: there is memory for one
            view = bundle if size is None else bundle.at_size(size)
            self._looker, self._key = looker_of(view, preprocess_of(view)), key
        return self._looker


def _answer_requests() -> None:
    """Until standard input ends, with whoever asks."""
    requests, answers = private_pipes()
    os.nice(_NICE)
    os.environ.setdefault("OMP_NUM_THREADS", str(processors()))  # not those that a quota stops
    keep_quiet()
    rollouts = Rollouts()
    requests.readline()  # the job, which says nothing more
    for line in requests:
        try:
            answer = rollouts.answer(json.loads(line))
        except (VitdeployError, OSError) as error:
            answer = {"error": record_of(error)}
        except MemoryError:
            answer = {"error": record_of(ExportError("the model needs more memory than there is"))}
        answers.write(json.dumps(answer, allow_nan=False) + "\n")


if __name__ == "__main__":
    _answer_requests()
