"""What dynamo's compiled frame of a later turn with a new picture calls."""

from typing import Any

from tgvkv_compile.backend.programs import CachedProgram, check_gradients, check_padding, put_handles
from tgvkv_compile.ops.state import Reselected


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
        results = self._compiled.fitting(given)(*given)
        layers = len(self._slots)
        decided = Reselected(*results[-len(Reselected._fields) :])
        chosen = results[-len(Reselected._fields) - 2 * layers : -len(Reselected._fields)]
        outputs = results[: -len(Reselected._fields) - 2 * layers]
        check_padding(decided.valid)
        compact.reselect(
            tokens,
            [(outputs[key], outputs[value]) for key, value in self._slots],
            list(zip(chosen[::2], chosen[1::2], strict=True)),
            decided,
        )
        compact.padded_turns = compact.padded_turns or not bool(decided.valid.all())
        put_handles(outputs, self._slots, compact)
        return outputs
