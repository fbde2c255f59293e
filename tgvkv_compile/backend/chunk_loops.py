"""Linear attention, which walks a prompt in chunks of tokens: one operation of a graph, for prompts of every length.

transformers writes the walk as a Python loop. Dynamo unrolls it, so there would be a graph for every 64 tokens of length, each
larger than the one before. Behind a cut the loop is one operation, which calls the model's own function; that may be a kernel
of another package, too.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library

from tgvkv_compile.runtime.tracing import never_compile_frame, traced_behind_cut

_RULE = "torch_chunk_gated_delta_rule"
"""transformers' name of the function, in every model that has one. Checked on 5.24.0."""
_OWN = "_tgvkv_own"
"""Where the model's own function is kept."""


def keep_chunk_loops() -> None:
    """Puts a function around the loop of every loaded model; once."""
    for name, module in list(sys.modules.items()):
        rule = vars(module).get(_RULE) if name.startswith("transformers.models.") else None
        if rule is not None and not hasattr(rule, _OWN):
            setattr(module, _RULE, _as_operation(rule, name))


def _as_operation(rule: Callable[..., Any], where: str) -> Callable[..., Any]:
    @functools.wraps(rule)
    def chunk_rule(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        chunk_size: int = 64,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **further: Any,
    ) -> Any:
        given = (query, key, value, g, beta)
        # What else there is are options of the whole decoder, which the function ignores, or lengths of packed sequences.
        if (
            torch.compiler.is_dynamo_compiling()
            and traced_behind_cut()
            and output_final_state
            and not torch.is_grad_enabled()
            and not any(isinstance(option, Tensor) for option in further.values())
        ):
            return _gated_delta_rule(*given, initial_state, chunk_size, use_qk_l2norm_in_kernel, where)
        options = {"output_final_state": output_final_state, "use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel}
        return rule(*given, chunk_size=chunk_size, initial_state=initial_state, **options, **further)

    setattr(chunk_rule, _OWN, rule)
    never_compile_frame(chunk_rule)
    return chunk_rule


@library.custom_op("tgvkv::gated_delta_rule", mutates_args=())
def _gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    chunk_size: int,
    use_qk_l2norm_in_kernel: bool,
    where: str,
) -> tuple[Tensor, Tensor]:
    rule = getattr(getattr(sys.modules[where], _RULE), _OWN)
    output, state = rule(
        query,
        key,
        value,
        g=g,
        beta=beta,
        chunk_size=chunk_size,
        initial_state=initial_state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
    )
    return output.contiguous(), state.to(torch.float32).contiguous()


@_gated_delta_rule.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    """Output `[B, N, Hv, Dv]`, as queries; state float32 `[B, Hv, Dk, Dv]`."""
    batch, _length, heads, width = value.shape
    return query.new_empty(value.shape), value.new_empty((batch, heads, key.shape[3], width), dtype=torch.float32)
