#!/usr/bin/env bash
# Builds, proves, verifies and measures every kind of TensorRT engine that this machine's libraries allow.
#
#   benchmarks/on_gpu_tensorrt.sh                    # benchmarks/results/<gpu>-tensorrt.json
#   benchmarks/on_gpu_tensorrt.sh --output D         # in the folder D instead
#   benchmarks/on_gpu_tensorrt.sh --bundle B16       # engines of an exported bundle; needs no PyTorch
#   benchmarks/on_gpu_tensorrt.sh --smoke --output D # no GPU: what TensorRT for RTX builds anywhere
#
# Needs vitdeploy with some of the extras tensorrt, tensorrt-rtx, gpu, kernels, export; no network. What is
# not installed is named in the record. Every step has a time limit, and what was recorded before stays.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="kernels:.${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" benchmarks/gpu/engines.py "$@"
