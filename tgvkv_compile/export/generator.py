"""Greedy generation over a prefill and a decode engine: what all runtimes share."""

import abc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tgvkv_compile.errors import CacheError, ConfigError, PaddingError
from tgvkv_compile.export.manifest import PROMPT, Manifest, TensorSpec
from tgvkv_compile.export.trace.families import FEATURES, GRID, IDS, MASK, PIXELS, POSITIONS
from tgvkv_compile.export.trace.lengths import question_lengths
from tgvkv_compile.export.trace.positions import picture_positions

_UNUSED = ("mm_token_type_ids", "token_type_ids")  # what processors give and no engine reads


class Generator(abc.ABC):
    """Runs an exported model. It holds the cache of one request at a time; a new request begins with a new one.

    Attributes:
        manifest: What the engines take.
    """

    def __init__(self, directory: str | Path) -> None:
        self.folder = Path(directory)
        self.manifest = Manifest.read(self.folder)
        self._taken: int | None = None  # decode steps since the prefill

    def prefill(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Takes a prompt in; a cache of an earlier one is given up.

        Args:
            inputs: What `checked` gives.

        Returns:
            float32 `[B, vocabulary]` on the CPU: the logits behind the last token.
        """
        self._taken = None
        logits = self._run_prefill(inputs)
        self._taken = 0
        return logits.to("cpu", torch.float32)

    def decode(self, token: Tensor, position: Tensor) -> Tensor:
        """One step on the cache.

        Args:
            token: int64 `[B, 1]`.
            position: int64 `[B, 1]`, its rotary position.

        Returns:
            float32 `[B, vocabulary]` on the CPU.

        Raises:
            CacheError: There was no prefill, or more steps than the engines have room for.
        """
        if self._taken is None:
            raise CacheError("decode without a prefill: there is no cache yet")
        if self._taken >= self.manifest.plan.max_new_tokens:
            raise CacheError(
                f"{self._taken} decode steps were taken, the engines have room for no more; export with more max_new_tokens"
            )
        logits = self._run_decode(token, position, self._taken)
        self._taken += 1
        return logits.to("cpu", torch.float32)

    @abc.abstractmethod
    def _run_prefill(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The logits of the prefill; the cache is kept."""

    @abc.abstractmethod
    def _run_decode(self, token: Tensor, position: Tensor, taken: int) -> Tensor:
        """The logits of a step, the one after `taken` others; the cache is kept."""

    @abc.abstractmethod
    def encode(self, pixels: Tensor) -> dict[str, Tensor]:
        """Runs the vision encoder, where there is one.

        Args:
            pixels: As the manifest's `vision` takes them.

        Returns:
            The features, by the names of the prefill's inputs.
        """

    @abc.abstractmethod
    def slot_positions(self) -> tuple[Tensor, ...]:
        """int64 `[B, C]` per layer: which position each slot of the cache holds, -1 where it is free."""

    def kept_positions(self, layer: int, sample: int = 0) -> Tensor:
        """Sorted int64 `[n]`: the positions (padding not counted) that the next step of a sample can attend to in a layer."""
        found = self.slot_positions()[layer][sample]
        return found[found >= 0].sort().values

    def generate(
        self,
        *,
        max_new_tokens: int | None = None,
        do_sample: bool = False,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Answers greedily, as `model.generate(**inputs, do_sample=False)` of transformers does.

        Args:
            max_new_tokens: At most so many; by default, and at most, what the engines were exported for.
            do_sample: Only False: engines give logits, and this loop takes the best.
            eos_token_id: What ends an answer, in place of what the manifest says.
            pad_token_id: What stands behind an answer that ended, alike.
            **inputs: What the processor made, as tensors: `input_ids [B, N]`, `attention_mask [B, N]` (padding on the left) and
                pictures; for families whose engines take them encoded, what `export.encode` gives.

        Returns:
            int64 `[B, N + new]`: prompt and answer.

        Raises:
            ConfigError: An input or option does not suit the engines.
            PaddingError: The prompt is padded on the right.
        """
        if do_sample:
            raise ConfigError(
                "do_sample=True: engines are run greedily; give do_sample=False, or sample from prefill and decode"
            )
        most = self.manifest.plan.max_new_tokens
        count = most if max_new_tokens is None else max_new_tokens
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= most:
            raise ConfigError(
                f"max_new_tokens={count!r} must be an int from 1 to {most}, for which the engines have room; export again with "
                "more max_new_tokens"
            )
        prompt, given = inputs.get(IDS), self.checked(inputs)
        ends = torch.tensor(self._ends(eos_token_id), dtype=torch.int64)
        pad = self.manifest.pad_token_id if pad_token_id is None else pad_token_id
        position = self._next_position(given)
        token = self.prefill(given).argmax(1)
        tokens, finished = [token], torch.isin(token, ends)
        while len(tokens) < count and not bool(finished.all()):
            logits = self.decode(token[:, None], position[:, None])
            token = torch.where(finished, pad, logits.argmax(1))
            tokens.append(token)
            finished |= torch.isin(token, ends)
            position = position + 1
        return torch.cat([torch.as_tensor(prompt), torch.stack(tokens, dim=1)], dim=1)

    def _ends(self, given: int | list[int] | None) -> list[int]:
        if given is None:
            return list(self.manifest.eos_token_ids)
        return given if isinstance(given, list) else [given]

    def _next_position(self, given: Mapping[str, Tensor]) -> Tensor:
        """int64 `[B]`: the rotary position of the first new token."""
        valid = given[MASK] != 0
        if POSITIONS not in given:
            return valid.sum(1)
        return torch.where(valid, given[POSITIONS], -1).amax(dim=(0, 2)) + 1

    def checked(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """The inputs of the prefill, of what a user gives.

        Raises:
            ConfigError: One is missing, unknown, of the wrong shape, or has other pictures than the engines were made for.
            PaddingError: The prompt is padded on the right.
        """
        known = {spec.name: spec for spec in self.manifest.prefill.inputs}
        tensors = {name: torch.as_tensor(value) for name, value in inputs.items() if value is not None}
        self._check_constants(tensors)
        self._encode_pictures(tensors)
        unknown = sorted(set(tensors) - set(known) - set(self.manifest.constants) - set(_UNUSED))
        if unknown:
            raise ConfigError(f"these engines take no {', '.join(unknown)}; they take {', '.join(known)}. {self._encoding()}")
        if IDS not in tensors:
            raise ConfigError(f"there are no {IDS}; give what the processor makes")
        tensors.setdefault(MASK, torch.ones_like(tensors[IDS]))
        missing = [name for name in known if name not in tensors]
        if missing:
            raise ConfigError(f"{', '.join(missing)} missing; these engines take {', '.join(known)}. {self._encoding()}")
        given = {name: tensors[name] for name in known}
        if POSITIONS in given:
            given[POSITIONS] = given[POSITIONS][-self.manifest.position_rows :]
        self._check_prompt(given)
        given = self.manifest.prompt_lengths.pad(given)
        length = given[IDS].shape[1]
        return {name: self._shaped(given[name], spec, length) for name, spec in known.items()}

    def _check_constants(self, tensors: Mapping[str, Tensor]) -> None:
        for name, values in self.manifest.constants.items():
            if name in tensors and tensors[name].tolist() != values:
                raise ConfigError(f"{name}={tensors[name].tolist()} is part of the engines, as {values}; export for this size")

    def _encode_pictures(self, tensors: dict[str, Tensor]) -> None:
        """Pictures become features, and get positions, where the prefill takes them so and there is an encoder."""
        manifest = self.manifest
        if manifest.vision is None or PIXELS not in tensors or FEATURES in tensors or IDS not in tensors:
            return
        tensors.update(self.encode(self._shaped(tensors.pop(PIXELS), manifest.vision.inputs[0])))
        if POSITIONS not in tensors:
            mask = tensors.get(MASK, torch.ones_like(tensors[IDS]))
            grids = manifest.constants[GRID]
            tensors[POSITIONS] = picture_positions(tensors[IDS], mask, manifest.vision_token_ids, grids, manifest.merge)

    def _shaped(self, tensor: Tensor, spec: TensorSpec, length: int = 0) -> Tensor:
        expected = tuple(length if size == PROMPT else size for size in spec.shape)
        if tuple(tensor.shape) != expected:
            raise ConfigError(f"{spec.name} has the shape {tuple(tensor.shape)}, the engines take {expected}")
        return tensor.to(getattr(torch, spec.dtype))

    def _encoding(self) -> str:
        return "tgvkv_compile.export.encode(model, inputs) makes them of pictures" if self.manifest.position_rows else ""

    def _check_prompt(self, given: Mapping[str, Tensor]) -> None:
        manifest, ids, valid = self.manifest, given[IDS], given[MASK] != 0
        batch, length = ids.shape
        if batch != manifest.batch_size:
            raise ConfigError(f"{batch} samples; the engines are for a batch of {manifest.batch_size}: export for this one")
        if length > manifest.max_prompt:
            raise ConfigError(
                f"the prompt has {length} tokens, the engines take {manifest.max_prompt}; export with "
                f"max_prompt={length} or more"
            )
        if not bool(valid[:, -1].all()) or bool((valid[:, :-1] & ~valid[:, 1:]).any()):
            raise PaddingError("the prompt is padded on the right; use padding_side='left'")
        vision = torch.isin(ids, torch.tensor(manifest.vision_token_ids)) & valid
        if int(vision.sum()) != manifest.vision_tokens:
            raise ConfigError(
                f"the prompts hold {int(vision.sum())} vision tokens, the engines are for {manifest.vision_tokens}: as many "
                "pictures, of the same size, as the sample that was exported"
            )
        longest = int(question_lengths(ids, given[MASK], manifest.vision_token_ids).max())
        if longest > manifest.max_question:
            raise ConfigError(
                f"{longest} tokens stand behind the last picture, the engines take {manifest.max_question}; export with "
                f"max_question={longest} or more"
            )
