"""Fused Triton kernels for Vision Transformers, usable without vitdeploy.

Each is a module with a function of its name, which is also a ``torch.library`` operator:
``patch_embed``, ``layernorm_linear``, ``attention``, ``linear_residual``, ``add_layernorm``,
``layernorm_attention``, and in ``absorbed`` those of a last block that reads few tokens. ``runner``
runs whole models with them, ``aot`` and ``package`` compile them for GPUs that are not here, ``tuner``
finds their configurations.

The modules import torch and Triton; importing this package alone imports neither.
"""
