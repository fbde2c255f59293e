"""What a family is: a tiny model from a config, and what its processor would give for an image or a video."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import transformers
from torch import Tensor

PAD, BOS = 0, 1
FIRST_TEXT, LAST_TEXT = 3, 79
OPEN, CLOSE, ROW, COLUMN, FAKE = 80, 81, 82, 83, 84
"""Markers around images: text, as far as eviction is concerned."""
IMAGE, VIDEO = 90, 91
VOCABULARY = 96
HIDDEN = 32

Kind = Literal["image", "video"]
KINDS: dict[Kind, int] = {"image": 1, "video": 2}
Media = dict[str, Tensor]
"""The tensors of one image or video, each with a leading dimension of one or more that a batch joins."""


def joined(samples: list[list[Media]]) -> Media:
    """Tensors of all images of the batch, one after the other."""
    flat = [media for sample in samples for media in sample]
    return {name: torch.cat([media[name] for media in flat]) for name in flat[0]} if flat else {}


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        model: Name of the class in transformers.
        config: Makes its config.
        media: Per kind, makes the tensors of one image or video.
        layout: Per kind, the tokens that stand for one of them, from how many features the model makes of it.
        join: Per kind, how a batch joins the tensors: per sample, those of its images.
        token_types: Makes the input that tells vision from text, for processors that give one, of the kind of each token
            (text 0, image 1, video 2).
        seed: Of weights and inputs.
    """

    model: str
    config: Callable[[], Any]
    media: Mapping[Kind, Callable[[torch.Generator], Media]]
    layout: Mapping[Kind, Callable[[int, Media], list[int]]]
    join: Callable[[list[list[Media]]], Media] = joined
    token_types: Callable[[Tensor], Media] | None = None
    seed: int = 0


def make_model(family: Family) -> Any:
    """The family's model in float32 on the CPU, in eval mode, with seeded weights; it generates until it is stopped.

    Queries and keys are scaled differently in each layer, so that attention is skewed and layers differ in how much they
    look at vision: with the usual initialisation every budget would come out alike.
    """
    generator = torch.Generator().manual_seed(family.seed)
    with torch.random.fork_rng():
        torch.manual_seed(family.seed)
        model = getattr(transformers, family.model)(family.config()).eval()
    sharpness = 0.8 + 1.6 * torch.rand(16, generator=generator)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            fill(name, parameter, sharpness, generator)
    model.requires_grad_(False)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


def fill(name: str, parameter: Tensor, sharpness: Tensor, generator: torch.Generator) -> None:
    layer = _decoder_layer(name)
    sharp = float(sharpness[layer].sqrt()) if layer is not None else 1.0
    if parameter.dim() > 1:
        noise = torch.randn(parameter.shape, generator=generator)
        fan_in = parameter[0].numel()
        gain = 2.0 * sharp if name.endswith(("q_proj.weight", "k_proj.weight")) else 1.5
        parameter.copy_(noise * (0.5 if "embed_tokens" in name else gain / fan_in**0.5))
    elif name.endswith(("q_norm.weight", "k_norm.weight")) and layer is not None:
        parameter.fill_(sharp * 1.2)


def _decoder_layer(name: str) -> int | None:
    if not any(part in name for part in ("language_model", "text_model")) or "layers." not in name or "vision" in name:
        return None
    return int(name.split("layers.")[1].split(".")[0])


Prompt = tuple[int | Kind | tuple[Kind, int], ...]
"""Numbers of text tokens, and the images and videos between them: `(5, "image", 9)`; `("image", 2)` is one of the second
other size that the family takes (`media.OTHER_SIZES`)."""


def make_inputs(
    family: Family, model: Any, prompts: tuple[Prompt, ...], *, seed: int | None = None, others: Mapping[Any, Any] = {}
) -> dict[str, Tensor]:
    """A batch padded on the left, as the family's processor would give it.

    Args:
        family: The family.
        model: Its model: it is asked how many features it makes of an image.
        prompts: One per sample.
        seed: Of tokens and pictures; the family's by default.
        others: What makes pictures of other sizes (`media.OTHER_SIZES`).
    """
    rows: list[list[int]] = []
    kinds: list[list[int]] = []
    media: dict[Kind, list[list[Media]]] = {"image": [], "video": []}
    for index, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(1000 * (family.seed if seed is None else seed) + index)
        row: list[int] = []
        kind: list[int] = []
        for of_sample in media.values():
            of_sample.append([])
        for part in prompt:
            if isinstance(part, int):
                row += torch.randint(FIRST_TEXT, LAST_TEXT, (part,), generator=generator).tolist()
            else:
                part, size = (part, 0) if isinstance(part, str) else part
                makes = (family.media[part], *others.get(family.media[part], ()))
                made = makes[size % len(makes)](generator)
                media[part][-1].append(made)
                stands = family.layout[part](count_features(family, model, part, made), made)
                row += stands
                kind += [0] * (len(row) - len(stands) - len(kind))
                kind += [KINDS[part] if token in (IMAGE, VIDEO) else 0 for token in stands]
        rows.append(row)
        kinds.append(kind + [0] * (len(row) - len(kind)))
    length = max(len(row) for row in rows)
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    inputs = {"input_ids": ids, "attention_mask": mask}
    if family.token_types is not None:
        inputs.update(family.token_types(torch.tensor([[0] * (length - len(kind)) + kind for kind in kinds])))
    for of_kind in media.values():
        inputs.update(family.join(of_kind))
    return inputs


@torch.no_grad()
def count_features(family: Family, model: Any, kind: Kind, media: Media) -> int:
    """How many placeholders an image or video takes."""
    encode = getattr(model.base_model, f"get_{kind}_features")
    # Older transformers call the pixels of a video `pixel_values`, too.
    known = inspect.signature(encode).parameters
    rename = {"pixel_values_videos": "pixel_values"} if "pixel_values_videos" not in known and "pixel_values" in known else {}
    given = {rename.get(name, name): value for name, value in family.join([[media]]).items()}
    output = encode(**given, return_dict=True)
    features = output.last_hidden_state if output.pooler_output is None else output.pooler_output
    parts = [features] if isinstance(features, Tensor) else features
    return sum(part.shape[:-1].numel() for part in parts)
