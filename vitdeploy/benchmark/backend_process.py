"""The process of a case: an artifact of a bundle on one of vitdeploy's own backends."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitdeploy.benchmark.loop import Array, Caller, LoadedModel, Outputs, run_process

if TYPE_CHECKING:
    from vitdeploy.backends.base import Options
    from vitdeploy.bundle.folder import Bundle


def job_of(
    bundle: Bundle, backend: str, artifact: str | None, options: Options, concurrency: int
) -> dict[str, Any]:
    """What the process is told: ``bundle`` at one of its image sizes, and how it is run.

    Args:
        artifact: None for the weights.
    """
    return {
        "bundle": str(bundle.root),
        "image_size": bundle.place,
        "backend": backend,
        "artifact": artifact,
        "threads": options.threads,
        "provider": options.provider,
        "device": options.device,
        "spin": options.spin,
        "concurrency": concurrency,
    }


def open_sessions(job: dict[str, Any]) -> LoadedModel:
    """Open a session per caller.

    Args:
        job: of :func:`job_of`.
    """
    from pydantic import TypeAdapter

    from vitdeploy.backends.base import Options, SessionFacts, get_backend
    from vitdeploy.bundle.folder import Bundle

    bundle, backend = Bundle.open(Path(job["bundle"])), get_backend(job["backend"])
    if bundle.sizes:
        height, width = job["image_size"] or bundle.sizes[0]
        bundle = bundle.at_size((height, width))
    artifact = None if job["artifact"] is None else bundle.artifact(job["artifact"])
    options = Options(**{name: job[name] for name in ("threads", "provider", "device", "spin")})
    sessions = backend.load_several(bundle, artifact, options, job["concurrency"])
    facts = TypeAdapter(SessionFacts).dump_python(sessions[0].facts, mode="json")
    return LoadedModel([_caller(session) for session in sessions], facts)


def _caller(session: Any) -> Caller:
    name, names = session.facts.inputs[0].name, [spec.name for spec in session.facts.outputs]

    session.timed = True

    def call(pixels: Array) -> tuple[Outputs, float | None]:
        outputs = session.run({name: pixels})
        return [outputs[key] for key in names], session.device_seconds

    return call


if __name__ == "__main__":
    run_process(open_sessions)
