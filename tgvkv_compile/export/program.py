"""A model as two exported programs: prefill and decode, with eviction inside and static shapes."""

import contextlib
import dataclasses
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from tgvkv_compile.backend.wrappers import module_of
from tgvkv_compile.config import check_count, read_eviction
from tgvkv_compile.errors import ConfigError, UnsupportedGraphError
from tgvkv_compile.export.capacity.budget_plan import BudgetPlan, check_exportable
from tgvkv_compile.export.capacity.calibrate import calibrate
from tgvkv_compile.export.manifest import PROMPT, Engine, Manifest, TensorSpec
from tgvkv_compile.export.trace.families import IDS, MASK, PIXELS, Family, constants_of, engine_inputs, family_of
from tgvkv_compile.export.trace.lengths import PromptLengths, prompt_dim, question_lengths
from tgvkv_compile.export.trace.rewritten import exported, rewrite_decode, rewrite_prefill
from tgvkv_compile.export.trace.suitable import check_dtypes, check_implementation
from tgvkv_compile.export.trace.traced import traced_decode, traced_prefill
from tgvkv_compile.export.trace.vision import traced_vision
from tgvkv_compile.fx.dump import Dumper
from tgvkv_compile.fx.meta import fake_tensor, output_nodes
from tgvkv_compile.ops.static.prefill import block_count

Say = Callable[[str], None]
_LEAST_QUESTION = 256  # the question's rows are walked twice, as many as it may have: not all of a long prompt
_VISION_TOKENS = ("image_token_id", "image_token_index")


@dataclasses.dataclass(frozen=True)
class Programs:
    """`prefill, decode = export_program(...)`, and what goes with them.

    Attributes:
        prefill: `(input_ids, attention_mask, pictures ...) -> (logits, key_0, value_0, slot_position_0, ..., protect_from,
            keep_rate, lengths)`.
        decode: `(token, position, key_0, ..., lengths) -> (logits, key_0, ..., protect_from, lengths)`; `keep_rate` stays.
        manifest: What they take.
        vision: `(pixel_values) -> (image_features, ...)`, of families that take pictures encoded, if it can be traced.
        prefill_inputs: The sample's inputs of `prefill`, in order.
        decode_inputs: Empty inputs of `decode`, in order.
        vision_inputs: The sample's inputs of `vision`.
    """

    prefill: torch.export.ExportedProgram
    decode: torch.export.ExportedProgram
    manifest: Manifest
    prefill_inputs: tuple[Tensor, ...]
    decode_inputs: tuple[Tensor, ...]
    vision: torch.export.ExportedProgram | None = None
    vision_inputs: tuple[Tensor, ...] = ()

    def __iter__(self) -> Iterator[torch.export.ExportedProgram]:
        yield self.prefill
        yield self.decode

    @property
    def plan(self) -> BudgetPlan:
        """The capacities."""
        return self.manifest.plan


def export_program(
    model: Any,
    sample_inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    budget: float | int | None = None,
    max_new_tokens: int = 128,
    plan: BudgetPlan | None = None,
    *,
    max_prompt: int | None = None,
    max_question: int | None = None,
    fixed_prompt: bool = False,
    slack: float = 0.25,
    dump_graphs: str | None = None,
    say: Say | None = None,
    **eviction: Any,
) -> Programs:
    """Exports a model as prefill and decode. The model stays as it is.

    Batch size and number of vision tokens are the sample's; the length of a prompt is free up to the longest.

    Args:
        model: A transformers model of a family that can be exported (`export.trace.families`); it may be compiled.
        sample_inputs: What the processor makes of a prompt with pictures; of several, the first is traced and all are
            calibrated on.
        budget: As for `tgvkv_backend`.
        max_new_tokens: The most decode steps.
        plan: Capacities; by default `calibrate` makes them of the samples. It brings budget, eviction options, longest prompt
            and decode steps: give none of these beside it.
        max_prompt: The longest prompt in tokens; the longest sample's by default.
        max_question: The most tokens behind the last picture; by default twice as many as the samples have, and at least 256.
        fixed_prompt: All prompts are padded to the longest one, for targets without dynamic shapes.
        slack: As for `calibrate`.
        dump_graphs: Folder for readable graphs before and after each pass.
        say: Told what is being done.
        **eviction: The other fields of `EvictionConfig`; functions of one's own cannot be exported.

    Returns:
        The programs; unpacks into prefill and decode.

    Raises:
        ConfigError: An option is out of range, a sample lacks something, or engines lack the weights' dtype or the attention.
        UnsupportedGraphError: The model cannot be exported.
    """
    say = say or (lambda _: None)
    check_exportable(read_eviction(budget, eviction, where="export"))
    model = module_of(model)
    if model.training:
        raise ConfigError(f"{type(model).__name__} is in training mode; call model.eval() first")
    family = family_of(model)
    check_dtypes(model)
    check_implementation(model)
    samples = [sample_inputs] if isinstance(sample_inputs, Mapping) else list(sample_inputs)
    if plan is None:
        say("calibrating: what the layers want of the samples")
        plan = calibrate(model, samples, budget, max_new_tokens=max_new_tokens, slack=slack, max_prompt=max_prompt, **eviction)
    elif max_prompt is not None:
        raise ConfigError(f"max_prompt={max_prompt} and a plan were given; the plan says {plan.max_prompt}: give one of them")
    inputs = engine_inputs(model, family, samples[0])
    constants = constants_of(family, samples[0])
    facts = _facts(model, family, inputs, constants)
    if max_question is None:
        asked = [question_lengths(s[IDS], s.get(MASK, torch.ones_like(s[IDS])), facts["vision_token_ids"]) for s in samples]
        max_question = min(plan.max_prompt, max(_LEAST_QUESTION, 2 * int(torch.cat(asked).max())))
    check_count("max_question", max_question, minimum=1)
    heads = model.config.get_text_config().num_attention_heads
    blocks = block_count(inputs[IDS].shape[0], heads, plan.max_prompt)
    lengths = PromptLengths.up_to(plan.max_prompt, blocks, fixed=fixed_prompt)
    _check_length(inputs[IDS].shape[1], plan)
    inputs = lengths.pad(inputs)
    free = lengths.dimension()
    shapes = [None if free is None or (dim := prompt_dim(name)) is None else {dim: free} for name in inputs]
    say("tracing the prefill")
    prefill = traced_prefill(model, family, inputs, constants, shapes)
    _, *entries = (fake_tensor(node) for node in output_nodes(prefill))
    say("tracing a decode step")
    step, step_inputs = traced_decode(model, family, entries)
    say("rewriting both")
    dumper = Dumper(dump_graphs)
    rewrite_prefill(prefill, list(inputs.values()), plan, blocks, max_question, dumper)
    state = rewrite_decode(step, step_inputs, plan, dumper)
    decode_inputs = dict(zip(("token", "position"), step_inputs, strict=False), **state)
    say("exporting the prefill")
    prefill_program = exported(prefill, list(inputs.values()), shapes)
    if free is not None:
        _check_free(prefill_program)
    say("exporting the decode step")
    decode_program = exported(step, list(decode_inputs.values()), None)
    names = list(state)
    manifest = Manifest(
        **facts,
        prompt_lengths=lengths,
        max_question=max_question,
        plan=plan,
        prefill=Engine("", _inputs(inputs, free is not None), _outputs(prefill_program, names)),
        decode=Engine("", _inputs(decode_inputs, False), _outputs(decode_program, [n for n in names if n != "keep_rate"])),
        versions=versions(),
    )
    programs = Programs(prefill_program, decode_program, manifest, tuple(inputs.values()), tuple(decode_inputs.values()))
    if family.from_features and isinstance(samples[0].get(PIXELS), Tensor):
        programs = _with_vision(programs, model, samples[0], say)
    return programs


