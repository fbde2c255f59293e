"""Where compiled code begins: a prompt runs uncompiled up to its decoder, a decode step is compiled whole.

What stands before the decoder differs from picture to picture: how many there are, how long each one's features are, sizes
that a check formats into its message. Dynamo guards all of it, so every new picture would compile the decoder again. The
decoder itself is handed embeddings and a mask of what is vision among them, both of dynamic length from the first call on:
one graph serves every prompt.

Model classes get a `forward` around their own that dynamo traces: for backends with a `cut` it leaves the graph there and goes
on in `Cut.answer`. For every other caller, compiled or not, it calls the class's own `forward`.
"""

import contextlib
import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tgvkv_compile.backend.apart import compile_apart
from tgvkv_compile.backend.callers import warn_of_chunks
from tgvkv_compile.backend.checkpointing import without_cache
from tgvkv_compile.backend.dynamic_sizes import mark_decoder_inputs, mark_state, mark_step_inputs
from tgvkv_compile.backend.merges import MergeWatch
from tgvkv_compile.backend.options import misplaced
from tgvkv_compile.backend.origin import mark_behind_cut
from tgvkv_compile.backend.sliding_windows import lay_out, settle
from tgvkv_compile.backend.wrappers import whole_graphs
from tgvkv_compile.errors import CacheError, ConfigError, UnsupportedGraphError
from tgvkv_compile.ops.merged import merged
from tgvkv_compile.private import graph_break
from tgvkv_compile.runtime.inspect import CACHE_NAMES, compact_of
from tgvkv_compile.runtime.tracing import (
    active_backend,
    active_is_one_graph,
    must_be_one_graph,
    never_compile_frame,
    traced_backend,
)

METHODS = ("get_image_features", "get_video_features", "get_audio_features", "get_rope_index")
"""transformers' names: what encodes pictures, videos and sound, and what finds the positions of their tokens."""
_ENCODED = ("mm_encoder_outputs", "image_hidden_states")
"""Arguments that hold what vision encoders made, besides all that begin with `pixel`."""


