"""The passes: each finds, or plans, or inserts; never two of them.

Read them in this order: `find_appends`, `find_enclosed`, `find_attention`, `find_modality`, `find_embedding`,
`find_tensor_parallel`, `plan_graph`, `materialise_masks`, `normalise_attention`, `insert_scoring`, `insert_budgeting`,
`insert_eviction`, `insert_decode`, `insert_continuation`, `insert_survivors`, `insert_rebudgeting`. The list that runs them
is `tgvkv_compile.pipeline.STEPS`.
"""
