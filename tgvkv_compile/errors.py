"""Every error this package raises on purpose.

User errors derive from [`TgvkvError`][] and name the thing, the value and the remedy. An error that is not one of these
is a bug of ours. Subclasses also derive from the built-in exception that a caller would expect (`ValueError`, ...).
"""


class TgvkvError(Exception):
    """Base class of all errors raised on purpose by this package."""


class ConfigError(TgvkvError, ValueError):
    """An option of the backend has a value that cannot be used."""


class UnknownOptionError(ConfigError, TypeError):
    """An option that the backend does not have."""


class UnsupportedGraphError(TgvkvError, RuntimeError):
    """A traced graph holds a decoder that the passes cannot rewrite; the message lists each miss and its source line."""


class NoAttentionError(UnsupportedGraphError):
    """A graph merges image features but no attention was found in it."""


class SplitDecoderError(UnsupportedGraphError):
    """Dynamo broke the decoder into several graphs, so no graph sees all layers."""


class GradientsRequiredError(TgvkvError, RuntimeError):
    """Eviction is not differentiable, and autograd was asked for."""


class PaddingError(TgvkvError, ValueError):
    """The batch is padded in a way that cannot be compressed (right padding)."""


class CacheError(TgvkvError, RuntimeError):
    """A compressed cache was used in a way that cannot be honoured."""


class AssistedDecodingError(CacheError):
    """`generate` was asked to verify candidate tokens of an assistant on a compressed cache."""


class StaleCacheError(CacheError):
    """A handle's length is not its compact cache's: an old cache was used after a newer step."""


class ForeignCacheError(CacheError):
    """A compressed cache was handed to another model, another backend, or an operation that does not know it."""


class InternalError(TgvkvError, AssertionError):
    """A pass left a graph that breaks its own contract. A bug of ours; the message names the pass."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
