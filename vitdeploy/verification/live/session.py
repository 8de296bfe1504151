"""A live model as a session, so that it is held against the reference as any other is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from vitdeploy.backends.base import Array, Session, SessionFacts
from vitdeploy.bundle.dtypes import ArtifactPrecision
from vitdeploy.config import BatchRange
from vitdeploy.verification.live.client import AnswerError, Client
from vitdeploy.verification.live.signature import Signature
from vitdeploy.verification.live.target import Target

Encoding = Literal["binary", "json", "protobuf"]


class LiveSession(Session):
    """Runs arrays on a live server.

    ``run`` raises ServerError where the server cannot be asked, and AnswerError where it answers with an
    error, without the output, or from another version than the one asked for.
    """

    def __init__(
        self,
        client: Client,
        target: Target,
        signature: Signature,
        precision: ArtifactPrecision,
        batch: BatchRange,
        encoding: Encoding,
    ) -> None:
        super().__init__(
            SessionFacts(
                backend=client.address.protocol,
                artifact=target.title,
                precision=precision,
                executes="",
                device="",
                provider=encoding,
                batch=batch,
                inputs=(signature.input,),
                outputs=(signature.output,),
                versions={target.server.name: target.server.version},
                rebuild="--batch says which sizes are sent",
            )
        )
        self.encoding = encoding
        self.answered: set[str] = set()
        """Versions that answered."""
        self.seconds = 0.0
        """That the last run took."""
        self._client = client
        self._target = target

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        wanted, asked = self.facts.outputs[0].name, self._target.asked
        answer = self._client.infer(
            self._target.name, asked, inputs, wanted, as_json=self.facts.provider == "json"
        )
        if wanted not in answer.outputs:
            there = ", ".join(answer.outputs) or "none at all"
            raise AnswerError(f"the answer lacks the output {wanted}; it has {there}")
        if answer.version:
            self.answered.add(answer.version)
        if asked and answer.version not in ("", asked):
            raise AnswerError(f"version {answer.version} answers, version {asked} was asked")
        array = answer.outputs[wanted]
        if array.dtype.kind not in "fiu":
            raise AnswerError(f"the output {wanted} has no numbers in it")
        self.seconds = answer.seconds
        return {wanted: array}

    def _close(self) -> None:
        """The client belongs to whoever made it."""
