"""Whether a server answers rightly: a fast wrong answer is no result."""

from __future__ import annotations

import urllib.request
from collections.abc import Mapping

import numpy as np

from benchmarks.serving.driving import Served
from benchmarks.serving.processes import ServerFailure
from benchmarks.serving.subjects import Asked, Subject, class_of, logits_of
from vitdeploy.backends.base import Array
from vitdeploy.verification.parity import TOLERANCES, measure_parity, tolerance_failures


def check(server: Served, subject: Subject) -> Served:
    """Hold every answer of a server against the float64 reference; those to images, against the predictor.

    Raises:
        ServerFailure: one is wrong.
    """
    for kind, asked in server.asks.items():
        answers = [_ask(server, asked, body) for body in asked.bodies]
        if kind == "image":
            wrong = [i for i, (body, _) in enumerate(answers) if class_of(body) != subject.classes[i]]
            if wrong:
                raise ServerFailure(f"{server.name} takes image {wrong[0]} for another class")
            continue
        found = [logits_of(body, headers, subject.output) for body, headers in answers]
        rows = [row for row in found if row is not None and row.shape == subject.reference.shape[1:]]
        if len(rows) < len(found) or (wrong_rows := why_wrong(subject, np.stack(rows))):
            why = "no logits" if len(rows) < len(found) else wrong_rows
            raise ServerFailure(f"{server.name} answers tensors wrongly: {why}")
    return server


def why_wrong(subject: Subject, logits: Array) -> str:
    """What of the logits of all golden inputs is not within its precision's tolerance; empty if nothing."""
    tolerance = TOLERANCES[subject.artifact.precision]
    return "; ".join(
        tolerance_failures(measure_parity(subject.reference, logits, tolerance, "logits"), tolerance)
    )


def _ask(server: Served, asked: Asked, body: bytes) -> tuple[bytes, Mapping[str, str]]:
    url = f"http://127.0.0.1:{server.port}{asked.path}"
    request = urllib.request.Request(url, body, dict(asked.headers))
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.read(), response.headers
    except OSError as error:
        raise ServerFailure(f"{server.name}: {error}") from error
