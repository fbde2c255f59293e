"""What the graphs on a compact cache share: its state comes in, the past goes out."""

from typing import Any

import torch
from torch.fx import GraphModule, Node

from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.errors import InternalError
from tgvkv_compile.fx.dead_code import remove_dead
from tgvkv_compile.fx.insert import insert_call, insert_placeholder
from tgvkv_compile.fx.meta import fake_tensor, output_nodes
from tgvkv_compile.ops.cache.continue_step import advance_lengths
from tgvkv_compile.ops.cache.rows import KVForms
from tgvkv_compile.ops.state import CompactState
from tgvkv_compile.passes.rewrite import ArenaSizes, Rewrite
from tgvkv_compile.plan import GraphPlan


def insert_state(rewrite: Rewrite) -> CompactState:
    """Appends one graph input per tensor of the state.

    Returns:
        The inputs' nodes, in a `CompactState`.
    """
    fields = _fake_state(rewrite)._asdict().items()
    nodes: Any = {name: insert_placeholder(rewrite.gm, f"tgvkv_{name}", fake) for name, fake in fields}
    return CompactState(**nodes)


def _fake_state(rewrite: Rewrite) -> CompactState:
    """Fake tensors of a compact state of the graph's shapes; the arena's size is symbolic."""
    key = fake_tensor(rewrite.plan.sites[0].key.node)
    value = fake_tensor(rewrite.plan.sites[0].value.node)
    batch, heads = key.shape[:2]
    forms = KVForms.of(key, value, rewrite.config.kv_dtype)
    device, env = key.device, rewrite.environment
    slots = env.symbol("tgvkv_slots", rewrite.get(ArenaSizes).slots)
    arenas = [env.tensor((batch, heads, slots, form.size), form.dtype, device) for form in forms]
    per_layer = (batch, rewrite.plan.num_layers)
    return CompactState(
        key_arena=arenas[0],
        value_arena=arenas[1],
        slot_position=env.tensor((batch, slots), torch.int32, device),
        segment_start=env.tensor(per_layer, torch.int64, device),
        segment_len=env.tensor(per_layer, torch.int64, device),
        next_slot=env.tensor(per_layer, torch.int64, device),
        protect_from=env.tensor(per_layer, torch.int64, device),
        keep_rate=env.tensor(per_layer, torch.float32, device),
        lengths=env.tensor((batch,), torch.int64, device),
    )


def held_as(config: EvictionConfig) -> dict[str, Any]:
    """The keyword that tells operations on arenas how these hold keys and values; none where as the model does."""
    return {} if config.kv_dtype is None else {"kv_dtype": config.kv_dtype}


def close(gm: GraphModule, plan: GraphPlan, state: CompactState, mask: Node | None) -> None:
    """Returns None where the joined KV was returned, then the new `lengths`; removes the inputs that held the past.

    Args:
        gm: The graph, its attention already replaced.
        plan: Its plan.
        state: The state's input nodes.
        mask: Tells padding among the new tokens, or None.

    Raises:
        InternalError: Something else still reads the past.
    """
    outputs = output_nodes(gm)
    for site in plan.sites:
        outputs[site.key.output] = outputs[site.value.output] = None
    with gm.graph.inserting_before(gm.graph.output_node()):
        lengths = insert_call(gm, advance_lengths, state.lengths, mask, plan.sites[0].key.new, name="tgvkv_lengths_next")
    gm.graph.output_node().args = ((*outputs, lengths),)
    drop_pasts(gm, past_inputs(plan))


def past_inputs(plan: GraphPlan) -> tuple[Node, ...]:
    """The inputs that hold the past: of every layer the keys, then the values."""
    pasts = [append.past for site in plan.sites for append in (site.key, site.value)]
    return tuple(past for past in pasts if past is not None)


def drop_pasts(gm: GraphModule, pasts: tuple[Node, ...]) -> None:
    """Removes the inputs that held the past.

    Raises:
        InternalError: Something still reads one.
    """
    remove_dead(gm)
    for past in pasts:
        if past.users:
            users = ", ".join(f"%{user.name}" for user in past.users)
            raise InternalError(f"the past %{past.name} is still read by {users}")
        gm.graph.erase_node(past)
