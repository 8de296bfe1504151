"""EP-context models: an ONNX file with the compiled engine in it or beside it.

Any ONNX Runtime with the same provider opens one without compiling anything:
https://onnxruntime.ai/docs/execution-providers/EP-Context-Design.html. None has been run on
a GPU by this project yet; those of TensorRT for RTX have been made, behind a stand-in for the CUDA driver.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from vitdeploy.backends import onnxruntime_providers as providers
from vitdeploy.backends.base import one_line
from vitdeploy.backends.onnxruntime import session_settings
from vitdeploy.backends.onnxruntime_providers import Setup, set_up, unavailable
from vitdeploy.bundle.folder import Bundle
from vitdeploy.bundle.manifest import Artifact
from vitdeploy.bundle.staging import StagedFolder
from vitdeploy.errors import ExportError, UsageError

if TYPE_CHECKING:
    import onnx

_MODEL = "model.onnx"
_COMPILES = ("tensorrt", "tensorrt-rtx")


@dataclass(frozen=True)
class EpContext:
    """What has been written."""

    folder: Path
    files: tuple[str, ...]
    """``model.onnx``, and the engine where it lies beside it."""
    provider: str
    onnxruntime: str
    """Its version; the provider's own is written in the model."""

    @property
    def model(self) -> Path:
        return self.folder / _MODEL


def export_ep_context(
    bundle: Bundle,
    artifact: Artifact,
    provider: str,
    target: Path,
    *,
    device: int = 0,
    arch: str | None = None,
    embed: bool = True,
    force: bool = False,
) -> EpContext:
    """Compile an ONNX artifact with one of ONNX Runtime's providers, and keep the result.

    Args:
        provider: ``tensorrt`` or ``tensorrt-rtx``.
        target: the folder to write; it appears whole, or not at all.
        device: the GPU to compile for.
        arch: ``tensorrt-rtx`` only: the architecture to compile for, ``sm_89``, whatever the GPU here is.
        embed: put the engine into ``model.onnx``, not beside it.
        force: replace ``target``.

    Raises:
        UsageError: the artifact is no ONNX, the provider compiles nothing, or ``target`` exists.
        BundleError: the artifact's files are damaged.
        MissingDependency, DeviceUnavailable: ONNX Runtime, the provider or the GPU is not there.
        ExportError: the provider cannot compile the model, or the disk refuses the result.
    """
    _check_request(artifact, provider, arch, target, force)
    library = providers.open_library()
    setup = set_up(library, bundle, artifact, provider, device, arch=arch)
    bundle.verify_hashes(artifact.files)
    compile_model = _by_session if provider == "tensorrt" else _by_compiler
    try:
        with StagedFolder(target) as staged:
            try:
                compile_model(library, bundle, artifact, setup, staged.path / _MODEL, embed)
            except Exception as error:  # ONNX Runtime's errors have no base class of their own
                message = f"{artifact.name}: the {provider} provider cannot compile it: {one_line(error)}"
                raise unavailable(error, artifact, provider) or ExportError(message) from error
            _settle(staged.path, artifact, embed, whole=bundle.manifest.model is not None)
            files = tuple(sorted(path.name for path in staged.path.iterdir()))
            staged.commit(replace=force)
    except OSError as error:
        raise ExportError(f"cannot write {target}: {error.strerror or error}") from error
    return EpContext(target, files, provider, library.__version__)


def _check_request(artifact: Artifact, provider: str, arch: str | None, target: Path, force: bool) -> None:
    if artifact.format != "onnx":
        raise UsageError(f"{artifact.name} is {artifact.format}: an EP-context model is made from ONNX")
    if provider not in _COMPILES:
        known = " and ".join(_COMPILES)
        raise UsageError(f"the provider {provider!r} compiles no engines", hint=f"those that do: {known}")
    if arch is not None and provider != "tensorrt-rtx":
        raise UsageError(f"the {provider} provider compiles for the GPU it finds, not for {arch}")
    if target.exists() and not force:
        raise UsageError(f"{target} exists already", hint="--force replaces it")


def _by_session(
    library: Any, bundle: Bundle, artifact: Artifact, setup: Setup, model: Path, embed: bool
) -> None:
    """TensorRT's provider knows its profile, so it compiles and writes when a session is made."""
    name, options = setup.providers[0]
    context = {key: value for key, value in options.items() if not key.startswith("trt_engine_cache")} | {
        "trt_dump_ep_context_model": "1",
        "trt_ep_context_file_path": str(model),
        "trt_ep_context_embed_mode": str(int(embed)),
    }
    if not embed:  # the engine beside the model is its cache, in a folder relative to the model's
        context["trt_engine_cache_enable"] = "1"
    settings = session_settings(library, bundle, "tensorrt")
    path = bundle.path(artifact.path)
    requested = [(name, context), *setup.providers[1:]]
    library.InferenceSession(path, settings, providers=requested, enable_fallback=0)


def _by_compiler(
    library: Any, bundle: Bundle, artifact: Artifact, setup: Setup, model: Path, embed: bool
) -> None:
    settings = session_settings(library, bundle, "tensorrt-rtx")
    for name, options in setup.add_to(settings) or ():
        settings.add_provider(name, options)
    compiler = library.ModelCompiler(
        settings,
        bundle.path(artifact.path),
        embed_compiled_data_into_model=embed,
        flags=library.OrtCompileApiFlags.ERROR_IF_NO_NODES_COMPILED,
    )
    compiler.compile_to_file(str(model))


def _settle(folder: Path, artifact: Artifact, embed: bool, *, whole: bool) -> None:
    """Check what the provider wrote, and make it movable: its engine is named relative to the model.

    The plugin of TensorRT for RTX 0.5.0 writes the path that it was given, which ends where the folder moves.
    """
    import onnx

    path = folder / _MODEL
    if not path.is_file():
        raise ExportError(f"{artifact.name}: the provider reported success, but wrote no EP-context model")
    model = onnx.load(path, load_external_data=False)
    engines = [node for node in model.graph.node if node.op_type == "EPContext"]
    others = sorted({node.op_type for node in model.graph.node if node.op_type != "EPContext"})
    if not engines or (whole and others):
        left = ", ".join(others)
        raise ExportError(
            f"{artifact.name}: the provider compiles {len(engines)} parts of it and leaves {left}"
        )
    for node in engines:
        _settle_engine(node, folder, artifact, embed)
    onnx.save(model, path)


def _settle_engine(node: onnx.NodeProto, folder: Path, artifact: Artifact, embed: bool) -> None:
    attributes = {attribute.name: attribute for attribute in node.attribute}
    content, mode = attributes.get("ep_cache_context"), attributes.get("embed_mode")
    if content is None or mode is None or mode.i != int(embed):
        raise ExportError(
            f"{artifact.name}: the provider wrote a context without the engine that was asked for"
        )
    if embed:
        if not content.s:
            raise ExportError(f"{artifact.name}: the provider wrote a context with an empty engine")
        return
    engine = PurePosixPath(content.s.decode()).name
    if not engine or not (folder / engine).is_file():
        raise ExportError(f"{artifact.name}: the provider names an engine that it did not write: {engine!r}")
    content.s = engine.encode()
