"""What is drawn: a model with its options, and what is asked of it."""

import dataclasses
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.families import FAMILIES, Family, Prompt
from tgvkv_compile.config import EvictionConfig


@dataclasses.dataclass(frozen=True)
class Decode:
    """Single tokens, one after the other."""

    steps: int


@dataclasses.dataclass(frozen=True)
class Turn:
    """A further text of `tokens` tokens, of which sample `i` lacks `padding[i % len(padding)]` (padded on the left)."""

    tokens: int
    padding: tuple[int, ...] = (0,)


@dataclasses.dataclass(frozen=True)
class Crop:
    """The last `tokens` tokens are taken back (fewer where a sample would lose its first)."""

    tokens: int


@dataclasses.dataclass(frozen=True)
class Select:
    """The samples `indices` (modulo the batch), as beam search, contrastive search and users do it."""

    indices: tuple[int, ...]
    how: str


@dataclasses.dataclass(frozen=True)
class Copy:
    """`actions` on a deep copy of the cache; then the original goes on."""

    actions: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Request:
    """One end-to-end case: a batch of prompts and what follows.

    Attributes:
        prompts: One sample each.
        seed: Of tokens and pictures.
        weights: Seed of the model's weights; the compiled code stays the same.
        beams: Of a `generate` call, where the case generates.
        actions: In order, in a hand-written loop.
    """

    prompts: tuple[Prompt, ...]
    seed: int
    weights: int
    beams: int = 1
    actions: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class Style:
    """What costs a compilation where it changes, and so is the same for all requests of a model.

    Attributes:
        batch: Most samples of a prompt; of more than one there are at least two.
        images: Pictures of a batch (transformers' check of their number compiles for each number anew).
        regroup: Single samples may become a batch, and batches a single sample, by `Select`.
        generate: Call `generate`, else a hand-written loop.
        give_mask: Pass the attention mask even where it masks nothing.
        give_positions: Pass position ids even where the model can count.
        encode: Encode pictures beforehand, as `generate` does; else the model's own call does (which dynamo splits).
        dynamic: Tell dynamo beforehand that sizes vary (it compiles twice to find out itself).
    """

    batch: int = 4
    images: int = 2
    regroup: bool = False
    generate: bool = False
    give_mask: bool = True
    give_positions: bool = True
    encode: bool = True
    dynamic: bool = True


@dataclasses.dataclass(frozen=True)
class Case:
    """One compiled model and the requests that it gets, one after the other."""

    family: str
    shape: Any
    config: EvictionConfig
    reserve: int
    style: Style
    requests: tuple[Request, ...]


@st.composite
def configs(draw: st.DrawFn) -> EvictionConfig:
    budgets = st.one_of(st.sampled_from([0.2, 0.5, 0.1, 1.0]), st.floats(0.02, 1.0), st.integers(1, 60))
    return EvictionConfig(
        budget=draw(budgets),
        budget_of=draw(st.sampled_from(["all", "vision"])),
        budgeting=draw(st.sampled_from(["tvb", "waterfill", "uniform", "pyramid"])),
        decode=draw(st.sampled_from(["ratio", "fixed", "keep", "ratio"])),
        sink_tokens=draw(st.sampled_from([4, 0, 1, 7, 4, 4])),
        # Key norms are not among them: the reference sees attention, and no keys.
        ranking=draw(st.sampled_from(["twr", "twr", "twr", "snapkv", "h2o", "streaming", "random"])),
    )


_turns = st.builds(Turn, st.integers(2, 7), st.sampled_from([(0,), (0,), (0, 1), (1, 0, 0), (0, 2, 1)])).map(
    lambda turn: Turn(max(turn.tokens, max(turn.padding) + 1), turn.padding)
)


def _actions(style: Style, family: Family) -> st.SearchStrategy[tuple[Any, ...]]:
    decode = st.builds(Decode, st.integers(1, 6))
    simple = [decode, _turns]
    if family.crops:
        simple.append(st.builds(Crop, st.integers(1, 12)))
    if style.batch > 1 or style.regroup:
        indices = st.lists(st.integers(0, 3), min_size=1 if style.regroup else 2, max_size=4).map(tuple)
        simple.append(st.builds(Select, indices, st.sampled_from(["reorder", "list", "tensor", "repeat"])))
    inner = st.lists(st.one_of(decode, *simple), min_size=1, max_size=2).map(tuple)
    return st.lists(st.one_of(decode, decode, *simple, st.builds(Copy, inner)), min_size=1, max_size=4).map(tuple)


@st.composite
def styles(draw: st.DrawFn, family: Family) -> Style:
    batch, images = draw(st.sampled_from([1, 4, 4])), draw(st.integers(1, family.max_images))
    if family.generates and draw(st.integers(0, 5)) == 5:
        return Style(batch=batch, images=images, generate=True)
    return Style(
        batch=batch,
        images=images,
        regroup=draw(st.sampled_from([False, False, True])),
        give_mask=draw(st.sampled_from([True, True, False])),
        give_positions=draw(st.sampled_from([True, True, False])),
        encode=draw(st.integers(0, 7)) != 7,
        dynamic=draw(st.integers(0, 11)) != 11,
    )


@st.composite
def prompts(draw: st.DrawFn, style: Style) -> tuple[Prompt, ...]:
    """Samples that share the pictures; text may be missing before, between and behind them."""
    batch = draw(st.integers(2, style.batch)) if style.batch > 1 else 1
    images = 0 if draw(st.integers(0, 39)) == 39 else style.images  # a batch of text alone is rare
    owners = [draw(st.integers(0, batch - 1)) for _ in range(images)]
    counts = st.one_of(st.integers(0, 4), st.integers(0, 14))
    samples = []
    for sample in range(batch):
        texts = [draw(counts) for _ in range(owners.count(sample) + 1)]
        samples.append(tuple(texts) if len(texts) > 1 else (max(texts[0], 1),))
    return tuple(samples)


@st.composite
def requests(draw: st.DrawFn, style: Style, family: Family) -> Request:
    return Request(
        prompts=draw(prompts(style)),
        seed=draw(st.integers(0, 100_000)),
        weights=draw(st.integers(0, 100_000)),
        beams=draw(st.sampled_from([1, 2, 3])) if style.generate else 1,
        actions=() if style.generate else draw(_actions(style, family)),
    )


@st.composite
def cases(draw: st.DrawFn, count: int) -> Case:
    """A case of `count` requests; the shrinker takes fewer."""
    name = draw(st.sampled_from(sorted(FAMILIES)))
    family = FAMILIES[name]
    style = draw(styles(family))
    fewer = [number for number in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32) if number < count]
    wanted = draw(st.sampled_from([*fewer, *[count] * 99]))
    return Case(
        family=name,
        shape=draw(family.shapes),
        config=draw(configs()),
        reserve=draw(st.sampled_from([1, 2, 3, 5, 64])),
        style=style,
        requests=tuple(draw(requests(style, family)) for _ in range(wanted)),
    )
