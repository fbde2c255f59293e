"""The slow, obvious model: stock transformers with the whole cache, where evicting means no longer seeing.

Every layer of every sample has its `Oracle`. It is fed the attention that the layer pays, materialised; what it evicts
stays in the cache and is masked from then on. No code of the compiled path runs here but the oracle's maths.
"""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicLayer
from transformers.masking_utils import sdpa_mask

from tests.support.oracle import Oracle
from tests.support.quantising import as_held
from tests.support.running import Kept, Trace, positions_of, traced_generate
from tgvkv_compile.config import EvictionConfig

_NOISE = 2e-5
"""Relative error that two ways of computing attention in float32 may differ by."""
_NAME = "tgvkv_reference"


@dataclasses.dataclass
class ReferenceTrace(Trace):
    """A `Trace` with what only the reference knows.

    Attributes:
        masses: `[B, L]`, `m_l`.
        fragile: Per sample, the first call whose evictions float noise could change, or None.
        session: Goes on with `Session.call`.
    """

    masses: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))
    fragile: list[int | None] = dataclasses.field(default_factory=list)
    session: Any = None


class Session:
    """One request of a stock model, under the oracles' eyes.

    Args:
        model: A transformers model; it is copied.
        config: The eviction options.
        image_token: Ids of vision placeholders.
    """

    def __init__(self, model: Any, config: EvictionConfig, *, image_token: int | Sequence[int]) -> None:
        self._model = copy.deepcopy(model)
        self._model._compiled_call_impl = None
        apart = "text_config" in self._model.config.sub_configs  # from the vision tower
        self._model.set_attn_implementation({"text_config": _NAME} if apart else _NAME)
        for module in self._model.modules():
            if hasattr(module, "layer_idx"):
                module.reference = self
        self._config, self._image_token = config, torch.tensor(image_token).reshape(-1)
        self._cache: Any = None
        self._valid = torch.empty(0)
        self._oracles: list[Oracle] = []
        self._twins: list[tuple[Oracle, Oracle]] = []  # their attention is a little off, one way and the other
        self._attention: dict[int, Tensor] = {}
        self._visible: dict[int, Tensor] = {}
        self._evicted: list[int] = []  # the model's layers that the oracles' layers are
        self._written: list[int] = []  # per sample, the most tokens that there ever were: newer ones take the window
        self._window = 0  # its size
        self._reselects = False
        self.calls = 0
        self.dense = False
        self.fragile: list[int | None] = []

    @torch.no_grad()
    def call(self, inputs: dict[str, Tensor]) -> Tensor:
        """Prompt, next token or next turn; gives the logits of the last token, `[B, vocabulary]`.

        Args:
            inputs: `input_ids`, `attention_mask` (over all that was put in so far) and, where there are pictures,
                `pixel_values`. A later call of several tokens is a turn; it may be padded on the left.
        """
        count = inputs["input_ids"].shape[1]
        self._reselects = count > 1 and bool(torch.isin(inputs["input_ids"], self._image_token).any())
        if not self._reselects:
            self._count_written(inputs["attention_mask"])
        output = self._model(
            **inputs,
            position_ids=positions_of(inputs["attention_mask"])[:, -count:],
            past_key_values=self._cache,
            use_cache=True,
        )
        self._take_in(inputs["input_ids"], inputs["attention_mask"], output.past_key_values)
        if self._reselects:
            self._written = []
            self._count_written(inputs["attention_mask"])
        return output.logits[:, -1].float()

    def _count_written(self, mask: Tensor) -> None:
        totals = mask.sum(1).tolist()
        self._written = [max(pair) for pair in zip(self._written or totals, totals, strict=True)]

    def generate(self, inputs: dict[str, Tensor], steps: int) -> "ReferenceTrace":
        """A prompt and `steps` decode steps through stock `generate`, which knows what else a model's calls need."""

        def look(cache: Any, mask: Tensor) -> Kept:
            self._take_in(inputs["input_ids"] if self._cache is None else inputs["input_ids"][:, :1], mask, cache)
            return self.kept

        found = traced_generate(self._model, inputs, steps, look)
        return ReferenceTrace(**vars(found), masses=self.masses, fragile=list(self.fragile), session=self)

    def _take_in(self, tokens: Tensor, mask: Tensor, cache: Any) -> None:
        """Shows the oracles the attention of a call that the model has just done."""
        first, count = self._cache is None, tokens.shape[1]
        self._valid, self._cache = mask.bool(), cache
        if first:
            self._evicted = [index for index, layer in enumerate(cache.layers) if type(layer) is DynamicLayer]
            self._prefill(torch.isin(tokens, self._image_token))
        elif self.dense and count > 1 and bool((vision := torch.isin(tokens, self._image_token)).any()):
            self._first_vision(vision)  # a placeholder that the model says itself is text
        elif not self.dense and count == 1:
            self._decode()
        elif not self.dense:
            self._turn(torch.isin(tokens, self._image_token))
        if first or self._reselects:
            most = max((sum(map(len, oracle.kept)) for oracle in self._oracles), default=0)
            self._window = min(16, max(1, most // (16 * max(1, len(self._evicted)))))
        self.calls += 1

    @property
    def kept(self) -> list[list[list[int]]]:
        """What each layer of each sample still sees."""
        if self.dense:
            return [[list(range(self._valid.shape[1])) for _ in self._evicted] for _ in self._valid]
        return [[list(layer) for layer in oracle.kept] for oracle in self._oracles]

    @property
    def masses(self) -> Tensor:
        """`[B, L]`."""
        return torch.stack([oracle.mass for oracle in self._oracles]) if self._oracles else torch.empty(0)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
        """Attention over all that is still seen; `[B, Q, H, D]`.

        Args:
            layer: Of the model.
            query: `[B, H, Q, D]`.
            key: `[B, Hkv, S, D]`.
            value: `[B, Hkv, S, D]`.
            mask: `[B, 1, Q, S]` bool, what the model lets attention see.
            scale: The factor on the logits.
        """
        if self._config.kv_dtype is not None and layer in self._evicted and self._oracles:
            key, value = (self._held(layer, x, query.shape[2], keys=x is key) for x in (key, value))
        group = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
        logits = query.float() @ key.float().transpose(2, 3) * scale
        visible = mask & self._not_evicted(layer, query.shape[2], mask)
        attention = logits.masked_fill(~visible, float("-inf")).softmax(-1).masked_fill(~visible, 0.0)
        self._attention[layer], self._visible[layer] = attention, visible[:, 0]
        return (attention @ value.float()).to(query.dtype).transpose(1, 2)

    def _held(self, layer: int, whole: Tensor, new: int, *, keys: bool) -> Tensor:
        """Keys or values `[B, Hkv, S, D]` as a cache gives them back; a call sees its own `new` tokens as they are.

        A turn with new vision takes what it reads for what there is.
        """
        past, kind = whole[:, :, :-new], self._config.kv_dtype
        assert kind is not None
        read = as_held(past, kind, keys=keys)
        if kind == "int4":
            position = positions_of(self._valid)[:, : past.shape[2]]
            newest = position >= torch.tensor(self._written)[:, None] - self._window
            read = torch.where(newest[:, None, :, None], as_held(past, "int8", keys=keys), read)
        read = read.to(whole.dtype)
        if self._reselects:
            cached = self._cache.layers[layer]
            (cached.keys if keys else cached.values)[:, :, : past.shape[2]] = read
        return torch.cat([read, whole[:, :, -new:]], dim=2)

    def _not_evicted(self, layer: int, queries: int, mask: Tensor) -> Tensor:
        """Bool, as `mask`; the new tokens are all there."""
        present = torch.ones_like(mask)
        if layer in self._evicted and self._oracles:
            known = mask.shape[3] - queries
            present[..., :known] = False
            for sample, oracle in enumerate(self._oracles):
                present[sample, :, :, self._columns(sample, oracle.kept[self._evicted.index(layer)])] = True
        return present

    def _columns(self, sample: int, positions: list[int]) -> Tensor:
        """Columns of the padded batch."""
        return self._valid[sample].nonzero()[:, 0][positions]

    def _prefill(self, vision: Tensor) -> None:
        self.dense = not bool(vision.any())
        self.fragile = [None] * len(vision)
        if self.dense:
            return
        for sample, valid in enumerate(self._valid):
            attention = [self._attention[layer][sample][:, valid][:, :, valid] for layer in self._evicted]
            visible = self._visible[self._evicted[0]][sample][valid][:, valid]
            stacked = torch.stack(attention).mean(1)
            oracles = [Oracle(self._config) for _ in range(3)]
            for oracle, sign in zip(oracles, (0, 1, -1), strict=True):
                oracle.prefill(_disturbed(stacked, sign), vision[sample, valid], visible)
            self._oracles.append(oracles[0])
            self._twins.append((oracles[1], oracles[2]))
            self._compare(sample)

    def _first_vision(self, vision: Tensor) -> None:
        """A turn with vision after turns of text."""
        self.dense = False
        for valid in self._valid[:, : -vision.shape[1]]:
            oracles = [Oracle(self._config) for _ in range(3)]
            for oracle in oracles:
                oracle.hold(len(self._evicted), int(valid.sum()))
            self._oracles.append(oracles[0])
            self._twins.append((oracles[1], oracles[2]))
        self._turn(vision)

    def _turn(self, vision: Tensor) -> None:
        count = vision.shape[1]
        for sample, oracle in enumerate(self._oracles):
            new = self._valid[sample, -count:]
            columns = self._valid.shape[1] - count + new.nonzero()[:, 0]
            attention = []
            for layer, index in enumerate(self._evicted):
                seen = torch.cat([self._columns(sample, oracle.kept[layer]), columns])
                attention.append(self._attention[index][sample].mean(0)[new][:, seen])
            brought = vision[sample, new]
            visible = self._visible[self._evicted[0]][sample][new][:, columns]
            oracle.extend_with_vision(attention, brought, visible)
            if self.fragile[sample] is None:  # else they have parted already
                for twin, sign in zip(self._twins[sample], (1, -1), strict=True):
                    twin.extend_with_vision([_disturbed(paid, sign) for paid in attention], brought, visible)
            self._compare(sample)

    def crop(self, length: int) -> None:
        """Takes tokens back, as `DynamicCache.crop` does."""
        padding = (~self._valid).sum(1).tolist()
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
        self._valid = self._valid[:, :length]
        for sample, oracle in enumerate(self._oracles):
            for other in (oracle, *self._twins[sample]):
                other.crop(length - padding[sample])

    def _decode(self) -> None:
        for sample, oracle in enumerate(self._oracles):
            for layer, index in enumerate(self._evicted):
                seen = self._columns(sample, oracle.attended(layer))
                paid = self._attention[index][sample, :, 0, :].mean(0)[seen]
                oracle.decode(layer, paid)
                for twin, sign in zip(self._twins[sample], (1, -1), strict=True):
                    if twin.attended(layer) != oracle.attended(layer) and self.fragile[sample] is not None:
                        continue  # they have parted already
                    twin.decode(layer, _disturbed(paid, sign))
            self._compare(sample)

    def _compare(self, sample: int) -> None:
        same = all(twin.kept == self._oracles[sample].kept for twin in self._twins[sample])
        if not same and self.fragile[sample] is None:
            self.fragile[sample] = self.calls


def _disturbed(attention: Tensor, sign: int) -> Tensor:
    generator = torch.Generator().manual_seed(int(attention.shape[-1]))
    noise = torch.randn(attention.shape, generator=generator)
    return attention * (1 + sign * _NOISE * noise) + abs(sign) * 1e-8 * noise.abs() * (attention > 0)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """transformers' interface of an attention function."""
    session: Session = module.reference
    return session.attend(module.layer_idx, query, key, value, attention_mask, scaling), None


def _mask(**options: Any) -> Tensor | None:
    """transformers' interface of a mask function: the model's mask, and never None."""
    return sdpa_mask(**{**options, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, _mask)


def reference(
    model: Any,
    inputs: dict[str, Tensor],
    steps: int,
    *,
    config: EvictionConfig,
    image_token: int,
    forced: Sequence[Tensor] | None = None,
) -> ReferenceTrace:
    """Prefill and `steps` greedy decode steps; arguments as of `run`."""
    session = Session(model, config, image_token=image_token)
    trace = ReferenceTrace(mask=inputs["attention_mask"], session=session)
    _go_on(trace, inputs, steps, forced)
    trace.masses = session.masses
    return trace


def reference_turn(
    trace: ReferenceTrace,
    question: Tensor | dict[str, Tensor],
    steps: int,
    *,
    forced: Sequence[Tensor] | None = None,
    keep: int | None = None,
) -> ReferenceTrace:
    """A further turn on a copy of the session of `trace`: a text, or inputs of its own (left padding and pictures too).

    With `keep` the cache is cropped to so many columns before.
    """
    inputs = question if isinstance(question, dict) else {"input_ids": question}
    session, mask = copy.deepcopy(trace.session), trace.mask
    if keep is not None:
        session.crop(keep)
        mask = mask[:, :keep]
    mask = torch.cat([mask, inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))], dim=1)
    turn = ReferenceTrace(mask=mask, session=session, masses=trace.masses)
    _go_on(turn, inputs, steps, forced)
    return turn


def _go_on(trace: ReferenceTrace, inputs: dict[str, Tensor], steps: int, forced: Sequence[Tensor] | None) -> None:
    session = trace.session
    before = session.calls
    for step in range(steps + 1):
        logits = session.call({**inputs, "attention_mask": trace.mask})
        best = trace.add(logits, session.kept)
        if step < steps:
            token = forced[step] if forced is not None else best
            inputs = {"input_ids": token[:, None]}
            trace.mask = torch.cat([trace.mask, torch.ones_like(token[:, None])], dim=1)
    trace.fragile = [None if call is None else max(0, call - before) for call in session.fragile]
