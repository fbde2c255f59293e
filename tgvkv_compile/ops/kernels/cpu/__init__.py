"""C++ kernels for CPUs, where the plain functions are some fifty operators on a few numbers each.

`decode` and `weigh` call what `decode.cpp` and `weigh.cpp` hold; `compiled` compiles both.
"""
