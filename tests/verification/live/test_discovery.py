"""Which of a server's models is the bundle's, and which version; and what decides on the tolerances."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.fakes.v2_grpc_server import GrpcServer
from tests.fakes.v2_models import ensemble, in_half, linear, served
from tests.fakes.v2_server import V2Server
from tests.helpers.bundles import write_bundle
from tests.helpers.quantised_bundles import quantised_answer, write_quantised
from vitdeploy.bundle.folder import Bundle
from vitdeploy.errors import ServerError, UsageError
from vitdeploy.verification.live.round import LiveRequest, verify_live

FEW = {"calls": 5, "batches": [1]}


def test_the_model_of_the_bundle_s_name(bundle: Bundle) -> None:
    with V2Server({"other": served(), "linear": served()}) as server:
        assert verify_live(bundle, LiveRequest(server.url, **FEW)).model == "linear"


def test_a_name_in_another_spelling_and_the_folder_s(tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "my-folder.bundle", name="google/ViT_base")
    for name in ("google-vit-base", "my_folder"):
        with V2Server({"other": served(), name: served()}) as server:
            assert verify_live(made, LiveRequest(server.url, **FEW)).model == name


def test_the_only_model_there_is(bundle: Bundle) -> None:
    with V2Server({"vit": served(), "vit_image": ensemble()}) as server:
        assert verify_live(bundle, LiveRequest(server.url, **FEW)).model == "vit"


def test_two_that_it_could_be(bundle: Bundle) -> None:
    with V2Server({"liner": served(), "vit": served()}) as server, pytest.raises(UsageError) as caught:
        verify_live(bundle, LiveRequest(server.url))
    assert "did you mean 'liner'" in caught.value.message
    assert caught.value.hint == "--model says which; it has liner, vit"


def test_none_at_all(bundle: Bundle) -> None:
    with V2Server({}) as server, pytest.raises(ServerError, match="serves no model at all"):
        verify_live(bundle, LiveRequest(server.url))


@pytest.mark.parametrize("kind", [V2Server, GrpcServer])
def test_an_unknown_model(bundle: Bundle, kind: type[V2Server] | type[GrpcServer]) -> None:
    with kind({"linear": served()}) as server, pytest.raises(UsageError) as caught:
        verify_live(bundle, LiveRequest(server.url, model="linaer"))
    assert "has no model 'linaer'; did you mean 'linear'" in caught.value.message
    assert caught.value.hint == "it has linear"


def test_an_unknown_model_of_a_server_without_an_index(bundle: Bundle) -> None:
    with V2Server({"linear": served()}, index=False) as server:
        assert verify_live(bundle, LiveRequest(server.url, **FEW)).passed
        with pytest.raises(UsageError, match="does not serve linaer: HTTP 404: unknown model"):
            verify_live(bundle, LiveRequest(server.url, model="linaer"))
        with pytest.raises(UsageError, match="does not serve linear version 3"):
            verify_live(bundle, LiveRequest(server.url, version="3"))


@pytest.mark.parametrize("kind", [V2Server, GrpcServer])
def test_versions(bundle: Bundle, kind: type[V2Server] | type[GrpcServer]) -> None:
    wrong = served(versions={"1": linear(), "2": lambda x: -linear()(x)})
    with kind({"linear": wrong}) as server:
        first = verify_live(bundle, LiveRequest(server.url, version="1", **FEW))
        assert first.passed
        assert first.version == "1"
        report = verify_live(bundle, LiveRequest(server.url, **FEW))
        assert not report.passed
        assert report.version == "2"
        assert "version 1 on the server gives the right answers: the wrong one is asked" in report.causes
        with pytest.raises(UsageError, match="linear has no version '7'") as caught:
            verify_live(bundle, LiveRequest(server.url, version="7"))
        assert caught.value.hint == "it has 1, 2"


def test_another_version_answers_than_was_asked(bundle: Bundle) -> None:
    with V2Server({"linear": served()}, fault="other-version") as server:
        report = verify_live(bundle, LiveRequest(server.url, version="1", **FEW))
    assert "version 99 answers, version 1 was asked" in report.failures[0]


def test_a_model_that_is_not_ready(bundle: Bundle) -> None:
    with V2Server({"linear": served(ready=False)}) as server, pytest.raises(ServerError) as caught:
        verify_live(bundle, LiveRequest(server.url))
    assert caught.value.message.endswith("linear is not ready: still loading")


def test_whose_tolerances_decide(tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "b", precisions=("fp32", "fp16"))
    with V2Server({"linear": served(in_half)}) as server:
        loose = verify_live(made, LiveRequest(server.url, **FEW))
        assert (loose.passed, loose.precision, loose.fits) == (True, "fp16", "fp16")
        assert any("does not say which artifact it runs, so fp16 decides" in note for note in loose.notes)
        strict = verify_live(made, LiveRequest(server.url, artifact="onnx-fp32", **FEW))
        assert (strict.passed, strict.precision, strict.fits) == (False, "fp32", "fp16")
        assert strict.causes[0] == "the numbers are as exact as fp16, not as fp32"
        with pytest.raises(UsageError, match="no artifact 'bf16'"):
            verify_live(made, LiveRequest(server.url, artifact="bf16"))
    for kind in (V2Server, GrpcServer):
        with kind({"linear": served(in_half, parameters={"vitdeploy_artifact": "onnx-fp32"})}) as server:
            told = verify_live(made, LiveRequest(server.url, **FEW))
        assert (told.passed, told.precision) == (False, "fp32")


def test_another_build_of_the_bundle(bundle: Bundle) -> None:
    facts = {"parameters": {"vitdeploy_bundle": "0123456789abcdef"}}
    with V2Server({"linear": served(**facts)}) as server:
        right = verify_live(bundle, LiveRequest(server.url, **FEW))
    assert right.passed
    assert any("another build (digest 0123456789ab, not" in note for note in right.notes)
    with V2Server({"linear": served(lambda x: linear()(x) + x[:, 0, 0, :5], **facts)}) as server:
        wrong = verify_live(bundle, LiveRequest(server.url, **FEW))
    assert any(cause.startswith("the server serves another bundle (digest") for cause in wrong.causes)


COARSE = 12


def in_int8(inputs: np.ndarray) -> np.ndarray:
    """Rounded so coarsely that no float precision's tolerance holds."""
    return quantised_answer(inputs, "int8", COARSE).astype(np.float32)


