"""Triton's kernels run on the GPU where there is one and through Triton's interpreter elsewhere."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first import of triton
