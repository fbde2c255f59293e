"""The passes: each finds, or plans, or inserts; never two of them. One file each, with a function of the same name.

What runs first, on every graph:

- `read_merges`, `drop_assertions`: take calls out that only say something, of graphs from dynamo and of exported ones.
- `find_appends`, `find_enclosed`, `find_attention`, `find_modality`, `find_embedding`, `find_tensor_parallel`: what is there.
- `find_additions`: what exported graphs have besides.
- `plan_graph`: what kind of graph it is, and so what is to be done.

What runs then stands in lists, one per kind of graph, `tgvkv_compile.pipeline.STEPS`:

- `materialise_masks`, `normalise_attention`, `insert_scoring`, `insert_capping`, `insert_budgeting`,
  `insert_eviction`: a prefill.
- `extract_vision_count`: a copy of a prefill, which counts before it runs.
- `insert_decode`, `insert_continuation`: a step, and a later turn.
- `insert_survivors`, `insert_whole_past`, `insert_rebudgeting`: a later turn with new vision, and a first one with vision.

For exported graphs, `tgvkv_compile.export.trace.rewritten.STEPS`:

- `drop_empty_pasts`, `insert_gathers`, `insert_fixed_scoring`, `insert_fixed_eviction`: a prefill.
- `insert_fixed_decode`: a step.

What passes share is in files of other names: `rewrite` is what they are given, `inserted` what they leave for each other.
Folders: `find` holds the finders, `insert` the inserters for graphs from dynamo, `static` the passes of exported graphs alone.
"""
