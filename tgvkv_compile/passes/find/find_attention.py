"""Find the attention sites: which attention reads which KV append, in any of the forms that models write."""

import dataclasses
import math
from typing import Any

from torch.fx import GraphModule, Node

from tgvkv_compile.fx.meta import fake_tensor, fake_value, is_tensor, output_nodes, source_line, submodule
from tgvkv_compile.fx.targets import argument, op_kind, target_name
from tgvkv_compile.plan import AttentionSite, KVAppend, MaskFunction, Miss

_VIEWS = frozenset(
    {"getitem", "expand", "reshape", "unsqueeze", "repeat_interleave", "contiguous", "to", "transpose", "permute"}
)


def find_attention(gm: GraphModule, appends: tuple[KVAppend, ...]) -> tuple[tuple[AttentionSite, ...], tuple[Miss, ...]]:
    """Finds, for each pair of KV appends, the one attention that reads it.

    Forms (nothing is changed; `repeat_kv` stands for the `[:, :, None]`, `expand`, `reshape` chain of grouped heads)::

        %out : [B, H, Q, D] = scaled_dot_product_attention(%q, %keys, %values, attn_mask=None, is_causal=...)
        %out : [B, H, Q, D] = scaled_dot_product_attention(%q, repeat_kv(%keys), repeat_kv(%values), attn_mask=%mask)
        %out : [B, H, Q, D] = matmul(dropout(softmax(matmul(%q, repeat_kv(%keys)^T) * scale + %mask)), repeat_kv(%values))
        %out : [B, H, Q, D] = flex_attention(%q, %keys, %values, %score_mod, (..., %mask_mod), scale, ..., captured)[0]

    Returns:
        The sites in graph order, and a miss for every append that no known attention reads: it names the first
        operation on the keys that is not a view, which is where an unknown form begins.
    """
    by_node = {append.node: append for append in appends}
    sites: list[AttentionSite] = []
    misses: list[Miss] = []
    for node in gm.graph.nodes:
        kind = op_kind(node)
        found = _match_sdpa(node, by_node) if kind == "sdpa" else None
        if kind == "softmax":
            found = _match_eager(node, by_node)
        if kind == "flex":
            found = _match_flex(node, by_node)
        if isinstance(found, AttentionSite):
            sites.append(found)
        elif isinstance(found, Miss):
            misses.append(found)
    misses.extend(_unread(appends, sites, misses))
    return tuple(sites), tuple(misses)


def _miss(node: Node, reason: str) -> Miss:
    return Miss(node.name, target_name(node), reason, source_line(node))


def _origin(node: object) -> Node | None:
    """The node that a chain of views starts from."""
    while isinstance(node, Node) and op_kind(node) in _VIEWS:
        node = node.args[0]
    return node if isinstance(node, Node) else None


def _match_sdpa(node: Node, appends: dict[Node, KVAppend]) -> AttentionSite | Miss | None:
    query, keys, values = (argument(node, position, name) for position, name in enumerate(("query", "key", "value")))
    key, value = appends.get(_origin(keys)), appends.get(_origin(values))  # type: ignore[arg-type]
    if key is None or value is None:
        return None
    if argument(node, 4, "dropout_p", 0.0) != 0.0:
        return _miss(node, "attention dropout is on; call model.eval()")
    scale = argument(node, 6, "scale")
    if isinstance(scale, Node):
        return _miss(
            node, f"its scale %{scale.name} is an input of the graph; set torch._dynamo.config.specialize_float = True"
        )
    return AttentionSite(
        node,
        "sdpa",
        query,
        key,
        value,
        argument(node, 3, "attn_mask"),
        bool(argument(node, 5, "is_causal", False)),
        float(scale) if scale is not None else 1.0 / math.sqrt(fake_tensor(query).shape[-1]),
    )


def _match_flex(node: Node, appends: dict[Node, KVAppend]) -> AttentionSite | Miss | None:
    query, keys, values, score_mod, block_mask = node.args[:5]
    key, value = appends.get(_origin(keys)), appends.get(_origin(values))  # type: ignore[arg-type]
    if key is None or value is None:
        return None
    scores = submodule(score_mod)  # type: ignore[arg-type]
    if next(iter(scores.graph.find_nodes(op="placeholder"))) is not output_nodes(scores)[0]:
        return _miss(
            node, "flex_attention changes the scores (a score_mod: soft cap, bias or a mask of floats); use sdpa or eager"
        )
    mask_mod: Any = block_mask[-1]  # type: ignore[index]
    _, head, *_ = submodule(mask_mod).graph.find_nodes(op="placeholder")
    if head.users:
        return _miss(node, "the mask of flex_attention depends on the head; one mask for all heads is supported")
    outputs = {user.args[1]: user for user in node.users if op_kind(user) == "getitem"}
    if any(_is_used(user) for index, user in outputs.items() if index != 0) or 0 not in outputs:
        return _miss(node, "the log-sum-exp of flex_attention has a use of its own (attention sinks?); only its output may")
    captured = tuple(argument(node, 8, "mask_mod_other_buffers", ()))
    return AttentionSite(
        outputs[0],
        "flex",
        query,  # type: ignore[arg-type]
        key,
        value,
        None,
        False,
        float(argument(node, 5, "scale")),
        MaskFunction(mask_mod, captured),
    )


