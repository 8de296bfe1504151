"""The bundle run here: what a live server ought to answer where the bundle has no recorded reference."""

from __future__ import annotations

import numpy as np

from vitdeploy.backends.base import Array, Options, Session, all_backends, get_backend, run_in_batches
from vitdeploy.bundle.folder import Bundle
from vitdeploy.config import Preprocess
from vitdeploy.errors import VitdeployError
from vitdeploy.images.decode import load_image
from vitdeploy.images.preprocess import pixel_values
from vitdeploy.predictor import DEFAULT_BACKEND, choose_artifact
from vitdeploy.verification.parity import TOLERANCES


class LocalModel:
    """The most exact artifact of a bundle that something on this machine runs. Close it after use."""

    def __init__(self, bundle: Bundle, session: Session) -> None:
        self.bundle = bundle
        self.session = session

    @classmethod
    def open(cls, bundle: Bundle) -> LocalModel:
        """Open it with the first backend that runs it: ONNX Runtime, if that does.

        Raises:
            VitdeployError: none runs it here; the reason of the first that might.
        """
        reason: VitdeployError | None = None
        others = [backend for backend in all_backends() if backend.name != DEFAULT_BACKEND]
        for backend in (get_backend(DEFAULT_BACKEND), *others):
            if not backend.availability().ok:
                continue
            try:
                return cls(bundle, backend.load(bundle, choose_artifact(bundle, backend), Options()))
            except VitdeployError as error:
                reason = reason or error
        raise reason or VitdeployError(f"{bundle.root}: no backend works on this machine")

    @property
    def tolerance(self) -> float:
        """The relative error that its precision allows it."""
        return TOLERANCES[self.session.facts.precision].relative

    @property
    def title(self) -> str:
        """``onnx-fp32 on onnxruntime``."""
        return f"{self.session.facts.artifact} on {self.session.facts.backend}"

    def run(self, inputs: Array) -> Array:
        """The outputs (n, ...) of network inputs (n, ...), as many at a time as the artifact takes.

        Raises:
            BundleError: the runtime fails.
        """
        facts = self.session.facts
        size = facts.batch.opt if facts.batch else 8
        return np.concatenate(run_in_batches(self.session, inputs, size))[: len(inputs)]

    def pixels(self, data: bytes, spec: Preprocess | None = None) -> Array:
        """The model's input for an image file, as the bundle or another ``spec`` preprocesses.

        Raises:
            ImageError: it cannot be decoded.
        """
        spec = spec or self.bundle.manifest.preprocess
        if spec is None:
            raise VitdeployError(f"{self.bundle.root}: says nothing of preprocessing")
        return pixel_values(load_image(data), spec, self.bundle.manifest.input)

    def close(self) -> None:
        """Free what the runtime holds."""
        self.session.close()