def _with_vision(programs: Programs, model: Any, sample: Mapping[str, Any], say: Say) -> Programs:
    """The encoder beside them; without it pictures are given encoded, so that it may fail."""
    say("exporting the vision encoder")
    try:
        program, features = traced_vision(model, sample)
    except UnsupportedGraphError as error:
        say(f"no vision encoder: {str(error).splitlines()[0]}")
        return programs
    outputs = tuple(TensorSpec(name, tuple(tensor.shape), _dtype(tensor)) for name, tensor in features.items())
    engine = Engine("", _inputs({PIXELS: sample[PIXELS]}, False), tuple(outputs))
    manifest = dataclasses.replace(programs.manifest, vision=engine)
    return dataclasses.replace(programs, manifest=manifest, vision=program, vision_inputs=(sample[PIXELS],))


def versions() -> dict[str, str]:
    """Of the packages that an export depends on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in ("tgvkv-compile", "torch", "transformers", "onnx", "onnxscript", "torch-tensorrt"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _check_free(program: torch.export.ExportedProgram) -> None:
    """Raises where `torch.export` has made the length of a prompt a constant."""
    names = program.graph_signature.user_inputs
    ids = next(node for node in program.graph.find_nodes(op="placeholder") if node.name == names[0])
    if isinstance(fake_tensor(ids).shape[1], int):
        raise UnsupportedGraphError(
            "torch.export takes the length of the prompt for a constant; give fixed_prompt=True, or a newer torch"
        )


def _check_length(length: int, plan: BudgetPlan) -> None:
    if length > plan.max_prompt:
        raise ConfigError(
            f"the sample's prompt has {length} tokens, the plan is for {plan.max_prompt} at most; give a shorter sample, or a "
            "plan with another max_prompt"
        )


def _facts(model: Any, family: Family, inputs: Mapping[str, Tensor], constants: dict[str, list[Any]]) -> dict[str, Any]:
    generation = model.generation_config
    eos = generation.eos_token_id
    ends = tuple(eos) if isinstance(eos, (list, tuple)) else () if eos is None else (int(eos),)
    pad = generation.pad_token_id
    vision = next(int(found) for name in _VISION_TOKENS if (found := getattr(model.config, name, None)) is not None)
    return {
        "model_type": model.config.model_type,
        "batch_size": inputs[IDS].shape[0],
        "vision_tokens": int(((inputs[IDS] == vision) & (inputs[MASK] != 0)).sum()),
        "vision_token_ids": (vision,),
        "position_rows": family.position_rows,
        "constants": constants,
        "merge": model.config.vision_config.spatial_merge_size if family.from_features else 1,
        "eos_token_ids": ends,
        "pad_token_id": int(pad) if pad is not None else ends[0] if ends else 0,
    }


def _inputs(tensors: Mapping[str, Tensor], free: bool) -> tuple[TensorSpec, ...]:
    specs = []
    for name, tensor in tensors.items():
        shape: list[int | str] = list(tensor.shape)
        if free and (dim := prompt_dim(name)) is not None:
            shape[dim] = PROMPT
        specs.append(TensorSpec(name, tuple(shape), _dtype(tensor)))
    return tuple(specs)


def _outputs(program: torch.export.ExportedProgram, state: Sequence[str]) -> tuple[TensorSpec, ...]:
    """Outputs by the names of the inputs that they become, `next_` in front."""
    values = [fake_tensor(node) for node in output_nodes(program.graph_module)]
    names = ["logits", *(f"next_{name}" for name in state)]
    return tuple(
        TensorSpec(name, tuple(int(length) for length in value.shape), _dtype(value))
        for name, value in zip(names, values, strict=True)
    )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
