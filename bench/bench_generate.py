"""Prefill and decode of one request: full KV under `torch.compile`, against this backend at several budgets.

A random LLaVA (weights do not matter for time), one picture of 48 x 48 patches, one process, contenders interleaved round by
round; medians and ratios. Writes JSON with versions and machine.

    python bench/bench_generate.py --json docs/benchmarks/generate-cpu.json
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import tgvkv_compile

CONTENDERS: dict[str, dict[str, Any] | None] = {
    "full KV, torch.compile": None,
    "tgvkv 0.20": {"budget": 0.20},
    "tgvkv 0.05": {"budget": 0.05},
}
IMAGE_TOKEN = 999


def make_model(layers: int, hidden: int) -> torch.nn.Module:
    """The same random model each time."""
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
            **{"image_size": 672, "patch_size": 14, "projection_dim": 64},
        },
        text_config={
            "model_type": "llama",
            **{"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers},
            **{"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 128, "vocab_size": 1000},
            **{"max_position_embeddings": 8192, "eos_token_id": None},
        },
        image_token_index=IMAGE_TOKEN,
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


def make_inputs() -> dict[str, torch.Tensor]:
    """A system prompt, one picture, a question."""
    torch.manual_seed(1)
    text = torch.randint(3, 900, (1, 60))
    image = torch.full((1, 48 * 48), IMAGE_TOKEN)
    ids = torch.cat([text[:, :20], image, text[:, 20:]], dim=1)
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 672, 672)}


@torch.no_grad()
def run(model: torch.nn.Module, inputs: dict[str, torch.Tensor], steps: int) -> dict[str, float]:
    """One request by hand: times of the prefill and of a decode step, and what the cache holds."""
    features = model.get_image_features(inputs["pixel_values"], return_dict=True)  # as generate does, outside the graph
    embeds = {"mm_encoder_outputs": {"image": features}}
    start = time.perf_counter()
    out = model(input_ids=inputs["input_ids"], use_cache=True, logits_to_keep=1, **embeds)
    prefill = time.perf_counter() - start
    cache, token, times = out.past_key_values, out.logits[:, -1:].argmax(-1), []
    position = inputs["input_ids"].shape[1]
    for step in range(steps):
        start = time.perf_counter()
        out = model(
            input_ids=token,
            past_key_values=cache,
            position_ids=torch.tensor([[position + step]]),
            use_cache=True,
            logits_to_keep=1,
        )
        times.append(time.perf_counter() - start)
        token = out.logits[:, -1:].argmax(-1)
    report = tgvkv_compile.inspect_cache(cache)
    return {
        "prefill_ms": prefill * 1e3,
        "step_ms": statistics.median(times) * 1e3,
        "kv_bytes": report.physical_bytes,
        "full_kv_bytes": report.logical_bytes,
    }


def main() -> None:
    """Runs the benchmark and prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    inputs = make_inputs()
    models = {}
    for name, options in CONTENDERS.items():
        model = make_model(args.layers, args.hidden)
        backend = "inductor" if options is None else tgvkv_compile.tgvkv_backend(**options)
        model.compile(backend=backend)
        run(model, inputs, 2)  # compiles
        run(model, inputs, 3)
        models[name] = model
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    for _ in range(args.rounds):
        for name, model in models.items():
            rounds[name].append(run(model, inputs, args.steps))
    medians = {
        name: {key: statistics.median(result[key] for result in results) for key in results[0]}
        for name, results in rounds.items()
    }
    base = medians["full KV, torch.compile"]
    for name, row in medians.items():
        row["step_vs_full"] = row["step_ms"] / base["step_ms"]
        row["prefill_vs_full"] = row["prefill_ms"] / base["prefill_ms"]
        sys.stdout.write(
            f"{name:24s} prefill {row['prefill_ms']:8.1f} ms ({row['prefill_vs_full']:.2f} x)  "
            f"step {row['step_ms']:7.2f} ms ({row['step_vs_full']:.2f} x)  "
            f"KV {row['kv_bytes'] / 2**20:6.2f} of {row['full_kv_bytes'] / 2**20:.2f} MiB\n"
        )
    record = {
        "command": " ".join(["python", "bench/bench_generate.py", *sys.argv[1:]]),
        "setting": {
            **{"layers": args.layers, "hidden": args.hidden, "prompt_tokens": inputs["input_ids"].shape[1]},
            **{"steps": args.steps, "rounds": args.rounds, "dtype": "float32", "batch": 1},
        },
        "machine": {
            **{"processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
            **{"system": platform.platform(), "python": platform.python_version()},
        },
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "medians": medians,
        "rounds": rounds,
    }
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
