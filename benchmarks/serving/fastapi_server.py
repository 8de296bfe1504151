"""Plain FastAPI, as most model servers begin: each request is one run of the session in a thread pool.

python fastapi_server.py BUNDLE PORT WORKERS THREADS
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool

import vitdeploy


def build() -> FastAPI:
    """The application of a worker, whose command line is its parent's."""
    bundle, _, _, threads = sys.argv[1:]
    predictor = vitdeploy.load(bundle, backend="onnxruntime", threads=int(threads))
    (source,), (result,) = predictor.session.facts.inputs, predictor.session.facts.outputs
    shape = (1, *(int(size) for size in source.shape[1:]))
    app = FastAPI()

    @app.get("/ready")
    def ready() -> dict[str, bool]:
        return {"ready": True}

    @app.post("/tensor")
    async def tensor(request: Request) -> dict[str, Any]:
        pixels = np.frombuffer(await request.body(), source.dtype).reshape(shape)
        outputs = await run_in_threadpool(predictor.session.run, {source.name: pixels})
        return {result.name: outputs[result.name][0].tolist()}

    @app.post("/image")
    async def image(request: Request) -> dict[str, Any]:
        (best,) = await run_in_threadpool(predictor.predict, await request.body())
        return {"labels": [p.label for p in best], "indices": [p.index for p in best]}

    return app


if __name__ == "__main__":
    uvicorn.run(
        f"{Path(__file__).stem}:build",
        factory=True,
        port=int(sys.argv[2]),
        workers=int(sys.argv[3]),
        log_level="warning",
        access_log=False,
    )
