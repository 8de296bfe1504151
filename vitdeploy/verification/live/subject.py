"""A bundle at one of its image sizes, and what it gives here: what a live server is held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import get_args

from vitdeploy.backends.base import Array
from vitdeploy.bundle.dtypes import ArtifactPrecision, Quantised
from vitdeploy.bundle.folder import HELD_OUT, Bundle
from vitdeploy.bundle.golden import reference_of
from vitdeploy.config import Size, size_name
from vitdeploy.errors import VitdeployError
from vitdeploy.predictor import Predictor
from vitdeploy.verification.live.diagnosis import relative
from vitdeploy.verification.live.images import Expected, ImageFile, expect
from vitdeploy.verification.live.signature import model_signature


class Subject:
    """Each thing is read and computed once.

    Args:
        view: the bundle, at this size alone.
        size: None where it has no other.

    Raises:
        BundleError: it is damaged.
        UsageError: nothing can serve it.
    """

    def __init__(self, view: Bundle, size: Size | None) -> None:
        self.view, self.size = view, size
        self.golden, self._held_out = view.golden(), view.tensors(HELD_OUT)
        self.signature = model_signature(view)
        self._local: Predictor | VitdeployError | None = None
        self._local_error: float | None = None
        self._expected: dict[ImageFile, Expected] = {}

    def golden_of(self, precision: ArtifactPrecision) -> Mapping[str, Array]:
        """What answers of this precision are held against."""
        return self._held_out if precision in get_args(Quantised) else self.golden

    def local(self) -> Predictor | VitdeployError:
        """It run here, or the reason why it does not."""
        if self._local is None:
            try:
                self._local = Predictor.open_most_exact(self.view)
            except VitdeployError as error:
                self._local = error
        return self._local

    def local_error(self, local: Predictor) -> float:
        """The largest relative error of its logits here, of the tensors that prove it."""
        if self._local_error is None:
            golden = self.golden_of(local.session.facts.precision)
            logits = local.outputs(golden["pixel_values"])["logits"]
            self._local_error = relative(reference_of(golden, "logits"), logits)
        return self._local_error

    def expected(self, local: Predictor, files: Sequence[ImageFile]) -> list[Expected]:
        """What image files give here."""
        name = None if self.size is None else size_name(self.size)
        if new := [file for file in files if file not in self._expected]:
            found = (replace(item, size=name) for item in expect(local, new))
            self._expected |= zip(new, found, strict=True)
        return [self._expected[file] for file in files]

    def close(self) -> None:
        """Free what the runtime holds."""
        if isinstance(self._local, Predictor):
            self._local.close()


def subjects_of(bundle: Bundle) -> tuple[Subject, ...]:
    """One for each image size, the default first."""
    several = len(bundle.views) > 1
    return tuple(Subject(view, view.manifest.image_size if several else None) for view in bundle.views)
