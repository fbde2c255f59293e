"""Plan: what to do with a graph, from what the finders found in it."""

import torch
from torch.fx import Node

from tgvkv_compile.fx.meta import fake_tensor, same_size, source_line
from tgvkv_compile.fx.targets import target_name
from tgvkv_compile.plan import AttentionSite, GraphPlan, KVAppend, Miss, ModalityMask, TensorParallel

UNSEEN = "where vision stands in the prompt cannot be seen"
"""The `reason` of a plan for embeddings that nothing is known of."""
_EMBEDDINGS = "the decoder is handed embeddings, not tokens: vision may have been merged outside of this graph"


def plan_graph(
    appends: tuple[KVAppend, ...],
    sites: tuple[AttentionSite, ...],
    modality: ModalityMask | None,
    misses: tuple[Miss, ...],
    *,
    enclosed: tuple[Miss, ...] = (),
    compressed: frozenset[str],
    embedding: Node | None,
    tensor_parallel: TensorParallel | None = None,
) -> GraphPlan:
    """Decides between prefill, early or late, decode, the two continuations and dense.

    ================  ==========================  =================  ===================
    past of the KV    vision merged in the graph  queries            kind
    ================  ==========================  =================  ===================
    none              yes                         any                prefill
    none              no                          any                dense (text-only prompt); a miss where the graph
                                                                     is handed embeddings, not tokens
    none, of several  either                      any                miss (cross-attention, encoder-decoder)
    lengths
    any               either                      any                miss where an append stands in the body of a
                                                                     higher-order operator
    handles           no                          1                  decode
    handles           no                          more               continuation
    handles           yes                         any                vision_continuation
    no KV append      handles are inputs all the same                miss (it would compute on handles)
    tensors           yes                         any                late_prefill
    tensors           no                          any                dense (the cache is not compressed)
    ================  ==========================  =================  ===================

    Args:
        appends: From `find_appends`.
        sites: From `find_attention`.
        modality: From `find_modality`.
        misses: Of all other finders.
        enclosed: From `find_enclosed`.
        compressed: Names of the placeholders that hold handles of a compact cache.
        embedding: From `find_embedding`.
        tensor_parallel: From `find_tensor_parallel`.

    Returns:
        The plan. Where the graph is a decoder that must be rewritten and cannot be, `kind` is `"dense"` and `misses`
        says why; a dense graph without misses is not ours to change.
    """
    if enclosed:
        return GraphPlan("dense", "the decoder cannot be rewritten", misses=enclosed)
    crossing = _crossing(appends)
    if crossing:
        return GraphPlan("dense", "vision is attended to across, not among the decoder's own tokens", misses=crossing)
    pasts = {append.past.name for append in appends if append.past is not None}
    handles = pasts & compressed
    unseen = not compressed and modality is None and embedding is None
    if unseen and appends and not pasts:
        return GraphPlan("dense", UNSEEN, misses=(_at(appends[0], _EMBEDDINGS),))
    if not compressed and modality is None:
        what = "no KV append in the graph" if not appends else "text-only prompt or uncompressed cache, nothing to evict"
        return GraphPlan("dense", what, sites)
    if modality is not None and not appends and not misses and not compressed:
        why = "vision is merged, but the graph keeps no KV (use_cache=False, or another graph holds the decoder)"
        return GraphPlan("dense", why, modality=modality)
    problems = [*misses, *_disagreements(sites)]
    if not problems and not sites and appends:
        problems.append(_at(appends[0], "no attention reads this KV append"))
    problems += [_unexpected(name) for name in sorted(compressed - pasts)]
    if modality is not None and pasts and any(append.past is None for append in appends):
        problems.append(_at(appends[0], "some layers of the cache are in use and some are empty"))
    if pasts:
        problems += _orderless(sites)
    if handles and pasts != handles:
        problems.append(_at(appends[0], "some layers of the cache are compressed and some are not"))
    if problems:
        return GraphPlan("dense", "the decoder cannot be rewritten", sites, modality, tuple(problems))
    split = f"; heads are split over process group {tensor_parallel.group!r}" if tensor_parallel is not None else ""
    if modality is not None and pasts and not handles:
        reason = "vision tokens merged, uncompressed cache in use" + split
        return GraphPlan("late_prefill", reason, sites, modality, tensor_parallel=tensor_parallel)
    if modality is not None and pasts:
        reason = "vision tokens merged, compressed cache" + split
        return GraphPlan("vision_continuation", reason, sites, modality, tensor_parallel=tensor_parallel)
    if modality is not None:
        reason = "vision tokens merged, empty cache" + split
        return GraphPlan("prefill", reason, sites, modality, tensor_parallel=tensor_parallel)
    if fake_tensor(sites[0].query).shape[2] == 1:
        return GraphPlan("decode", "one query on a compressed cache" + split, sites, tensor_parallel=tensor_parallel)
    return GraphPlan("continuation", "several queries on a compressed cache" + split, sites, tensor_parallel=tensor_parallel)


