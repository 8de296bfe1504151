"""Fused Triton kernels for Vision Transformers, usable without vitdeploy.

The package is reserved and empty: no kernel is in it yet. It will import torch and triton only.
"""
