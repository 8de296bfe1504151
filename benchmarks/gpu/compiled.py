"""One contestant of ``torch.compile`` at one batch size, in turns with the fused runner and the CUDA graph.

A process of its own for each: ``torch._dynamo.reset()`` between two would throw away what the first one
compiled, and one that runs out of time takes nothing else with it.
"""

from __future__ import annotations

import time
from pathlib import Path

import record
import torch
from models import Model, parity, table_of
from stopwatch import Call, graphed, in_turns, stand_in_turns, summary


@torch.no_grad()
def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--mode", required=True, help="of torch.compile")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--table", type=Path, help="configurations; the shipped ones when omitted")
    given = parser.parse_args()
    recorder = record.Recorder(given.record, given.rehearse)
    model = Model.of("B/16", given.rehearse)
    images, plain = model.images(given.batch), model.plain()
    runner = model.runner(given.batch, table_of(given.table, model.device))
    backend = {"backend": "aot_eager"} if given.rehearse else {"mode": given.mode}
    compiled = torch.compile(plain, dynamic=False, **backend)
    start = time.monotonic()
    output = compiled(images)
    seconds = round(time.monotonic() - start, 1)
    name = f"compile {given.mode}"
    facts = {name: parity(output, model.expected(images))}
    where = {"model": model.name, "batch": given.batch, "mode": given.mode}
    recorder.add("compilation", **where, seconds=seconds, **facts[name])
    calls: dict[str, Call] = {
        "vitdeploy": lambda: runner(images),
        "sdpa, CUDA graph": graphed(plain, images),
        name: lambda: compiled(images),
    }
    turns = stand_in_turns if given.rehearse else in_turns
    for each, samples in turns(calls, rounds=9, least_ms=30.0).items():
        facts[each] = {**facts.get(each, {}), **summary(samples, "ms")}
    recorder.add("compiled", **where, seconds=seconds, contestants=facts)
    times = (f"{each} {found['median_ms']:.3f}" for each, found in facts.items())
    print(f"{model.name}, batch {given.batch}, {name} in {seconds} s, ms: " + "; ".join(times))


if __name__ == "__main__":
    main()
