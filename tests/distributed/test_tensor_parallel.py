"""A model that transformers sharded over two Gloo ranks on the CPU, against the reference in one process."""

import json
from typing import Any

import pytest
import torch

from tests.distributed.ranks import CODES, CONFIG, INPUTS, RANKED, RANKS, SHAPE, STEPS, kept_by, run_ranks
from tests.support.comparing import assert_same_run
from tests.support.models import IMAGE, make_model
from tests.support.reference import ReferenceTrace, reference
from tests.support.running import Trace

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def expected() -> ReferenceTrace:
    return reference(make_model(SHAPE), INPUTS, STEPS, config=CONFIG, image_token=IMAGE)


@pytest.fixture(scope="module")
def found(expected: ReferenceTrace, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    make_model(SHAPE).save_pretrained(folder / "model")
    (folder / "tokens.json").write_text(json.dumps([row.tolist() for row in expected.tokens[:STEPS]]))
    return run_ranks(folder)


def test_ranks_do_what_one_process_does(found: list[dict[str, Any]], expected: ReferenceTrace) -> None:
    assert len(found) == RANKS and expected.fragile == [None, None]
    lengths = [[len(layer) for layer in sample] for call in expected.kept for sample in call]
    assert len(lengths) > 2 and any(a != b for a, b in zip(lengths, lengths[2:], strict=False))
    for rank in found:
        given = rank["run"]
        tensors = {name: [torch.tensor(row) for row in given[name]] for name in ("logits", "tokens")}
        assert_same_run(Trace(kept=given["kept"], **tensors), expected)


def test_each_rank_holds_codes_of_its_heads(found: list[dict[str, Any]], expected: ReferenceTrace) -> None:
    forced = expected.tokens[:STEPS]
    wanted = reference(make_model(SHAPE), INPUTS, STEPS, config=CODES, image_token=IMAGE, forced=forced)
    assert wanted.fragile == [None, None]
    for rank in found:
        given = rank["codes"]
        tensors = {name: [torch.tensor(row) for row in given[name]] for name in ("logits", "tokens")}
        assert_same_run(Trace(kept=given["kept"], **tensors), wanted)


def test_ranks_agree_to_the_last_bit(found: list[dict[str, Any]]) -> None:
    first, second = (rank["run"] for rank in found)
    assert first == second


def test_each_rank_holds_its_own_heads(found: list[dict[str, Any]]) -> None:
    width = SHAPE.heads * SHAPE.head_dim
    for rank in found:
        assert rank["arena"] == [2, SHAPE.kv_heads // RANKS]
        assert rank["shard"] == [SHAPE.kv_heads * SHAPE.head_dim // RANKS, width]
        assert any(rank["known by"])  # the cache knows the model that made it


@pytest.mark.parametrize("ranking", RANKED)
def test_other_rankings_are_those_of_one_process(found: list[dict[str, Any]], ranking: str) -> None:
    alone = kept_by(make_model(SHAPE), ranking)
    for rank in found:
        assert rank["rankings"][ranking] == alone


@pytest.mark.parametrize("alone", ["prefill alone", "decode alone"])
def test_without_the_reduction_ranks_would_part(found: list[dict[str, Any]], alone: str) -> None:
    assert found[0][alone]["kept"] != found[1][alone]["kept"]
    for rank in found:
        same = rank[alone]["kept"][0] == rank["run"]["kept"][0]
        assert same == (alone == "decode alone")


def test_a_rank_counts_by_its_heads(found: list[dict[str, Any]]) -> None:
    assert [rank["mean"] for rank in found] == [[[(1 + 3 * 2) / 4, (0 - 3 * 4) / 4]]] * RANKS
