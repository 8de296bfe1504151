"""Hub folders, and what lies in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vitdeploy.bundle.folder import Bundle
from vitdeploy.packaging.target import PackageSettings
from vitdeploy.packaging.write import Package, write_package


def hub_folder(bundle: Bundle, folder: Path, **settings: Any) -> Package:
    return write_package(bundle, "hub", folder, settings=PackageSettings(**settings))
