"""What dynamo's compiled frame of a later turn with a new picture calls."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from tgvkv_compile.backend.callers import refuse_assisted_decoding
from tgvkv_compile.backend.options import BackendOptions
from tgvkv_compile.backend.programs import (
    CachedProgram,
    CompiledRewrite,
    address_of,
    check_gradients,
    check_padding,
    put_handles,
)
from tgvkv_compile.fx.environment import size_reader
from tgvkv_compile.fx.meta import fake_tensor
from tgvkv_compile.ops.state import Reselected
from tgvkv_compile.passes.rewrite import Rewrite
from tgvkv_compile.runtime.compact import CacheIdentity, CompactCache, select_candidates

_Pairs = list[tuple[Any, Any]]


def _split(results: Sequence[Any], slots: Sequence[tuple[int, int]]) -> tuple[list[Any], _Pairs, _Pairs, Reselected]:
    """A rewritten turn's results: the graph's outputs, each layer's candidates, which of them are kept, what was decided.

    Raises:
        PaddingError: A sample is padded on the right.
    """
    decided = Reselected(*results[-len(Reselected._fields) :])
    check_padding(decided.valid)
    end = len(results) - len(Reselected._fields) - 2 * len(slots)
    outputs, chosen = list(results[:end]), results[end : -len(Reselected._fields)]
    candidates: list[tuple[Tensor, Tensor]] = [(outputs[key], outputs[value]) for key, value in slots]
    return outputs, candidates, list(zip(chosen[::2], chosen[1::2], strict=True)), decided


class VisionContinuationProgram(CachedProgram):
    """Runs a rewritten turn with new vision: the survivors go in, and what is kept of all candidates is packed anew.

    The graph changes nothing in place, so a turn that fails leaves the cache as it was.
    """

    def __call__(self, *inputs: Any) -> list[Any]:
        """Inputs and outputs as dynamo's graph has them, with handles longer by the turn."""
        check_gradients(inputs)
        compact = self._compact(inputs)
        given = [*self._rest(inputs), *compact.candidates()]
        tokens = self._tokens(given)
        outputs, candidates, chosen, decided = _split(self._compiled.fitting(given)(*given), self._slots)
        compact.reselect(tokens, candidates, chosen, decided)
        compact.padded_turns = compact.padded_turns or not bool(decided.valid.all())
        put_handles(outputs, self._slots, compact)
        return outputs


class LatePrefillProgram:
    """Runs a rewritten turn with vision on a cache of text: all that it holds and the new tokens become a compact cache.

    The graph changes nothing in place, so a turn that fails leaves the cache as it was.
    """

    def __init__(self, rewrite: Callable[[], Rewrite], options: BackendOptions, backend: int, weight: int | None) -> None:
        first = rewrite()
        plan = first.plan
        self._compiled = CompiledRewrite(rewrite, first, options)
        self._options, self._backend, self._weight = options, backend, weight
        self._slots = [(site.key.output, site.value.output) for site in plan.sites]
        past = plan.sites[0].key.past
        assert past is not None
        self._past = size_reader(first.gm, fake_tensor(past).shape[2])
        self._tokens = size_reader(first.gm, fake_tensor(plan.sites[0].query).shape[2])

    def __call__(self, *inputs: Any) -> list[Any]:
        """Inputs and outputs as dynamo's graph has them, handles in the places of keys and values."""
        check_gradients(inputs)
        refuse_assisted_decoding()
        options = self._options
        length = self._past(inputs) + self._tokens(inputs)
        outputs, candidates, chosen, decided = _split(self._compiled.fitting(inputs)(*inputs), self._slots)
        weight = address_of(inputs[self._weight]) if self._weight is not None else 0
        compact = CompactCache(
            select_candidates(candidates, chosen, decided, options.growth_reserve, options.eviction),
            config=options.eviction,
            identity=CacheIdentity(self._backend, weight, len(self._slots)),
            history=decided.history,
            logical_length=length,
            reserve=options.growth_reserve,
            room=options.growth_reserve,
        )
        compact.padded_turns = bool((decided.lengths != length).any())
        put_handles(outputs, self._slots, compact)
        return outputs
