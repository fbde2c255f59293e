"""Writes docs/models.md from `models.json`, what the families' tests hold to, and `matrix.json`, what ran on which versions.

A test fails where it is out of date.
"""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

HEAD = """# Models

**Each row of this table is a tiny model with seeded random weights of that family**, in float32 on the CPU with `sdpa`
attention (torch 2.13, transformers 5.24). No released weights and no GPU have run. At a budget of 0.3 kept positions after the
prefill and after every step, logits and tokens equal the oracle's, through stock `generate` and in direct calls. `make docs`
makes this page of `docs/models.json`, which `tests/families/` checks, and of `docs/matrix.json`, what the version matrix gave.

All of that happens in one process, without a reset between (`tests/families/test_sizes.py`): pictures of four sizes where the
family takes them, one to three of them in a sample, videos of three lengths, prompts shorter and longer than 128 tokens, texts,
batches of two, three and four samples, padded and not. The graphs that dynamo makes are counted, and those that are lowered.

- **video**: tried with videos as well.
- **graphs**: compiled for all prompts of one sample and for decoding, through `generate`, whatever comes. Batches add as many
  again, whatever their sizes and padding. Texts alone add dense graphs, no more than `torch.compile` makes of them.
- **direct calls**: the same, of calls that leave positions to the model: there they are no input of the decoder, or one of
  another shape, so these graphs come on top of `generate`'s. A mask of ones changes nothing; one sample that is padded takes
  another prefill and decode graph. What encodes and merges pictures, and finds positions by them, runs uncompiled before.
- **Sliding windows** and chunks: decoding takes a second graph where a prompt is shorter than the window, until it is full.
- **one or many**: no, one and more images in a sample; **batch**: samples of different lengths, padded on the left.
- Where a process begins with a batch, not with a single prompt, families with linear attention take a second decode graph:
  the first is of that batch size alone.
- Every family equals the uncompiled model at budget 1.0 as well, tokens and logits.

| family | images | video | batch | graphs | direct calls | remarks |
| --- | --- | --- | --- | --- | --- | --- |
"""
DECODERS = """
## Merge and decoder

Of these families the tests make the default config small and hand features over in the place of the vision tower's, which is
what the compiler sees through `generate` (transformers 5.23 and later). The batch, the budgets and what is compared are
those above; towers, videos and direct calls are not tried.

| family | graphs |
| --- | --- |
"""
TAIL = """
## Refused

| family | why |
| --- | --- |
| mllama, and others with cross-attention | vision is not among the decoder's own tokens |
| florence2, and other encoder-decoders | the decoder attends across to the encoder's tokens |
| inkling2, kimi_k25, mistral_large4 | attention over compressed or shared keys, which is no call that the passes know |
| step3p7 | a branch on data splits attention from the merge |

The error names the layer and its source line; `on_unsupported="passthrough"` runs such a model uncompressed.

## Not tried

gemma3n and perception_lm (their towers need `timm`), blip_2, instructblip, instructblipvideo, deepseek_ocr2, dots3_note, emu3,
ernie4_5_vl_moe, glm5_next, granite4_vision, granite_docling, hunyuan_vl, molmo2, muse_spark, nemotron_h_omni, qwen4_exp,
unlimited_ocr, and models whose code is not in transformers. They may work: what cannot is refused by the passes, not by name.
"""
VERSIONS = """
## Versions

`make test-matrix` runs the tests on the oldest and newest supported releases, each pair in a virtual environment of its own.
What is skipped needs what the release does not have (a family, an argument) or fails uncompiled too; `docs/matrix.json`
has the reasons, counts and failures. A pair may stand there more than once: the whole suite, parts of it, or what was run again
after the failures were mended.

| transformers | torch | tests | result | passed | failed | skipped | date |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""


def row(name: str, record: dict[str, Any]) -> str:
    """One family."""
    video = "yes" if record["video"] else "-"
    images = "one or many" if record["images"] > 1 else "one"
    batch = "yes" if record["batch"] else "-"
    return _cells(name, images, video, batch, _graphs(record["graphs"]), _graphs(record["direct"]), record["remarks"])


def version(result: dict[str, Any]) -> str:
    """One pair of releases."""
    tests = f"`{shlex.join(result['arguments'])}`" if result["arguments"] else "all"
    counts = [str(result[kind]) for kind in ("passed", "failed", "skipped")]
    return _cells(result["transformers"], result["torch"], tests, result["status"], *counts, result["date"])


def _cells(*cells: str) -> str:
    return f"| {' | '.join(cells)} |\n"


def _graphs(counts: dict[str, int] | None) -> str:
    if counts is None:
        return "-"
    return ", ".join(f"{counts[kind]} {kind}" for kind in ("prefill", "decode"))


def _read(name: str) -> Any:
    return json.loads((Path(__file__).parent / name).read_text(encoding="utf-8"))


def render() -> str:
    """The whole page."""
    records = _read("models.json")
    page = HEAD + "".join(row(name, record) for name, record in records["families"].items())
    page += DECODERS + "".join(_cells(name, _graphs(graphs)) for name, graphs in records["decoders"].items())
    return page + TAIL + VERSIONS + "".join(version(result) for result in _read("matrix.json")["results"])


if __name__ == "__main__":
    target = Path(__file__).parent / "models.md"
    target.write_text(render(), encoding="utf-8")
    sys.stdout.write(f"wrote {target}\n")
