"""The operations on NVIDIA GPUs: in Triton, in CUDA C++, and by FlashAttention-3. `kernels.ops` chooses among them."""
