#!/usr/bin/env bash
# Measures, tests and tunes the fused kernels on this machine's NVIDIA GPU, in under ten minutes.
#
#   benchmarks/on_gpu.sh                          # benchmarks/results/<gpu>-kernels.json, and the GPU's tuned table
#   benchmarks/on_gpu.sh --output D --tables D    # all of it in the folder D instead
#   benchmarks/on_gpu.sh --before ../earlier      # times the kernels of an earlier checkout, too
#   benchmarks/on_gpu.sh --rehearse --output D --tables D   # no GPU: a tiny model in Triton's interpreter
#
# Needs Python 3.11 or 3.12 with torch >= 2.11 and triton >= 3.6 (pytest and hypothesis for the tests, pydantic
# for those of the backend; ncu for counters); no network. Each result is a line of <gpu>-kernels.jsonl as soon
# as it is there: what is cut off by its time limit, or killed, loses nothing that it had measured.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="kernels:.${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" benchmarks/gpu/main.py "$@"
