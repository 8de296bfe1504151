"""The folder for temporary files, which a read-only container may not have."""

from __future__ import annotations

import tempfile

from vitdeploy.errors import DeviceUnavailable


def temporary_folder() -> str:
    """Where Python's temporary files go: ``TMPDIR``, else the system's, else where this runs.

    Raises:
        DeviceUnavailable: none of them can be written to.
    """
    try:
        return tempfile.gettempdir()
    except OSError as error:
        raise DeviceUnavailable(
            "no folder for temporary files can be written to",
            hint="set TMPDIR to one that can, or give the container a writable /tmp",
        ) from error