def _at(append: KVAppend, reason: str) -> Miss:
    return Miss(append.node.name, target_name(append.node), reason, source_line(append.node))


def _unexpected(placeholder: str) -> Miss:
    reason = (
        "the KV cache is compressed, and this graph reads it other than by a KV append; it holds no data to read. If dynamo "
        "took the decoder apart, TORCH_LOGS=graph_breaks tells where"
    )
    return Miss(placeholder, "placeholder", reason, "(an input of the graph)")


def _orderless(sites: tuple[AttentionSite, ...]) -> list[Miss]:
    """Later turns of several tokens whose order attention does not keep: every one would see those after it."""
    reason = "several tokens attend to a cache without a mask and not causally; what is read later must not be seen earlier"
    return [
        Miss(site.node.name, target_name(site.node), reason, source_line(site.node))
        for site in sites
        if site.mask is None and site.mask_function is None and not site.is_causal and fake_tensor(site.query).shape[2] != 1
    ]


def _crossing(appends: tuple[KVAppend, ...]) -> tuple[Miss, ...]:
    """The appends of a first call that hold other tokens than the first append does."""
    first_call = [append for append in appends if append.past is None]
    if not first_call:
        return ()
    prompt = fake_tensor(first_call[0].new).shape[2]
    return tuple(
        _at(
            append,
            f"its first entries are {length} tokens where the first layer's are {prompt}: cross-attention (an encoder-decoder, "
            "or a model such as mllama that keeps vision apart from the prompt). Text-guided eviction needs vision tokens "
            "among the decoder's own; on_unsupported='passthrough' runs the model uncompressed",
        )
        for append in first_call
        if not same_size(length := fake_tensor(append.new).shape[2], prompt)
    )


def _disagreements(sites: tuple[AttentionSite, ...]) -> list[Miss]:
    """One arena holds all keys and one all values, so layers must agree on heads, head dim, dtypes and device.

    Keys and values may differ in dtype: under autocast the rotary embedding leaves float32 keys beside bfloat16 values.
    """

    def signature(tensor: torch.Tensor) -> tuple[object, ...]:
        return tensor.shape[1], tensor.shape[3], tensor.dtype

    found = []
    for site in sites:
        for append, first in ((site.key, sites[0].key), (site.value, sites[0].value)):
            here, there = fake_tensor(append.node), fake_tensor(first.node)
            if here.device != there.device:
                found.append(_at(append, _devices(here.device, there.device)))
            elif signature(here) != signature(there):
                found.append(_at(append, f"(Hkv, D, dtype) differ between layers: {signature(there)} at the first layer"))
            elif here.shape[3] != (key_dim := fake_tensor(site.key.node).shape[3]):
                reason = f"its head dim is {here.shape[3]}, the keys' is {key_dim}"
                found.append(_at(append, f"{reason}: keys and values of different head dims are not supported"))
    return found


def _devices(here: torch.device, first: torch.device) -> str:
    return (
        f"this layer's KV cache is on {here}, the first layer's on {first}: layers on several devices are not supported, "
        f"because one arena holds the KV of all layers. Put all decoder layers on one device (device_map='{first}'), or "
        "split every layer over the devices (tp_plan='auto' under torchrun)"
    )