def test_quantised_answers_are_held_against_held_out_images(tmp_path: Path) -> None:
    made = write_quantised(tmp_path / "b", kinds=("int8",), steps=COARSE)
    named = {"parameters": {"vitdeploy_artifact": "onnx-int8"}}
    with V2Server({"linear": served(in_int8, **named)}) as server:
        right = verify_live(made, LiveRequest(server.url, **FEW))
    assert right.passed, right.failures
    assert (right.precision, right.fits) == ("int8", "int8")
    assert {record.metrics.rows for record in right.parity} == {6}


def test_other_numbers_than_the_artifact_s(tmp_path: Path) -> None:
    made = write_quantised(tmp_path / "b", kinds=("int8",), steps=COARSE)
    with V2Server({"linear": served(parameters={"vitdeploy_artifact": "onnx-int8"})}) as server:
        wide = verify_live(made, LiveRequest(server.url, **FEW))
    assert (wide.passed, wide.precision, wide.fits) == (True, "int8", "fp32")
    with V2Server({"linear": served(in_int8, parameters={"vitdeploy_artifact": "onnx-fp32"})}) as server:
        narrow = verify_live(made, LiveRequest(server.url, **FEW))
    assert (narrow.passed, narrow.precision) == (False, "fp32")
    assert narrow.causes[0] == "the numbers are as exact as int8, not as fp32"


def test_what_the_bundle_has_is_the_likelier_explanation(tmp_path: Path) -> None:
    """Numbers that are within bf16's tolerance, too, of a bundle that has int8 and no bf16."""
    made = write_quantised(tmp_path / "b", kinds=("int8",))

    def run(inputs: np.ndarray) -> np.ndarray:
        return quantised_answer(inputs, "int8").astype(np.float32)

    with V2Server({"linear": served(run)}) as server:
        report = verify_live(made, LiveRequest(server.url, artifact="onnx-fp32", **FEW))
    assert report.fits == "bf16"
    assert report.causes[0] == "the numbers are as exact as int8, not as fp32"


def test_a_server_that_does_not_say_what_it_runs_may_be_quantised(tmp_path: Path) -> None:
    made = write_quantised(tmp_path / "b", kinds=("int8",), steps=COARSE)
    with V2Server({"linear": served(in_int8)}) as server:
        report = verify_live(made, LiveRequest(server.url, **FEW))
    assert (report.passed, report.precision, report.fits) == (True, "int8", "int8")
    assert any("so int8 decides" in note for note in report.notes)
