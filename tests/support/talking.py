"""A compiled model and the reference in one conversation: fed alike, compared after every call."""

import copy
from typing import Any

import torch
from torch import Tensor

from tests.support.comparing import MARGIN, TOLERANCE
from tests.support.models import IMAGE
from tests.support.reference import Session
from tests.support.running import kept_of, positions_of
from tgvkv_compile.config import EvictionConfig


class Conversation:
    """Turns and decode steps on one cache.

    Attributes:
        cache: The compiled model's.
        session: The reference's.
        mask: `[B, S]`, what was put in so far.
        tokens: `[B]`, the reference's best next token after each call.
        logits: `[B, vocabulary]`, the reference's of the last call.
        compared: Calls of samples that were compared in full: logits, tokens and kept positions.
    """

    def __init__(self, compiled: Any, stock: Any, config: EvictionConfig) -> None:
        self._compiled = compiled
        self.cache: Any = None
        self.session = Session(stock, config, image_token=IMAGE)
        self.mask = torch.empty(0, dtype=torch.int64)
        self.tokens: list[Tensor] = []
        self.logits = torch.empty(0)
        self.compared = 0

    @torch.no_grad()
    def say(self, inputs: dict[str, Tensor]) -> "Conversation":
        """A prompt, a turn or a token: `input_ids`, and where they are needed `attention_mask` (its own) and `pixel_values`."""
        new = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        self.mask = new if self.cache is None else torch.cat([self.mask, new], dim=1)
        given = {**inputs, "attention_mask": self.mask}
        call = self.session.calls
        wanted = self.session.call(given)
        positions = positions_of(self.mask)[:, -new.shape[1] :]
        output = self._compiled(**given, position_ids=positions, past_key_values=self.cache, use_cache=True)
        self.cache = output.past_key_values
        self._compare(output.logits[:, -1].float(), wanted, call)
        self.logits, self.tokens = wanted, [*self.tokens, wanted.argmax(-1)]
        return self

    def steps(self, count: int) -> "Conversation":
        """`count` greedy steps."""
        for _ in range(count):
            self.say({"input_ids": self.tokens[-1][:, None]})
        return self

    def copy(self) -> "Conversation":
        """As `copy.deepcopy` of the cache."""
        other = copy.copy(self)
        other.cache, other.session = copy.deepcopy(self.cache), copy.deepcopy(self.session)
        return other

    def crop(self, length: int) -> "Conversation":
        """Takes back all columns from `length` on."""
        self.cache.crop(length - self.mask.shape[1])  # how many to remove, negative: newer releases take nothing else
        self.session.crop(length)
        self.mask = self.mask[:, :length]
        self._compare_kept()
        return self

    def _compare(self, logits: Tensor, wanted: Tensor, call: int) -> None:
        """Up to the call in which float noise could have changed what is kept."""
        for sample, fragile in enumerate(self.session.fragile):
            if fragile is not None and fragile < call:
                continue
            where = f"call {call}, sample {sample}"
            torch.testing.assert_close(
                logits[sample], wanted[sample], atol=TOLERANCE, rtol=TOLERANCE, msg=lambda text, w=where: f"{w}: {text}"
            )
            best = wanted[sample].topk(2).values
            if float(best[0] - best[1]) > MARGIN:
                assert int(logits[sample].argmax()) == int(wanted[sample].argmax()), where
        self._compare_kept()

    def _compare_kept(self) -> None:
        if self.session.dense:  # no picture yet, so nothing is evicted
            self.compared += self.mask.shape[0]
            return
        kept = kept_of(self.cache)
        for sample, fragile in enumerate(self.session.fragile):
            if fragile is None:
                assert kept[sample] == self.session.kept[sample], f"call {self.session.calls - 1}, sample {sample}"
                self.compared += 1