class Cut:
    """Answers the calls of the models that one backend compiles.

    Args:
        backend: Called with the graphs, as dynamo calls a backend.
        strict: Whether a model that never comes to its decoder is an error.
        prepare: Called once, with the first model, before anything of it is compiled.
    """

    def __init__(
        self,
        backend: Callable[..., Any],
        *,
        strict: bool,
        prepare: Callable[[torch.nn.Module], None] | None = None,
    ) -> None:
        self.strict = strict
        self._prepare = prepare
        self._lock = threading.Lock()
        self._backend = weakref.proxy(backend)
        self._compiled: tuple[Callable[..., Any], Callable[..., Any]] | None = None

    def answer(self, forward: Callable[..., Any], module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """What `module(*args, **kwargs)` gives, the decoder compiled.

        Args:
            forward: The class's own `forward`.
            module: The model.
            args: Of the call.
            kwargs: Of the call.
        """
        prepare, self._prepare = self._prepare, None
        if prepare is not None:
            prepare(module)
        given = _named(forward, args, kwargs)
        encoded = _brings_vision(given)
        decoder = _decoder_of(module)
        if decoder is not None and "attention_mask" in _names(forward):
            given = _usual_mask(module, given)
            args, kwargs = (), given
        if decoder is None or (_length(given) == 1 and not encoded) or (decoder is module and not encoded):
            return self._step(module, given if encoded else _without_vision(module, decoder, given))
        call = _Prompt(self, decoder, merges_itself=decoder is module or _is_cut(type(decoder)))
        if decoder is module:
            return call.run(args, kwargs)
        with call:
            output = forward(module, *args, **kwargs)
        call.check_reached(module)
        _note_padding(_cache_of(output), given)
        return output

    def _step(self, module: torch.nn.Module, kwargs: dict[str, Any]) -> Any:
        _refuse_offloading(_cache_of(kwargs))
        lay_out(_cache_of(kwargs), masked=kwargs.get("attention_mask") is not None)
        mark_state(module)
        return self._run(0, module, mark_step_inputs(without_cache(_decoder_of(module) or module, kwargs)))

    def decode(self, decoder: torch.nn.Module, watched: bool, vision: Tensor | None, kwargs: dict[str, Any]) -> Any:
        """Runs the decoder, compiled.

        Args:
            decoder: The decoder.
            watched: Whether it is known what of its embeddings is vision.
            vision: bool `[B, N, 1]`; None: nothing.
            kwargs: Of its call.
        """
        _refuse_offloading(_cache_of(kwargs))
        lay_out(_cache_of(kwargs), masked=kwargs.get("attention_mask") is not None)
        vision, kwargs = mark_decoder_inputs(vision, without_cache(decoder, kwargs))
        return self._run(1, decoder, watched, vision, kwargs)

    def _run(self, function: int, *args: Any) -> Any:
        with whole_graphs():
            output = self._functions()[function](*args)
        settle(_cache_of(output))
        return output

    def _functions(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        with self._lock:
            if self._compiled is None:
                inside = _Inside(self._backend)
                self._compiled = (compile_apart(_call_whole, inside), compile_apart(_call_decoder, inside))
            return self._compiled


def _refuse_offloading(cache: Any) -> None:
    if getattr(cache, "offloading", False):
        raise CacheError(
            "the KV cache offloads its layers to the CPU (cache_implementation='offloaded' or 'offloaded_static'), which "
            "cannot be compiled, and a compressed cache need not: leave cache_implementation out, or run without compile()"
        )


class _Inside:
    """The backend again, for code behind the cut: traced without one.

    Attributes:
        behind_cut: What it compiles is called by the cut (see `runtime.tracing`).
    """

    takes_handles = True
    behind_cut = True

    def __init__(self, backend: Callable[..., Any]) -> None:
        self._backend = backend

    def __call__(self, gm: Any, example_inputs: Any) -> Any:
        mark_behind_cut(gm)
        return self._backend(gm, example_inputs)


def _call_whole(module: torch.nn.Module, kwargs: dict[str, Any]) -> Any:
    return module.forward(**kwargs)  # hooks of the model have run: its caller is `__call__`


def _call_decoder(decoder: torch.nn.Module, watched: bool, vision: Tensor | None, kwargs: dict[str, Any]) -> Any:
    if watched:
        kwargs = {**kwargs, "inputs_embeds": merged(kwargs["inputs_embeds"], vision)}
    return decoder(**kwargs)


class _Current(threading.local):
    """The prompt that this thread is on its way to the decoder with."""

    prompt: "_Prompt | None" = None


_CURRENT = _Current()


class _Merged(Exception):
    """Leaves a decoder that merges vision itself as soon as it has."""

    def __init__(self, embeds: Tensor) -> None:
        super().__init__()
        self.embeds = embeds


class _Prompt:
    """One call on its way to the decoder: watches what is merged until it gets there.

    Args:
        cut: Runs the decoder.
        decoder: Where it goes.
        merges_itself: Whether vision is merged inside of the decoder's own `forward`.
    """

    def __init__(self, cut: Cut, decoder: torch.nn.Module, *, merges_itself: bool) -> None:
        self.decoder = decoder
        self._cut, self._merges_itself = cut, merges_itself
        self._watch = MergeWatch()
        self._watching = contextlib.ExitStack()
        self._reached = False

    def __enter__(self) -> None:
        _enter_by(self.decoder)
        _look_up_by(_embeddings_of(self.decoder))
        self._outer, _CURRENT.prompt = _CURRENT.prompt, self
        self._watching.enter_context(self._watch)

    def __exit__(self, *error: object) -> None:
        self._watching.close()
        _CURRENT.prompt = self._outer

    def check_reached(self, module: torch.nn.Module) -> None:
        """Raises [`UnsupportedGraphError`][] where the model answered without its decoder: all of it ran uncompressed."""
        if not self._reached and self._cut.strict:
            raise UnsupportedGraphError(
                f"{type(module).__name__}.forward never called {type(self.decoder).__name__}, which get_decoder() says is its "
                "decoder, so nothing was compressed; run it uncompressed with on_unsupported='passthrough'"
            )

    def looked_up(self, tokens: object, embeds: object) -> None:
        """Takes note of what the decoder's embedding made of tokens."""
        self._watch.look_up(tokens, embeds)

    def run(self, args: Any, kwargs: dict[str, Any]) -> Any:
        """The decoder's call, in place of the uncompiled one."""
        self._reached = True
        self._watching.close()  # what is compiled must not see it, and what follows the decoder merges nothing
        _CURRENT.prompt = None
        given = _named(type(self.decoder).forward, args, kwargs)
        if self._merges_itself and _brings_vision(given):
            given = self._merge(given)
        embeds: Any = given.get("inputs_embeds")
        watched = self._watch.knows(embeds)
        vision = self._watch.vision(embeds) if watched else None
        if vision is not None:
            warn_of_chunks(embeds.shape[1])
        return self._cut.decode(self.decoder, watched, vision, given)

    def _merge(self, given: dict[str, Any]) -> dict[str, Any]:
        watch = _MergeOnly()
        try:
            with watch:
                self.decoder._call_impl(**given)  # type: ignore[no-untyped-call]
        except _Merged as found:
            self._watch = watch
            plain = {name: value for name, value in given.items() if not _is_vision(name) and name != "input_ids"}
            return {**plain, "inputs_embeds": found.embeds}
        raise ConfigError(
            f"{type(self.decoder).__name__} was given vision and merged none of it among its tokens' embeddings; what of the "
            "prompt is vision cannot be seen. Run it uncompressed with on_unsupported='passthrough', or without compile()"
        )


class _MergeOnly(MergeWatch):
    """Leaves the model at the first merge."""

    def _put(self, embeds: Tensor, vision: Tensor | None) -> None:
        super()._put(embeds, vision)
        if vision is not None:
            raise _Merged(embeds)


class _Entry:
    """What a decoder's call is, for as long as it lives: its own, or that of the prompt that is on its way there."""

    def __init__(self, decoder: torch.nn.Module) -> None:
        self._decoder = weakref.ref(decoder)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        decoder = self._decoder()
        assert decoder is not None
        prompt = _CURRENT.prompt
        if prompt is None or prompt.decoder is not decoder or torch.compiler.is_dynamo_compiling():
            return decoder._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        return prompt.run(args, kwargs)


def _enter_by(decoder: torch.nn.Module) -> None:
    """Makes `decoder(...)` come to the prompt, by the place where `Module.compile` puts what it makes."""
    entry = decoder._compiled_call_impl
    if isinstance(entry, _Entry):
        return
    if entry is not None:
        raise ConfigError(
            f"{type(decoder).__name__} was compiled by itself, and so was the model that it is the decoder of; compile the "
            "whole model only: model.compile(backend=tgvkv_backend(...))"
        )
    decoder._compiled_call_impl = _Entry(decoder)


class _Lookup:
    """What an embedding's call is: its own, of which the prompt on its way to a decoder takes note.

    The watch sees functions; behind an embedding that is sharded over ranks come others that it does not see.
    """

    def __init__(self, embedding: torch.nn.Module) -> None:
        self._embedding = weakref.ref(embedding)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        embedding = self._embedding()
        assert embedding is not None
        embeds = embedding._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        prompt = _CURRENT.prompt
        if prompt is not None and not torch.compiler.is_dynamo_compiling():
            prompt.looked_up(args[0] if args else kwargs.get("input"), embeds)
        return embeds


def _embeddings_of(decoder: torch.nn.Module) -> torch.nn.Module | None:
    find: Callable[[], Any] | None = getattr(decoder, "get_input_embeddings", None)
    try:
        found = find() if find is not None else None
    except NotImplementedError:  # transformers' word for a model that has none
        return None
    return found if isinstance(found, torch.nn.Module) else None


def _look_up_by(embedding: torch.nn.Module | None) -> None:
    if embedding is not None and embedding._compiled_call_impl is None:
        embedding._compiled_call_impl = _Lookup(embedding)


def cut_models() -> None:
    """Puts the cut before the decoder of every loaded model class that merges vision, or has a head on one that does; once."""
    models = [model for model in _subclasses(torch.nn.Module) if hasattr(model, "get_decoder")]
    merging = {model for model in models if any(hasattr(model, name) for name in METHODS)}
    files = {model.__module__ for model in merging}
    for model in models:
        forward = vars(model).get("forward")
        ours = model in merging or (model.__module__ in files and hasattr(model, "generate"))
        if ours and inspect.isfunction(forward) and not _is_cut(model):
            model.forward = _with_cut(forward)


def _subclasses(parent: type[Any]) -> Iterator[type[Any]]:
    child: type[Any]
    for child in parent.__subclasses__():
        yield child
        yield from _subclasses(child)


def _is_cut(module: type[Any]) -> bool:
    return hasattr(vars(module).get("forward"), "_tgvkv_cut")


_REASON = "tgvkv: what stands before the decoder differs from picture to picture"


def _with_cut(forward: Callable[..., Any]) -> Callable[..., Any]:
    @torch.compiler.disable(reason=_REASON)  # type: ignore[no-untyped-call, untyped-decorator]
    def apart(cut: Cut, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return cut.answer(forward, module, args, kwargs)

    @functools.wraps(forward)
    def before_decoder(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            if _cuts_here():
                graph_break(msg="tgvkv: a prompt runs uncompiled up to its decoder")
            return forward(self, *args, **kwargs)
        cut = _active_cut()
        return forward(self, *args, **kwargs) if cut is None else apart(cut, self, args, kwargs)

    never_compile_frame(before_decoder)
    before_decoder._tgvkv_cut = True  # type: ignore[attr-defined]
    return before_decoder


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _cuts_here() -> bool:
    """Whether the traced frame's backend asks for a cut; then the trace ends here, and eager code calls the same function."""
    return _cut_of(traced_backend()) is not None and not must_be_one_graph()


def _active_cut() -> Cut | None:
    """The cut of the backend that frames called now are compiled for.

    Raises:
        ConfigError: They are to be one graph, or `torch.compile` was given arguments that belong to the backend.
    """
    found = active_backend()
    cut = _cut_of(found)
    if cut is not None and active_is_one_graph():
        raise ConfigError(
            "fullgraph=True cannot be honoured: a prompt runs uncompiled up to its decoder. Leave it out; the decoder is one "
            "graph all the same, and a decoder that dynamo splits raises SplitDecoderError"
        )
    if cut is not None and found is not None and found[1] and not hasattr(found[0], "resolve"):
        raise misplaced(found[1])
    return cut


never_compile_frame(_active_cut)


def _cut_of(found: tuple[Any, dict[str, Any]] | None) -> Cut | None:
    if found is None:
        return None
    backend, given = found
    resolve = getattr(backend, "resolve", None)
    cut: Cut | None = getattr(backend if resolve is None else resolve(**given), "cut", None)
    return cut


never_compile_frame(_cut_of)


@functools.lru_cache(maxsize=256)
def _names(function: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the parameters that can be given by position."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(name for name, parameter in inspect.signature(function).parameters.items() if parameter.kind in kinds)


def _named(forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of a module with this `forward`, by name."""
    return {**dict(zip(_names(forward)[1:], args, strict=False)), **kwargs}


def _decoder_of(module: Any) -> torch.nn.Module | None:
    """What `forward` hands embeddings to; None where an encoder reads the prompt."""
    decoder = None if getattr(module.config, "is_encoder_decoder", False) else module.get_decoder()
    return decoder if isinstance(decoder, torch.nn.Module) else None


def _length(given: Mapping[str, Any]) -> int | None:
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(given.get(name), Tensor) and given[name].ndim > 1:
            return int(given[name].shape[1])
    return None


def _without_vision(module: torch.nn.Module, decoder: torch.nn.Module | None, given: dict[str, Any]) -> dict[str, Any]:
    """Without what is for encoders only: `generate` goes on giving the sizes of pictures to steps that have none."""
    if decoder is None:
        return given
    classes = frozenset({type(module), type(getattr(module, "base_model", module))})
    dropped = _of_encoders(classes).difference(_names(type(decoder).forward))
    return {name: value for name, value in given.items() if value is not None and name not in dropped}


@functools.lru_cache(maxsize=256)
def _of_encoders(classes: frozenset[type[Any]]) -> frozenset[str]:
    """What the `METHODS` of model classes take."""
    methods = [getattr(model, name) for model in classes for name in METHODS if hasattr(model, name)]
    return frozenset(name for method in methods for name in _names(method))


def _usual_mask(module: torch.nn.Module, given: dict[str, Any]) -> dict[str, Any]:
    """With the mask that `generate` would give, in prompts and steps: none for one sample without padding.

    For a batch it is the other way round: `generate` leaves out a mask that masks nothing, and a batch that happens to need no
    padding is to be the same graph as any other.
    """
    tokens, mask = given.get("input_ids"), given.get("attention_mask")
    if not isinstance(tokens, Tensor) or tokens.ndim != 2:
        return given
    cache = _cache_of(given)
    past = 0 if cache is None else int(cache.get_seq_length())
    length = past + tokens.shape[1]
    if tokens.shape[0] == 1:
        whole = isinstance(mask, Tensor) and mask.shape == (1, length) and _masks_nothing(mask, given, tokens.shape[1])
        return {name: value for name, value in given.items() if name != "attention_mask"} if whole else given
    # Models that find positions themselves find those of all tokens in a step with a mask, where they are not given.
    finds_positions = given.get("position_ids") is None and hasattr(getattr(module, "base_model", module), "get_rope_index")
    if mask is not None or (past > 0 and (tokens.shape[1] > 1 or finds_positions)):
        return given
    return {**given, "attention_mask": tokens.new_ones((tokens.shape[0], length))}


def _masks_nothing(mask: Tensor, given: Mapping[str, Any], count: int) -> bool:
    """Whether a mask of one sample may be left out. It is read with a prompt or a turn, which waits for the device anyway."""
    cache = _cache_of(given)
    if count == 1:
        compact = compact_of(cache)
        return compact is not None and compact.unpadded
    # transformers takes positions without mask and cache for those of several sequences, one behind the other.
    packed = cache is None and given.get("position_ids") is not None
    return not packed and bool(mask.all())


def _note_padding(cache: Any, given: Mapping[str, Any]) -> None:
    """Notes whether a call of several tokens has left a cache of one sample without padding."""
    compact, tokens = compact_of(cache), given.get("input_ids")
    if compact is not None and isinstance(tokens, Tensor):
        first = compact.logical_length == tokens.shape[1]
        compact.unpadded = given.get("attention_mask") is None and (first or compact.unpadded)


def _cache_of(given: Any) -> Any:
    """The KV cache among the arguments of a call, or in its output; None where there is none."""
    if isinstance(given, tuple):  # an output with return_dict=False
        return next((part for part in given if hasattr(part, "get_seq_length")), None)
    if not isinstance(given, dict):  # transformers' outputs are dicts
        return None
    return next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)


def _is_vision(name: str) -> bool:
    return name.startswith("pixel") or name in _ENCODED


def _brings_vision(given: Mapping[str, Any]) -> bool:
    """`generate` hands the prompt of a text a dict of encoders' outputs that is empty."""
    values = (value for name, value in given.items() if _is_vision(name))
    return any(value is not None and not (isinstance(value, dict) and not value) for value in values)
