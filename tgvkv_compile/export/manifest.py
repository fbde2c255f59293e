"""What an exported model is and takes: everything that whoever runs its engines must know."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch

from tgvkv_compile.config import check_count
from tgvkv_compile.errors import ConfigError
from tgvkv_compile.export.capacity.budget_plan import BudgetPlan
from tgvkv_compile.export.records import read_json, record_of
from tgvkv_compile.export.trace.lengths import PromptLengths

MANIFEST = "manifest.json"
PROMPT = "prompt"
"""How a shape names the dimension that is as long as the prompt."""
_FORMAT = "tgvkv-export-1"


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """An input or output of an engine.

    Attributes:
        name: Its name.
        shape: Ints, and `"prompt"` where it is as long as the prompt.
        dtype: As torch names it: `"float32"`, `"int64"`, ...
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class Engine:
    """One of the two engines: its file's name, once there is one, its inputs and its outputs, in order."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """An exported model.

    Attributes:
        model_type: transformers' name of the architecture.
        batch_size: B.
        prompt_lengths: What the prefill takes; the longest prompt stands in the plan.
        max_question: The most tokens behind a sample's last picture.
        vision_tokens: How many vision tokens the prompts of a batch have together: a row of features for each.
        vision_token_ids: Tokens that stand for them.
        position_rows: Rows of the rotary positions that are given; 0 where they follow from the mask.
        constants: Inputs of the model that are part of the engines, and their values.
        merge: Patches along a side of what becomes one vision token, where positions are given; else 1.
        eos_token_ids: Tokens that end an answer.
        pad_token_id: What stands behind the end of an answer that is shorter than others of its batch.
        plan: Capacities and eviction options; the longest prompt and the most decode steps.
        prefill: `(tokens, mask, pictures) -> (logits [B, vocabulary], compact cache)`.
        decode: `(token, position, compact cache) -> (logits [B, vocabulary], compact cache)`.
        versions: Of the packages that made it.
        vision: `(pixel_values) -> (image_features, ...)`, of families that take pictures encoded, if it was exported.
    """

    model_type: str
    batch_size: int
    prompt_lengths: PromptLengths
    max_question: int
    vision_tokens: int
    vision_token_ids: tuple[int, ...]
    position_rows: int
    constants: dict[str, list[Any]]
    merge: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    plan: BudgetPlan
    prefill: Engine
    decode: Engine
    versions: dict[str, str]
    vision: Engine | None = None

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("max_question", 1), ("vision_tokens", 0), ("position_rows", 0), ("merge", 1)):
            check_count(name, getattr(self, name), minimum=least)

    @property
    def engines(self) -> dict[str, Engine]:
        """Those that there are, by name: `prefill`, `decode`, and `vision` for some families."""
        named = {"prefill": self.prefill, "decode": self.decode, "vision": self.vision}
        return {name: engine for name, engine in named.items() if engine is not None}

    @property
    def max_prompt(self) -> int:
        """The most tokens of a prompt."""
        return self.plan.max_prompt

    def cache_bytes(self) -> int:
        """What the compact cache occupies between two steps, slot positions included: fixed by the plan."""
        of_cache = ("key_", "value_", "slot_position_")
        return sum(_bytes(spec) for spec in self.decode.inputs if spec.name.startswith(of_cache))

    def full_bytes(self) -> int:
        """What keys and values of the longest prompt and answer would occupy without eviction."""
        tokens = self.plan.max_prompt + self.plan.max_new_tokens
        specs = [spec for spec in self.decode.inputs if spec.name.startswith(("key_", "value_"))]
        return sum(_bytes(dataclasses.replace(spec, shape=(*spec.shape[:2], tokens, spec.shape[3]))) for spec in specs)

    def write(self, folder: Path) -> None:
        """Writes `manifest.json`."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        text = {"format": _FORMAT, **fields, "plan": json.loads(self.plan.to_json())}
        for name in ("prefill", "decode", "prompt_lengths"):
            text[name] = dataclasses.asdict(fields[name])
        text["vision"] = None if self.vision is None else dataclasses.asdict(self.vision)
        (folder / MANIFEST).write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Reads what `write` wrote.

        Raises:
            ConfigError: There is none, it is not of this version, or what it says cannot be.
        """
        path = folder / MANIFEST
        read = read_json(path, written_by="export_onnx or export_tensorrt")
        if not isinstance(read, dict) or read.pop("format", None) != _FORMAT:
            raise ConfigError(f"{path} is not of the format {_FORMAT!r}; export the model again with this version")
        try:
            plan = BudgetPlan.from_json(json.dumps(read.pop("plan", None)))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        manifest = record_of(cls, read, str(path), {"plan": plan})
        wrong = manifest._contradiction()
        if wrong is not None:
            raise ConfigError(f"{path}: {wrong}; export the model again")
        return manifest

    def _contradiction(self) -> str | None:
        """What does not go together, or cannot be; None where all of it can."""
        for name, engine in self.engines.items():
            if not engine.file or Path(engine.file).name != engine.file:
                return f"{name} has file={engine.file!r}, which names no file in this folder"
            for spec in (*engine.inputs, *engine.outputs):
                if not isinstance(getattr(torch, spec.dtype, None), torch.dtype):
                    return f"{spec.name} of {name} has dtype={spec.dtype!r}, which is none"
        taken = [spec.name for spec in self.decode.inputs]
        keys = [name for name in taken if name.startswith("key_")]
        if len(keys) != self.plan.num_layers:
            return f"decode takes keys of {len(keys)} layers, the plan has capacities for {self.plan.num_layers}"
        for layer, capacity in enumerate(self.plan.capacities):
            slots = next(
                (spec.shape[2] for spec in self.decode.inputs if spec.name == f"key_{layer}" and len(spec.shape) == 4), None
            )
            if slots != capacity:
                return f"key_{layer} of decode has {slots} slots, the plan has {capacity}"
        return None


def _bytes(spec: TensorSpec) -> int:
    return math.prod(int(length) for length in spec.shape) * int(getattr(torch, spec.dtype).itemsize)
