"""What each rank of a tensor-parallel run does; the ranks are processes that `run_ranks` starts."""

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from transformers.integrations import accelerate

from tests.support.models import Shape, make_inputs
from tests.support.running import Trace, run
from tgvkv_compile.backend.backend import tgvkv_backend
from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.ops import ranks

RANKS = 2
STEPS = 4
SHAPE = Shape(layers=2, heads=4, kv_heads=2)
INPUTS = make_inputs([[9, 12], [4, 6]])
CONFIG = EvictionConfig(budget=0.4)
CODES = EvictionConfig(budget=0.4, kv_dtype="int4")
"""Each rank holds the codes and windows of its own heads."""
RANKED = ("h2o", "knorm")
"""By attention of all heads, and by the keys of all."""
TIMEOUT = timedelta(seconds=240)


def run_ranks(folder: Path) -> list[dict[str, Any]]:
    """Runs `_job` on every rank and gives what each found out.

    The ranks meet in a file of `folder`; Gloo itself talks over the loopback interface.

    Args:
        folder: Holds `model`, a saved model, and `tokens.json`, those to go on with: `[STEPS][B]`.
    """
    torch.multiprocessing.spawn(_rank, args=(str(folder),), nprocs=RANKS)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "GLOO_SOCKET_IFNAME": "lo"}.items():
            patch.setenv(name, str(value))
        store = f"file://{folder}/rendezvous"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=TIMEOUT)
        # transformers asks for the package accelerate wherever a device map is given; this one needs nothing of it.
        patch.setattr(accelerate, "is_accelerate_available", lambda *_: True)
        found = _job(rank, Path(folder), patch)
        (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
        dist.barrier()
        dist.destroy_process_group()


def _job(rank: int, folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    forced = [torch.tensor(row) for row in json.loads((folder / "tokens.json").read_text())]
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder / "model", tp_plan="auto").eval()
    model.compile(backend=tgvkv_backend(CONFIG.budget, lowering="eager"))
    trace = run(model, INPUTS, STEPS, forced=forced)
    layer = model.model.language_model.layers[0]
    shard = layer.self_attn.k_proj.weight.to_local()
    compact = trace.cache.layers[0].keys.compact
    found: dict[str, Any] = {
        "run": _plain(trace),
        "shard": list(shard.shape),
        "known by": [compact.identity.weight == weight.data_ptr() for weight in (shard, layer.input_layernorm.weight)],
        "arena": list(compact.state.key_arena.shape[:2]),
        # Rank 0 has one head here, rank 1 has three.
        "mean": ranks.mean_over_ranks(torch.tensor([[1.0 + rank, -4.0 * rank]]), 1 + 2 * rank, "0").tolist(),
    }
    # The graphs look this function up when they run, so without it they need not be made anew.
    over_ranks = ranks.mean_over_ranks
    length = INPUTS["input_ids"].shape[1]
    patch.setattr(ranks, "mean_over_ranks", lambda mean, *_: mean)
    found["prefill alone"] = _plain(run(model, INPUTS, 0))
    in_prefill = lambda mean, *of: over_ranks(mean, *of) if mean.shape[-1] == length else mean  # noqa: E731
    patch.setattr(ranks, "mean_over_ranks", in_prefill)
    found["decode alone"] = _plain(run(model, INPUTS, STEPS, forced=forced))
    patch.setattr(ranks, "mean_over_ranks", over_ranks)
    found["rankings"] = {name: kept_by(model, name) for name in RANKED}
    model.compile(backend=tgvkv_backend(CODES.budget, kv_dtype=CODES.kv_dtype, lowering="eager"))
    found["codes"] = _plain(run(model, INPUTS, STEPS, forced=forced))
    return found


def kept_by(model: Any, ranking: Any) -> Any:
    """Which positions each layer of each sample keeps of the prompt."""
    model.compile(backend=tgvkv_backend(CONFIG.budget, ranking=ranking, lowering="eager"))
    return run(model, INPUTS, 0).kept


def _plain(trace: Trace) -> dict[str, Any]:
    rows: dict[str, list[Tensor]] = {"logits": trace.logits, "tokens": trace.tokens}
    return {"kept": trace.kept, **{name: [row.tolist() for row in value] for name, value in rows.items()}}
