"""The application that serve_config.yaml names. Written by `vitdeploy package`.

Everything it does is in `vitdeploy.ray.serving`; its settings are the `args` in serve_config.yaml.
"""

from pathlib import Path
from typing import Any

from vitdeploy.ray.serving import application

BUNDLE = Path(__file__).resolve().parent / "model.bundle"


def build(args: dict[str, Any]) -> Any:
    """Called by Ray Serve with `args`."""
    return application(BUNDLE, args)
