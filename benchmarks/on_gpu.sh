#!/usr/bin/env bash
# Tests, tunes and measures the fused kernels on this machine's NVIDIA GPU, in under ten minutes.
#
#   benchmarks/on_gpu.sh                        # benchmarks/results/<gpu>.json, and the GPU's tuned table
#   benchmarks/on_gpu.sh --output D --tables D  # both in the folder D instead
#   benchmarks/on_gpu.sh --smoke --output D     # no GPU: a tiny model in Triton's interpreter
#
# Needs Python 3.11 or 3.12 with torch >= 2.11 and triton >= 3.6 (and pytest for the tests); no network.
# Parts that do not finish in their time are cut off, and what they had measured is kept.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="kernels:.${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" benchmarks/gpu/main.py "$@"
