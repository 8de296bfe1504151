"""Images at http(s) addresses, for a user who names one: fetched when they are read, within bounds."""

from __future__ import annotations

import io
import re
import time

from vitdeploy._version import __version__
from vitdeploy.errors import ImageError

MAX_BYTES = 64 * 2**20
"""Of an image file."""
_SECONDS = 30.0
_CHUNK = 1 << 16


def is_address(text: str) -> bool:
    """Whether this is ``scheme://...`` rather than a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


class RemoteImage(io.BufferedIOBase):
    """A binary file, as ``load_image`` takes it, that is fetched by its :meth:`read`.

    Args:
        url: an http or https address; proxies are taken from the environment, redirects lead to such
            addresses only.
        limit: bytes.
        seconds: for all of it.

    Raises:
        ImageError: an address of another kind.
    """

    def __init__(self, url: str, limit: int = MAX_BYTES, seconds: float = _SECONDS) -> None:
        if not re.match(r"https?://", url, re.IGNORECASE):
            raise ImageError(f"{url}: images are fetched over http and https only", hint="download it first")
        self.name = url
        self._limit, self._seconds = limit, seconds

    def seekable(self) -> bool:
        return False

    def read(self, size: int | None = -1, /) -> bytes:
        """All of it.

        Raises:
            ImageError: it cannot be fetched, is larger than the limit, or takes too long.
        """
        from http.client import HTTPException
        from urllib import request
        from urllib.error import HTTPError, URLError

        opener = request.OpenerDirector()  # without the handlers of file:, ftp: and data:
        for handler in (
            request.ProxyHandler,
            request.UnknownHandler,
            request.HTTPHandler,
            request.HTTPSHandler,
            request.HTTPDefaultErrorHandler,
            request.HTTPRedirectHandler,
            request.HTTPErrorProcessor,
        ):
            opener.add_handler(handler())
        end = time.monotonic() + self._seconds
        data = bytearray()
        try:
            asked = request.Request(self.name, headers={"User-Agent": f"vitdeploy/{__version__}"})
            with opener.open(asked, timeout=self._seconds) as answer:
                while chunk := answer.read1(_CHUNK):
                    data += chunk
                    if len(data) > self._limit:
                        raise self._refused(f"has more than {self._limit} bytes")
                    if time.monotonic() >= end:
                        raise self._refused(f"was not there within {self._seconds:g} s")
        except HTTPError as error:
            raise self._refused(f"answers {error.code} {error.reason}") from error
        except URLError as error:
            reason = getattr(error.reason, "strerror", None) or error.reason
            raise self._refused(f"cannot be fetched: {reason}") from error
        except TimeoutError as error:
            raise self._refused(f"was not there within {self._seconds:g} s") from error
        except (OSError, HTTPException, ValueError) as error:
            raise self._refused(f"cannot be fetched: {str(error) or type(error).__name__}") from error
        return bytes(data)

    def _refused(self, why: str) -> ImageError:
        return ImageError(f"{self.name} {' '.join(why.split())}", hint="download it, and name the file")
