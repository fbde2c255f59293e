"""Models in half precision: what is kept is what the oracle keeps that sees the same queries and keys, scored in float32."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tests.support.models import IMAGE, Shape, make_inputs, make_model
from tests.support.oracle import Oracle
from tests.support.running import run
from tgvkv_compile import tgvkv_backend
from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.passes.insert import insert_decode, insert_scoring

SHAPE = Shape(layers=3, heads=4, kv_heads=2, side=6, seed=7)
PROMPTS = ((20, 40), (10, 12, 30))
STEPS = 8
CONFIG = EvictionConfig(0.3)


class Recorder:
    """Queries and keys that the inserted operations were called with.

    Attributes:
        prompt: Per layer, `(q [B, H, N, D], k [B, Hkv, N, D], scale)`.
        steps: Per decode step and layer, `(q [B, H, 1, D], k [B, Hkv, 1, D])`.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.prompt: list[tuple[Tensor, Tensor, float]] = []
        self.steps: list[list[tuple[Tensor, Tensor]]] = []
        score, step = insert_scoring.rank_tokens, insert_decode.decode_step

        def scored(
            q: Tensor, k: Tensor, token_types: Any, mask: Any, is_causal: bool, scale: float, *rest: Any, **options: Any
        ) -> Any:
            if not isinstance(q, FakeTensor):
                self.prompt.append((q.clone(), k.clone(), scale))
            return score(q, k, token_types, mask, is_causal, scale, *rest, **options)

        def stepped(q: Tensor, k: Tensor, *rest: Any, layer: int, **options: Any) -> Any:
            if not isinstance(q, FakeTensor):
                if layer == 0:
                    self.steps.append([])
                self.steps[-1].append((q.clone(), k.clone()))
            return step(q, k, *rest, layer=layer, **options)

        monkeypatch.setattr(insert_scoring, "rank_tokens", scored)
        monkeypatch.setattr(insert_decode, "decode_step", stepped)


def attention(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Causal attention of `q [H, Q, D]` on `k [Hkv, S, D]`, the last Q of S: `[H, Q, S]`, worked out in float64."""
    k = k.repeat_interleave(q.shape[0] // k.shape[0], dim=0).double()
    hidden = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).triu(k.shape[1] - q.shape[1] + 1)
    return (q.double() @ k.transpose(1, 2) * scale).masked_fill(hidden, float("-inf")).softmax(-1).float()


def oracle_run(
    recorder: Recorder, inputs: dict[str, Tensor], sample: int, rounded: torch.dtype = torch.float32
) -> list[list[list[int]]]:
    """What the oracle keeps per call and layer; with `rounded`, if attention were no more precise than that."""
    valid = inputs["attention_mask"][sample].bool()
    keys = [k[sample][:, valid] for _, k, _ in recorder.prompt]
    oracle = Oracle(CONFIG)
    prompt = [attention(q[sample][:, valid], k, scale) for (q, _, scale), k in zip(recorder.prompt, keys, strict=True)]
    oracle.prefill(torch.stack(prompt).to(rounded).float(), (inputs["input_ids"][sample] == IMAGE)[valid])
    kept = [copy.deepcopy(oracle.kept)]
    for step in recorder.steps:
        for layer, (q, k) in enumerate(step):
            keys[layer] = torch.cat([keys[layer], k[sample]], dim=1)
            seen = keys[layer][:, oracle.attended(layer)]
            paid = attention(q[sample], seen, recorder.prompt[layer][2]).to(rounded).float()
            oracle.decode(layer, paid[:, 0].mean(0))
        kept.append(copy.deepcopy(oracle.kept))
    return kept


def inputs_of(dtype: torch.dtype) -> dict[str, Tensor]:
    inputs = make_inputs(PROMPTS, side=SHAPE.side)
    return {**inputs, "pixel_values": inputs["pixel_values"].to(dtype)}


@pytest.mark.parametrize(("dtype", "attention_form"), [(torch.bfloat16, "sdpa"), (torch.float16, "eager")])
def test_kept_positions(dtype: torch.dtype, attention_form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    model = make_model(dataclasses.replace(SHAPE, attention=attention_form)).to(dtype)
    model.compile(backend=tgvkv_backend(CONFIG.budget, lowering="eager", growth_reserve=3))
    inputs = inputs_of(dtype)
    trace = run(model, inputs, STEPS)
    assert len(recorder.prompt) == SHAPE.layers and len(recorder.steps) == STEPS
    assert recorder.prompt[0][0].dtype == recorder.steps[0][0][0].dtype == dtype
    for sample in range(len(PROMPTS)):
        assert [kept[sample] for kept in trace.kept] == oracle_run(recorder, inputs, sample)
    if dtype == torch.float16:
        return  # its 11 bits are enough for these prompts
    rounded = oracle_run(recorder, inputs, 0, rounded=dtype)
    assert rounded != [kept[0] for kept in trace.kept], "these prompts cannot tell precisions apart"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_whole_budget_is_as_exact_as_the_uncompiled_model(dtype: torch.dtype) -> None:
    """Both are held against float32, fed with the same tokens: rounding may differ, its size may not."""
    exact = logits_of(make_model(SHAPE), torch.float32, None)
    tokens = [step.argmax(-1) for step in exact]
    stock = logits_of(make_model(SHAPE).to(dtype), dtype, tokens)
    model = make_model(SHAPE).to(dtype)
    model.compile(backend=tgvkv_backend(1.0, lowering="eager"))
    found = logits_of(model, dtype, tokens)
    for step, (wanted, dense, compiled) in enumerate(zip(exact, stock, found, strict=True)):
        allowed = 2 * (dense - wanted).norm() + 1e-3
        assert (compiled - wanted).norm() <= allowed, f"call {step}"


@torch.no_grad()
def logits_of(model: Any, dtype: torch.dtype, tokens: list[Tensor] | None) -> list[Tensor]:
    """float32 `[B, vocabulary]` of the prompt and of four more tokens."""
    inputs, cache, logits = inputs_of(dtype), None, []
    mask = inputs.pop("attention_mask")
    for step in range(5):
        output = model(**inputs, attention_mask=mask, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits[:, -1].float())
        token = (tokens[step] if tokens is not None else logits[-1].argmax(-1))[:, None]
        inputs, mask = {"input_ids": token}, torch.cat([mask, torch.ones_like(token)], dim=1)
    return logits