def _is_used(node: Node) -> bool:
    """Whether an output of the graph depends on `node`."""
    return any(user.op == "output" or _is_used(user) for user in node.users)


@dataclasses.dataclass(frozen=True)
class _Logits:
    query: Node
    keys: Node
    mask: Node | None
    scale: float


def _match_eager(softmax: Node, appends: dict[Node, KVAppend]) -> AttentionSite | Miss | None:
    logits = _match_logits(argument(softmax, 0, "input"))
    if logits is None:
        return None
    if isinstance(logits, Node):
        if not _scores_keys(logits, appends):
            return None
        return _miss(logits, "unknown attention form: expected only a scale and a mask between q @ k^T and softmax")
    key = appends.get(_origin(logits.keys))  # type: ignore[arg-type]
    if key is None:
        return None
    node: Node = softmax
    while True:
        users = [user for user in node.users if op_kind(user) != "assertion"]
        if len(users) != 1:
            return _miss(node, "the attention probabilities have a second use (output_attentions=True?); turn it off")
        (node,) = users
        kind = op_kind(node)
        if kind == "matmul":
            break
        if kind == "dropout" and argument(node, 2, "training", True) and argument(node, 1, "p", 0.5) != 0.0:
            return _miss(node, "attention dropout is on; call model.eval()")
        if kind not in ("to", "dropout", "contiguous"):
            return _miss(node, "unknown attention form: expected softmax -> [to, dropout] -> matmul(weights, values)")
    value = appends.get(_origin(argument(node, 1, "other")))  # type: ignore[arg-type]
    if value is None:
        return _miss(node, "unknown attention form: the probabilities are not multiplied with the values of a KV append")
    return AttentionSite(node, "eager", logits.query, key, value, logits.mask, False, logits.scale)


def _match_logits(node: object) -> _Logits | Node | None:
    """Matches `[matmul(q, k^T) (* or /) scale] [+ mask]`, written in any of the usual orders.

    Returns:
        The parts; the node that does not fit; None where there is no node.
    """
    mask: Node | None = None
    scale = 1.0
    while isinstance(node, Node):
        kind = op_kind(node)
        if kind == "to":
            node = node.args[0]
        elif kind == "add" and mask is None and is_tensor(node.args[1]):
            mask, node = node.args[1], node.args[0]  # type: ignore[assignment]
        elif kind in ("mul", "div") and isinstance(node.args[1], (int, float)):
            scale = scale * node.args[1] if kind == "mul" else scale / node.args[1]
            node = node.args[0]
        elif kind == "matmul":
            query, keys = node.args[0], node.args[1]
            if not isinstance(query, Node) or not isinstance(keys, Node) or op_kind(keys) != "transpose":
                return node
            return _Logits(query, keys, mask, scale)
        else:
            return node
    return None


def _scores_keys(node: object, appends: dict[Node, KVAppend]) -> bool:
    """Whether `node` is computed, first argument by first argument, from a product with the keys or values of an append."""
    while isinstance(node, Node) and node.args:
        if op_kind(node) == "matmul":
            return any(_origin(part) in appends for part in node.args[:2])
        node = node.args[0]
    return False


def _unread(appends: tuple[KVAppend, ...], sites: list[AttentionSite], misses: list[Miss]) -> list[Miss]:
    readers: dict[Node, int] = {}
    for site in sites:
        for append in (site.key, site.value):
            readers[append.node] = readers.get(append.node, 0) + 1
    found = []
    for append in appends:
        count = readers.get(append.node, 0)
        if count > 1:
            found.append(_miss(append.node, f"{count} attentions share the KV of this append; one layer each is supported"))
        elif count == 0 and not misses:
            user = _first_computation(append.node)
            reason = "unknown attention form: this reads the KV append %" + append.node.name
            found.append(_miss(user or append.node, reason))
    return found


def _first_computation(node: Node) -> Node | None:
    """The first user, through views, that computes something."""
    for user in node.users:
        if user.op == "output" or fake_value(user) is None:
            continue
        if op_kind(user) not in _VIEWS:
            return user
        deeper = _first_computation(user)
        if deeper is not None:
            return deeper
    return None
