"""The maths of TGV-KV as plain torch functions, and the opaque ops made of them (`docs/algorithm.md`).

A folder imports only what stands above it:

- `state`, `token_types`, `merged`: the records that all is about, and the op that marks vision in a graph.
- `attention`: attention with its log-sum-exp, and its masks.
- `kernels`: in Triton and C++.
- `weighing`, `ranks`: weighted sums of attention rows, over all ranks where heads are split.
- `policy`: rankings and ways to share a budget, one file each.
- `eviction`: budgets, selection, capping, and what a decode step evicts.
- `cache`: the compact cache, packed, and the steps on it.
- `static`: the same for graphs of static shapes.
"""
