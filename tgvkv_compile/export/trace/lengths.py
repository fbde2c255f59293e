"""Which lengths a prefill takes, and padding to them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tgvkv_compile.config import check_count
from tgvkv_compile.export.trace.families import IDS, MASK, POSITIONS

_LEAST_ROWS = 2  # torch.export treats lengths of 0 and 1 apart


@dataclasses.dataclass(frozen=True)
class PromptLengths:
    """Lengths that a prefill takes; every prompt is padded on the left to the next of them.

    Attributes:
        multiple: They are multiples of it: the rows of a prompt are walked in so many blocks of the same length.
        least: The shortest.
        most: The longest; the same as `least` where the length is fixed.
    """

    multiple: int
    least: int
    most: int

    def __post_init__(self) -> None:
        check_count("multiple", self.multiple, minimum=1)
        check_count("least", self.least, minimum=1)
        check_count("most", self.most, minimum=self.least)

    @classmethod
    def up_to(cls, max_prompt: int, blocks: int, *, fixed: bool) -> "PromptLengths":
        """For prompts of 1 to `max_prompt` tokens."""
        most = blocks * max(_LEAST_ROWS, -(-max_prompt // blocks))
        return cls(blocks, most if fixed else blocks * _LEAST_ROWS, most)

    @property
    def fixed(self) -> bool:
        """Whether there is one length only."""
        return self.least == self.most

    def dimension(self) -> Any:
        """As `torch.export` takes it; None where it is fixed.

        `AUTO` where every length will do: torch 2.11 cannot prove the guards of a named dimension for all of them.
        """
        if self.fixed:
            return None
        if self.multiple == 1:
            return torch.export.Dim.AUTO(min=self.least, max=self.most)
        return self.multiple * torch.export.Dim("rows", min=self.least // self.multiple, max=self.most // self.multiple)

    def pad(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inputs of a prefill, padded on the left to the next length."""
        length = inputs[IDS].shape[1]
        wanted = max(self.least, -(-length // self.multiple) * self.multiple)
        made = dict(inputs)
        for name, tensor in inputs.items():
            if prompt_dim(name) is not None and wanted > length:
                made[name] = torch.nn.functional.pad(tensor, (wanted - length, 0))
        return made


def question_lengths(ids: Tensor, mask: Tensor, vision_token_ids: Sequence[int]) -> Tensor:
    """int64 `[B]`: tokens behind each sample's last picture, 0 where it has none.

    Args:
        ids: int64 `[B, N]`.
        mask: `[B, N]`, 0 at padding.
        vision_token_ids: Tokens that stand for pictures.
    """
    valid = mask != 0
    index = torch.arange(ids.shape[1], device=ids.device)
    vision = torch.isin(ids, torch.tensor(list(vision_token_ids), device=ids.device)) & valid
    last = torch.where(vision, index, -1).amax(1, keepdim=True)
    return torch.where(last >= 0, valid & (index > last), False).sum(1)


def prompt_dim(name: str) -> int | None:
    """Which dimension of a prefill's input is as long as the prompt: its last, or none."""
    return {IDS: 1, MASK: 1, POSITIONS: 2}.get(name)
