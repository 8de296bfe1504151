"""Servers behind TLS, with a certificate made on the spot."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.fakes.v2_grpc_server import GrpcServer
from tests.fakes.v2_models import predict, served
from tests.fakes.v2_server import V2Server
from vitdeploy.bundle.folder import Bundle
from vitdeploy.errors import ServerError, UsageError
from vitdeploy.verification.live.round import LiveRequest, verify_live


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1, signed by itself, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    paths = folder / "certificate.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-out", paths[0], "-keyout", paths[1]]
    subprocess.run([*command, *names], check=True, capture_output=True)
    return paths


@pytest.mark.slow
def test_a_trusted_server(bundle: Bundle, certificate: tuple[Path, Path]) -> None:
    facts = {"name": "vitdeploy", "predict": predict(), "tls": certificate}
    with V2Server({"linear": served()}, **facts) as server:
        report = verify_live(bundle, LiveRequest(server.url, ca=certificate[0], calls=5))
    assert report.passed, report.failures
    assert report.url.startswith("https://")
    assert len(report.images) == 4


@pytest.mark.slow
def test_a_server_that_nobody_vouches_for(bundle: Bundle, certificate: tuple[Path, Path]) -> None:
    with V2Server({"linear": served()}, tls=certificate) as server, pytest.raises(ServerError) as caught:
        verify_live(bundle, LiveRequest(server.url))
    assert "its certificate is not trusted: self-signed certificate" in caught.value.message
    assert "--ca-cert" in str(caught.value.hint)


def test_grpc_with_tls(bundle: Bundle, certificate: tuple[Path, Path]) -> None:
    with GrpcServer({"linear": served()}, tls=certificate) as server:
        assert verify_live(bundle, LiveRequest(server.url, ca=certificate[0], calls=5)).passed
        with pytest.raises(ServerError, match=r"grpcs://.*no TLS with it") as caught:
            verify_live(bundle, LiveRequest(server.url))
    assert "--ca-cert" in str(caught.value.hint)


@pytest.mark.slow
def test_tls_to_a_server_without(bundle: Bundle) -> None:
    with V2Server({"linear": served()}) as server:
        for scheme in ("https", "grpcs"):
            with pytest.raises(ServerError, match=f"{scheme}://127"):
                verify_live(bundle, LiveRequest(f"{scheme}://127.0.0.1:{server.port}"))


def test_no_tls_to_a_server_with(bundle: Bundle, certificate: tuple[Path, Path]) -> None:
    with V2Server({"linear": served()}, tls=certificate) as server, pytest.raises(ServerError):
        verify_live(bundle, LiveRequest(f"http://127.0.0.1:{server.port}"))


def test_certificates_that_cannot_be_read(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "junk.pem").write_text("junk")
    for name in ("junk.pem", "nowhere.pem"):
        with pytest.raises(UsageError, match=f"{name}: has no certificates that can be read"):
            verify_live(bundle, LiveRequest("https://127.0.0.1:1", ca=tmp_path / name))
