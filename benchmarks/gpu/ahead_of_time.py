"""The ahead-of-time package on the real driver: written, loaded, run, held against what is compiled in place.

In a rehearsal cubins are written and opened, too; but no driver runs them, so the interpreter does.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import record
import torch
from models import Model, parity, table_of
from stopwatch import Call, in_turns, stand_in_turns, summary

from vitdeploy_kernels.config import shipped_table
from vitdeploy_kernels.driver import CudaDriver
from vitdeploy_kernels.launch import Launch
from vitdeploy_kernels.package import architectures_for, load_package, write_package
from vitdeploy_kernels.plans import launches
from vitdeploy_kernels.runner import VitRunner
from vitdeploy_kernels.support import Unsupported


class NoDriver(CudaDriver):
    """A rehearsal's: no tensor is on a GPU, so nothing is launched through it."""

    def __init__(self) -> None:
        pass

    def ordinal(self, device: torch.device) -> int | None:
        return None


@torch.no_grad()
def main() -> None:
    given = record.parser(__doc__).parse_args()
    recorder = record.Recorder(given.record, given.rehearse)
    model = Model.of("B/16", given.rehearse)
    batch = 1 if given.rehearse else 8
    capability = (9, 0) if given.rehearse else torch.cuda.get_device_capability(model.device)
    (arch, *_) = architectures_for(capability)
    table = table_of(None, model.device)
    # The interpreter's own table has tiles that no GPU holds.
    of_arch = shipped_table(capability) if given.rehearse else table
    needed = [launch for _, launch in launches(model.shape, torch.float16, batch, of_arch)]
    facts = {"model": model.name, "batch": batch, "arch": arch}
    elsewhere: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        kernels, start = Path(folder) / "kernels", time.monotonic()
        asked = needed[:1] if given.rehearse else needed
        written = write_package(kernels, {arch: asked}, processes=os.cpu_count() or 1)
        compiled, start = time.monotonic() - start, time.monotonic()
        package = load_package(kernels, capability, driver=NoDriver() if given.rehearse else None)
        assert not isinstance(package, Unsupported), package.reason
        facts |= {"cubins": len(written) - 1, "compile_seconds": round(compiled, 2)}

        def execute(launch: Launch) -> None:
            if not package.run(launch):
                elsewhere.add(launch.name)
                launch.run()

        runner = VitRunner(model.shape, model.weights, batches=[batch], table=table, execute=execute)
        facts["load_seconds"] = round(time.monotonic() - start, 2)
    in_place = model.runner(batch, table)
    images = model.images(batch)
    expected = model.expected(images)
    calls: dict[str, Call] = {
        "ahead of time": lambda: runner(images),
        "in place": lambda: in_place(images),
    }
    turns = stand_in_turns if given.rehearse else in_turns
    contestants = {
        name: {**parity(calls[name](), expected), **summary(samples, "ms")}  # type: ignore[arg-type]
        for name, samples in turns(calls, rounds=9, least_ms=20.0).items()
    }
    facts |= {"compiled_in_place_after_all": sorted(elsewhere), "contestants": contestants}
    recorder.add("ahead_of_time", **facts)
    print(", ".join(f"{name} {value}" for name, value in facts.items() if name != "contestants"))
    if elsewhere and not given.rehearse:
        raise SystemExit(f"no cubin was taken for {', '.join(sorted(elsewhere))}")


if __name__ == "__main__":
    main()
