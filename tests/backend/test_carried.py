"""Vision that is merged in one graph and attended to in another: which tokens it is goes along."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.passes.decoder import IMAGE, Decoder, features, tokens
from tests.runtime.requests import compiled, kept, prefill, turn
from tgvkv_compile import explain, tgvkv_backend
from tgvkv_compile.backend.carried import VisionMarks
from tgvkv_compile.errors import SplitDecoderError, UnsupportedGraphError


class Broken(Decoder):
    """Dynamo breaks the graph between merge and decoder, once or twice."""

    breaks = 1
    loses = False

    def forward(self, ids: Tensor, features: Tensor | None = None, past: Any = None, mask: Tensor | None = None) -> Any:
        hidden = self.embed(ids)
        if features is not None:
            hidden = hidden.masked_scatter((ids == IMAGE).unsqueeze(-1), features)
            torch._dynamo.graph_break()
            if self.breaks > 1:
                hidden = hidden * 1.0
                torch._dynamo.graph_break()
            if self.loses:
                hidden = apart(hidden)
        return self.decode(hidden, past, mask)


@torch.compiler.disable
def apart(embeds: Tensor) -> Tensor:
    """Another tensor, made in code that is not compiled."""
    return embeds.clone()


def broken(breaks: int = 1, loses: bool = False, **options: Any) -> Broken:
    model = Broken()
    model.breaks, model.loses = breaks, loses
    model.compile(backend=tgvkv_backend(0.4, **{"lowering": "eager", **options}))
    return model


@pytest.mark.parametrize("breaks", [1, 2])
@pytest.mark.parametrize("options", [{}, {"budget_of": "vision"}, {"lowering": "aot_eager"}])
def test_it_keeps_what_one_graph_keeps(breaks: int, options: dict[str, Any]) -> None:
    model, whole = broken(breaks, **options), compiled(**{name: value for name, value in options.items() if name != "lowering"})
    caches, expected = prefill(model, 2), prefill(whole, 2)
    assert kept(caches) == kept(expected)
    for picture in (False, True):
        logits, caches = turn(model, caches, picture=picture)
        wanted, expected = turn(whole, expected, picture=picture)
        torch.testing.assert_close(logits, wanted)
        assert kept(caches) == kept(expected)


def test_two_merges_with_a_break_between() -> None:
    """The first picture's mask comes with the embeddings, the second's is in the decoder's graph."""

    class Twice(Decoder):
        apart = True

        def forward(self, ids: Tensor, features: Any = None, past: Any = None, mask: Any = None) -> Any:
            vision = ids == IMAGE
            first = vision & (vision.cumsum(1) <= 3)
            hidden = self.embed(ids).masked_scatter(first.unsqueeze(-1), features[:3])
            if self.apart:
                torch._dynamo.graph_break()
            hidden = hidden.masked_scatter((vision & ~first).unsqueeze(-1), features[3:])
            return self.decode(hidden, past, mask)

    results = []
    for separate in (True, False):
        model = Twice()
        model.apart = separate
        model.compile(backend=tgvkv_backend(0.4, lowering="eager"))
        results.append(kept(prefill(model)))
    assert results[0] == results[1] == kept(prefill(compiled()))


def test_embeddings_that_changed_on_the_way_are_refused() -> None:
    with pytest.raises(UnsupportedGraphError, match="handed embeddings, not tokens"):
        prefill(broken(loses=True))


def test_a_later_picture_that_got_lost_is_no_text() -> None:
    model = broken()
    caches = prefill(model)
    model.loses = True
    with pytest.raises(SplitDecoderError, match="not handed the merged embeddings"):
        turn(model, caches, picture=True)
    turn(model, caches, picture=False)  # the error is told once, and the cache is as it was


def test_explain_sees_it() -> None:
    report = explain(Broken(), {"ids": tokens(), "features": features()}, 0.4)
    assert report.problems == () and report.capacity is not None
    assert [graph.kind for graph in report.graphs] == ["dense", "prefill"]


def test_marks_go_with_their_tensor_and_stay_in_their_thread() -> None:
    marks = VisionMarks()
    embeds, mask = torch.zeros(1, 4, 2), torch.ones(1, 4, 1, dtype=torch.bool)
    marks.put(embeds, mask)
    seen: list[Any] = []
    thread = threading.Thread(target=lambda: (marks.check_read(), seen.append(marks.among([embeds]))))
    thread.start()
    thread.join()
    assert seen == [()]
    assert marks.among([None, embeds, mask]) == (1,)
    with pytest.raises(SplitDecoderError):
        marks.check_read()
    marks.check_read()
    marks.put(embeds, mask)
    assert marks.read(embeds) is mask
    marks.check_read()
    marks.put(torch.zeros(1, 4, 2), mask)  # gone already
    marks.check_read()
    with pytest.raises(UnsupportedGraphError, match="handed others"):
        marks.read(mask)
