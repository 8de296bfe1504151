"""The system under test that MLPerf's LoadGen drives: it sends each sample to a server over HTTP.

    python -m benchmarks.serving.mlperf_sut < job.json        # in the environment "loadgen"

LoadGen decides when which sample is due, measures, and writes its logs; what is here only carries requests
that were put together beforehand, each with one image, and reports the answers. All that are due wait for one
of so many connections. A request that fails is reported as answered, with nothing, and counted.

The job is a JSON object on standard input:

    host, port, path, headers   where to ask
    bodies                      files, one for each sample of the library
    connections                 how many requests are in flight at most
    scenario, mode              names of LoadGen's
    settings                    fields of its TestSettings
    logs                        a folder for its logs

The answer is one JSON object: ``failed`` requests and ``cpu``, this process's share of one processor.
Needs LoadGen and the standard library only.
"""

from __future__ import annotations

import array
import json
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlperf_loadgen

from benchmarks.serving.connections import Connections, Exchange, whole_requests
from benchmarks.serving.load import exact_loop

_HEADER_LENGTH = b"inference-header-content-length:"
"""The head of an answer whose tensors are binary says where they begin."""


class Sut:
    """Takes queries on LoadGen's threads, and carries them on a thread of its own."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._requests = whole_requests(job, [Path(path).read_bytes() for path in job["bodies"]])
        self._loop = exact_loop()
        keep = job["mode"] == "AccuracyOnly"
        where = (job["host"], job["port"], job["connections"])
        self._connections = Connections(*where, self._finished, keep=keep)
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.failed = 0

    def issue(self, samples: Sequence[Any]) -> None:
        """LoadGen's queries; returns at once."""
        due = time.monotonic()
        exchanges = [Exchange(self._requests[one.index], due, one.id) for one in samples]
        self._loop.call_soon_threadsafe(self._ask, exchanges)

    def flush(self) -> None:
        """No query waits for more to come."""

    def close(self) -> None:
        """Stop carrying; every query is answered by then."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _ask(self, exchanges: Sequence[Exchange]) -> None:
        for exchange in exchanges:
            self._connections.ask(exchange)

    def _finished(self, exchange: Exchange) -> None:
        if exchange.status != 200:
            self.failed += 1
        data = array.array("B", tensors_of(exchange.answer) if exchange.status == 200 else b"")
        address, length = data.buffer_info() if data else (0, 0)
        response = mlperf_loadgen.QuerySampleResponse(exchange.tag, address, length)
        mlperf_loadgen.QuerySamplesComplete([response])


def tensors_of(answer: bytes) -> bytes:
    """What an answer's body says of the tensors: all of it, or the binary part alone."""
    head, _, body = answer.partition(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        if line.startswith(_HEADER_LENGTH):
            return body[int(line.removeprefix(_HEADER_LENGTH)) :]
    return body


def main() -> int:
    """Read the job, let LoadGen run the test, print what it does not know."""
    job = json.load(sys.stdin)
    settings = mlperf_loadgen.TestSettings()
    settings.scenario = getattr(mlperf_loadgen.TestScenario, job["scenario"])
    settings.mode = getattr(mlperf_loadgen.TestMode, job["mode"])
    for name, value in job["settings"].items():
        setattr(settings, name, value)
    log = mlperf_loadgen.LogSettings()
    output = mlperf_loadgen.LogOutputSettings()
    output.outdir, output.copy_summary_to_stdout = job["logs"], False
    log.log_output, log.enable_trace = output, False
    sut, count = Sut(job), len(job["bodies"])
    system = mlperf_loadgen.ConstructSUT(sut.issue, sut.flush)
    library = mlperf_loadgen.ConstructQSL(count, count, _nothing, _nothing)
    begin, cpu = time.monotonic(), time.process_time()
    mlperf_loadgen.StartTestWithLogSettings(system, library, settings, log)
    share = (time.process_time() - cpu) / (time.monotonic() - begin)
    mlperf_loadgen.DestroyQSL(library)
    mlperf_loadgen.DestroySUT(system)
    sut.close()
    json.dump({"failed": sut.failed, "cpu": round(share, 4)}, sys.stdout)
    return 0


def _nothing(samples: Sequence[int]) -> None:
    """All samples are in memory at any time."""


if __name__ == "__main__":
    sys.exit(main())
