"""Runs a case: the compiled model and the reference are fed the same tokens and compared after every call."""

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import maybe_mark_dynamic

from tests.fuzz.cases import Case, Copy, Crop, Decode, Request, Select, Turn
from tests.fuzz.families import FAMILIES, Family
from tests.fuzz.session import FuzzSession
from tests.support.comparing import MARGIN, TOLERANCE
from tests.support.running import kept_of, positions_of
from tgvkv_compile import tgvkv_backend
from tgvkv_compile.errors import CacheError


class Finding(AssertionError):
    """The compiled model is not the reference, or raised; names the request and the call."""


@dataclasses.dataclass
class Tally:
    """What was compared.

    Attributes:
        cases: Requests, each a batch of prompts run end to end.
        models: Compiled models.
        calls: Model calls that were compared.
        samples: Samples of those calls.
        undecided: Samples of those calls that were not compared, since float noise had decided an eviction.
        patterns: How often each kind of action was done.
    """

    cases: int = 0
    models: int = 0
    calls: int = 0
    samples: int = 0
    undecided: int = 0
    patterns: dict[str, int] = dataclasses.field(default_factory=dict)

    def did(self, pattern: str) -> None:
        self.patterns[pattern] = self.patterns.get(pattern, 0) + 1


def run_case(case: Case, tally: Tally, *, lowering: Any = "eager") -> None:
    """Runs all requests of a case on one compiled model.

    Raises:
        Finding: Something differs.
    """
    torch._dynamo.reset()
    family = FAMILIES[case.family]
    model = family.make_model(case.shape, 0)
    options = dataclasses.asdict(case.config)
    model.compile(backend=tgvkv_backend(**options, lowering=lowering, growth_reserve=case.reserve))
    tally.models += 1
    for number, request in enumerate(case.requests):
        stock = family.make_model(case.shape, request.weights)
        model.load_state_dict(stock.state_dict())
        runner = _Runner(case, request, family, model, stock, tally)
        try:
            with torch.no_grad():
                runner.run()
        except Exception as error:
            raise Finding(f"request {number}, {runner.where}: {type(error).__name__}: {error}") from error
        tally.cases += 1


@dataclasses.dataclass
class _Live:
    """A cache, the mask that belongs to it, and the reference in the same state."""

    cache: Any
    mask: Tensor
    session: FuzzSession
    turned: bool = False


