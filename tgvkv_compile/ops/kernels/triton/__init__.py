"""Triton kernels for CUDA devices.

`decode` and `weigh` launch what `decode_kernels` and `weigh_kernels` hold. Only these four import Triton, and the first
call that needs them imports them: importing the package must not need it.
"""
