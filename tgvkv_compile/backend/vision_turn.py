"""What dynamo's compiled frame of a later turn with a new picture calls."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from tgvkv_compile.backend.callers import refuse_assisted_decoding
from tgvkv_compile.backend.memory import check_question, forms_of
from tgvkv_compile.backend.programs import (
    CachedProgram,
    CompiledRewrite,
    Source,
    check_gradients,
    check_padding,
    put_handles,
)
from tgvkv_compile.fx.environment import size_reader
from tgvkv_compile.fx.meta import fake_tensor
from tgvkv_compile.ops.state import Choice, Reselected, split_off
from tgvkv_compile.runtime.compact import CompactCache, select_candidates


class _Turn(NamedTuple):
    """A rewritten turn's results.

    Attributes:
        outputs: Of the graph as dynamo has it, candidates in the places of keys and values.
        candidates: Keys and values of each layer's candidates.
        choices: Which of them are kept, per layer.
        decided: The rest.
    """

    outputs: list[Any]
    candidates: list[tuple[Tensor, Tensor]]
    choices: list[Choice]
    decided: Reselected


def _read(results: Sequence[Any], slots: Sequence[tuple[int, int]], source: Source) -> _Turn:
    """Names the results of a rewritten later turn; `slots` are the outputs for keys and values of each layer.

    Raises:
        ConfigError: The question does not fit into the memory that was asked for.
        PaddingError: A sample is padded on the right.
    """
    outputs, decided = split_off(results, Reselected)
    check_padding(decided.valid)
    check_question(source.options, source.memory, decided.history, decided.lengths)
    choices: list[Choice] = []
    for _ in slots:
        outputs, choice = split_off(outputs, Choice)
        choices.insert(0, choice)
    return _Turn(outputs, [(outputs[key], outputs[value]) for key, value in slots], choices, decided)


class VisionContinuationProgram(CachedProgram):
    """Runs a rewritten later turn with new vision: the survivors go in, and what is kept of all candidates is packed anew.

    The graph changes nothing in place, so a turn that fails leaves the cache as it was.
    """

    def __call__(self, *inputs: Any) -> list[Any]:
        """Inputs and outputs as dynamo's graph has them, with handles longer by the turn."""
        check_gradients(inputs)
        compact = self._compact(inputs)
        given = [*self._rest(inputs), *compact.candidates()]
        tokens = self._tokens(given)
        turn = _read(self._compiled.fitting(given)(*given), self._slots, self._source)
        compact.reselect(tokens, turn.candidates, turn.choices, turn.decided)
        compact.padded_turns = compact.padded_turns or not bool(turn.decided.valid.all())
        put_handles(turn.outputs, self._slots, compact)
        return turn.outputs


class LatePrefillProgram:
    """Runs a rewritten later turn with vision on a cache of text: all that it holds and the new tokens become a compact cache.

    The graph changes nothing in place, so a turn that fails leaves the cache as it was.
    """

    def __init__(self, source: Source) -> None:
        first = source.rewrite()
        plan = first.plan
        self._compiled = CompiledRewrite(source, first)
        self._source = source
        self._slots = [(site.key.output, site.value.output) for site in plan.sites]
        self._forms = forms_of(plan, source.options)
        past = plan.sites[0].key.past
        assert past is not None
        self._past = size_reader(first.gm, fake_tensor(past).shape[2])
        self._tokens = size_reader(first.gm, fake_tensor(plan.sites[0].query).shape[2])

    def __call__(self, *inputs: Any) -> list[Any]:
        """Inputs and outputs as dynamo's graph has them, handles in the places of keys and values."""
        check_gradients(inputs)
        refuse_assisted_decoding()
        options = self._source.options
        length = self._past(inputs) + self._tokens(inputs)
        turn = _read(self._compiled.fitting(inputs)(*inputs), self._slots, self._source)
        compact = CompactCache(
            select_candidates(turn.candidates, turn.choices, turn.decided, options.growth_reserve, options.eviction),
            forms=self._forms,
            config=options.eviction,
            identity=self._source.identity(inputs, len(self._slots)),
            history=turn.decided.history,
            logical_length=length,
            reserve=options.growth_reserve,
            room=options.growth_reserve,
        )
        compact.padded_turns = bool((turn.decided.lengths != length).any())
        put_handles(turn.outputs, self._slots, compact)
        return turn.outputs