class _Runner:
    """One request."""

    def __init__(self, case: Case, request: Request, family: Family, model: Any, stock: Any, tally: Tally) -> None:
        self._case, self._request, self._family = case, request, family
        self._model, self._stock, self._tally = model, stock, tally
        self._style = case.style
        self._generator = torch.Generator().manual_seed(request.seed)
        self.where = "prefill"

    def run(self) -> None:
        request = self._request
        inputs = self._family.make_inputs(self._case.shape, request.prompts, request.seed)
        if not self._style.generate:
            live = _Live(None, inputs["attention_mask"], self._session())
            self._feed(live, inputs)
            self._go_on(live, request.actions, "")
        elif request.beams > 1:
            self._beams(inputs)
        else:
            self._greedy(inputs)

    def _session(self) -> FuzzSession:
        return FuzzSession(self._stock, self._case.config, image_token=self._family.image_token)

    def _greedy(self, inputs: dict[str, Tensor]) -> None:
        """Greedy `generate`; its cache lacks the last token."""
        steps = 5
        self.where = "generate"
        self._tally.did("generate")
        output = self._generate(inputs, steps, {})
        tokens = output.sequences[:, inputs["input_ids"].shape[1] :]
        live = _Live(output.past_key_values, inputs["attention_mask"], self._session())
        for step, logits in enumerate(output.logits):
            self.where = f"generate, token {step}"
            expected = live.session.call({**inputs, "attention_mask": live.mask})
            self._compare(live, logits.float(), expected, kept=step == steps)
            if step < steps:
                inputs = {"input_ids": tokens[:, step : step + 1]}
                live.mask = torch.cat([live.mask, torch.ones_like(inputs["input_ids"])], dim=1)

    def _beams(self, inputs: dict[str, Tensor]) -> None:
        """A beam's score is that of its tokens on a cache that only ever saw these tokens."""
        steps, beams = 5, self._request.beams
        self.where = "beam search"
        self._tally.did("beam search")
        output = self._generate(inputs, steps, {"num_beams": beams, "num_return_sequences": beams})
        continuation = output.sequences[:, inputs["input_ids"].shape[1] :]
        for beam in range(beams):
            self.where = f"beam {beam}"
            chosen = continuation[beam::beams]
            session, mask, given = self._session(), inputs["attention_mask"], dict(inputs)
            score = torch.zeros(len(chosen))
            for step in range(steps + 1):
                logits = session.call({**given, "attention_mask": mask})
                token = chosen[:, step, None]
                score += logits.log_softmax(-1).gather(1, token)[:, 0]
                given, mask = {"input_ids": token}, torch.cat([mask, torch.ones_like(token)], dim=1)
            for sample, fragile in enumerate(session.fragile):
                self._tally.samples += 1
                if fragile is not None:
                    self._tally.undecided += 1
                    continue
                found = output.sequences_scores[beams * sample + beam]
                torch.testing.assert_close(found, score[sample] / (steps + 1), atol=TOLERANCE, rtol=TOLERANCE)
            self._tally.calls += steps + 1

    def _generate(self, inputs: dict[str, Tensor], steps: int, options: dict[str, Any]) -> Any:
        return self._model.generate(
            **inputs,
            max_new_tokens=steps + 1,
            do_sample=False,
            output_logits=True,
            output_scores=True,
            return_dict_in_generate=True,
            **options,
        )

    def _go_on(self, live: _Live, actions: tuple[Any, ...], path: str) -> None:
        for number, action in enumerate(actions):
            self.where = f"{path}action {number} ({action!r})"
            self._tally.did(type(action).__name__.lower())
            if isinstance(action, Decode):
                for step in range(action.steps):
                    self.where = f"{path}action {number} ({action!r}), step {step}"
                    self._append(live, 1, None)
            elif isinstance(action, Turn):
                self._append(live, action.tokens, action.padding)
                live.turned = True
            elif isinstance(action, Crop):
                self._crop(live, action.tokens)
            elif isinstance(action, Select):
                self._select(live, action)
            elif isinstance(action, Copy):
                twin = copy.deepcopy(live)
                before = kept_of(live.cache)
                self._go_on(twin, action.actions, f"{self.where}: ")
                assert kept_of(live.cache) == before, "the original changed with its copy"

    def _append(self, live: _Live, count: int, padding: tuple[int, ...] | None) -> None:
        batch = live.mask.shape[0]
        first, last = self._family.text_tokens
        ids = torch.randint(first, last, (batch, count), generator=self._generator)
        new = torch.ones_like(ids)
        if padding is not None and batch > 1:
            for sample in range(batch):
                new[sample, : padding[sample % len(padding)]] = 0
        live.mask = torch.cat([live.mask, new], dim=1)
        self._feed(live, {"input_ids": ids})

    def _feed(self, live: _Live, inputs: dict[str, Tensor]) -> None:
        given = {name: value for name, value in inputs.items() if name != "attention_mask"}
        if self._style.encode and self._family.encode is not None and "pixel_values" in given:
            given = {"input_ids": given["input_ids"], **self._family.encode(self._stock, given)}
        plain = bool(live.mask.all())
        if self._style.give_mask or not plain:
            given["attention_mask"] = live.mask
        if self._family.needs_positions or self._style.give_positions or not plain:
            given["position_ids"] = positions_of(live.mask)[:, -given["input_ids"].shape[1] :]
        if self._style.dynamic:
            for value in given.values():
                _vary(value)
        output = self._model(**given, past_key_values=live.cache, use_cache=True)
        live.cache = output.past_key_values
        expected = live.session.call({**inputs, "attention_mask": live.mask})
        self._compare(live, output.logits[:, -1].float(), expected, kept=True)

    def _compare(self, live: _Live, logits: Tensor, expected: Tensor, *, kept: bool) -> None:
        """Logits, best tokens and what is kept; a sample is compared until float noise decides an eviction."""
        self._tally.calls += 1
        now = live.session.calls - 1
        held = kept_of(live.cache) if kept else None
        for sample, fragile in enumerate(live.session.fragile):
            self._tally.samples += 1
            if fragile is not None and fragile < now:
                self._tally.undecided += 1
                continue
            where = f"sample {sample}"
            torch.testing.assert_close(
                logits[sample], expected[sample], atol=TOLERANCE, rtol=TOLERANCE, msg=lambda text, w=where: f"{w}: {text}"
            )
            best = expected[sample].topk(2)
            if float(best.values[0] - best.values[1]) > MARGIN:
                assert int(logits[sample].argmax()) == int(best.indices[0]), where
            if held is not None and fragile is None:
                assert held[sample] == live.session.kept[sample], f"{where}: {held[sample]} != {live.session.kept[sample]}"

    def _crop(self, live: _Live, tokens: int) -> None:
        spare = live.mask.cumsum(1).eq(1).long().argmax(1)  # column of each sample's first token
        tokens = min(tokens, int(live.mask.shape[1] - 1 - spare.max()))
        if tokens < 1:
            return
        try:
            live.cache.crop(-tokens)
        except CacheError as error:
            assert live.turned and "later turns were padded" in str(error)
            return
        live.session.crop(tokens)
        live.mask = live.mask[:, :-tokens]

    def _select(self, live: _Live, action: Select) -> None:
        batch = live.mask.shape[0]
        if action.how == "repeat":
            times = 2 if batch < 3 else 1
            indices = [sample for sample in range(batch) for _ in range(times)]
            live.cache.batch_repeat_interleave(times)
        else:
            indices = [index % batch for index in action.indices]
            chosen = torch.tensor(indices)
            if action.how == "reorder":
                live.cache.reorder_cache(chosen)
            else:
                live.cache.batch_select_indices(indices if action.how == "list" else chosen)
        live.session.select(indices)
        live.mask = live.mask[indices]


def _vary(value: Any) -> None:
    """Tells dynamo that batch and length of an input vary; it specialises sizes 0 and 1 all the same."""
    if isinstance(value, Tensor):
        for dim in range(2 if value.ndim == 2 else 1):
            if value.shape[dim] > 1:
                maybe_mark_dynamic(value, dim)
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            _vary(part)
