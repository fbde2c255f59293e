"""What people put around a model, and models whose parts are elsewhere.

PEFT is not among the development dependencies: `Peft` and `Tuner` stand in for its `PeftModel` and `LoraModel`, with their
structure (`base_model.model`, `get_base_model()`, attributes of the model inside, a `generate` that calls it).
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import accelerate
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import tgvkv_compile
from tests.backend.test_errors import run_script
from tests.backend.tiny import prefill, prompt, step, tiny_llava
from tests.passes.decoder import Decoder
from tests.support.counting import of_decoder
from tgvkv_compile import explain, tgvkv_backend, warm_up
from tgvkv_compile.backend.wrappers import module_of, module_to_compile
from tgvkv_compile.errors import ConfigError, SplitDecoderError, UnsupportedGraphError
from tgvkv_compile.runtime.logical import LogicalKV


class Tuner(nn.Module):
    """As `peft.tuners.lora.LoraModel`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def inject_adapter(self) -> None: ...

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.model, name)


class Peft(nn.Module):
    """As `peft.PeftModel`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = Tuner(model)

    def get_base_model(self) -> nn.Module:
        return self.base_model.model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.get_base_model()(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.get_base_model().generate(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model, name)


class Engine(nn.Module):
    """As DeepSpeed's, and a user's own: the model is `module`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def parallel(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def sharded(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "peft": Peft,
    "tuner": Tuner,
    "peft in peft": lambda model: Peft(Peft(model)),
    "engine": Engine,
    "ddp": parallel,
    "ddp of peft": lambda model: parallel(Peft(model)),
    "fsdp": sharded,
    "checkpoint": checkpoint_wrapper,
    "accelerate": lambda model: accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model),
}


def generate(model: Any) -> torch.Tensor:
    return model.generate(**prompt(), max_new_tokens=3, do_sample=False)[:, -3:]


@functools.cache
def expected() -> torch.Tensor:
    """What the model answers without a wrapper."""
    return generate(tgvkv_compile.compile(tiny_llava(layers=1), 0.3, lowering="eager"))


@pytest.mark.parametrize("name", ["peft", "ddp", "fsdp", "accelerate"])
def test_the_model_inside_is_compiled(name: str, one_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    expected()
    model = tiny_llava(layers=1)
    wrapper = WRAPPERS[name](model)
    backend = tgvkv_backend(0.3, lowering="eager")
    with monkeypatch.context() as patch:
        patch.setattr("tgvkv_compile.backend.api.tgvkv_backend", lambda budget, **options: backend)
        assert tgvkv_compile.compile(wrapper) is wrapper
    if hasattr(wrapper, "generate"):
        assert torch.equal(generate(wrapper), expected())
    assert torch.equal(generate(model), expected())
    assert of_decoder(backend.graphs) == {"prefill": 1, "decode": 1}
    with torch.autocast("cpu", enabled=False):
        cache = prefill(wrapper, prompt())  # and called directly
    assert isinstance(cache.layers[0].keys, LogicalKV)
    assert step(wrapper, cache).isfinite().all()
    assert set(of_decoder(backend.graphs)) == {"prefill", "decode"}


@pytest.mark.parametrize("name", WRAPPERS)
def test_every_wrapper_is_seen_through(name: str, one_rank: None) -> None:
    model = tiny_llava(layers=1)
    assert module_to_compile(WRAPPERS[name](model)) is model


def test_what_is_no_wrapper() -> None:
    model, head = tiny_llava(layers=1), nn.Sequential()
    head.module = nn.Linear(2, 2)
    assert module_to_compile(model) is model and module_to_compile(head) is head  # a part that its author named so
    assert module_of(torch.compile(Peft(model))) is model
    with pytest.raises(ConfigError, match=r"wrapped by torch.compile\(\); give the model itself"):
        module_to_compile(Engine(torch.compile(model)))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="DataParallel, which copies the model for every call; compile model.module"):
        tgvkv_compile.compile(nn.DataParallel(model), 0.3)
    for make in (module_of, module_to_compile):
        with pytest.raises(ConfigError, match="model is a str; give a torch.nn.Module"):
            make("llava")


def test_ddp_trains_as_the_model_does(one_rank: None) -> None:
    inputs, losses = prompt(), []
    for wrap in (lambda model: model, parallel):
        model = wrap(tiny_llava(layers=1))
        tgvkv_compile.compile(model, 0.3, lowering="aot_eager")
        loss = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
        loss.backward()
        losses.append((loss.detach(), [weight.grad for weight in model.parameters()]))
    torch.testing.assert_close(losses[1], losses[0])


def test_ddp_of_a_model_without_generate(one_rank: None) -> None:
    model = Decoder()
    assert module_to_compile(parallel(model)) is model


def test_decoders_that_fsdp_shards(one_rank: None) -> None:
    layers = ModuleWrapPolicy({LlamaDecoderLayer})
    first = FullyShardedDataParallel(tiny_llava(), device_id=torch.device("cpu"), use_orig_params=True, auto_wrap_policy=layers)
    second = tiny_llava()
    for layer in second.model.language_model.layers:
        fully_shard(layer, mesh=dist.init_device_mesh("cpu", (1,)))
    for model in (first, second):
        with pytest.raises(ConfigError, match=r"layers.0 is sharded by FSDP.*splits the decoder.*tp_plan='auto'"):
            tgvkv_compile.compile(model, 0.3)
        model.compile(backend=tgvkv_backend(0.3, lowering="eager"))
        with pytest.raises(SplitDecoderError, match="(?s)torch/distributed/fsdp/.*Remedy: FSDP gathers.*tp_plan='auto'"):
            prefill(model, prompt())


# Weights elsewhere


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_layers(where: str, tmp_path: Any) -> None:
    model = tiny_llava()
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    tgvkv_compile.compile(model, 0.3, lowering="eager")
    with pytest.raises(
        SplitDecoderError, match=r"(?s)accelerate/hooks.py.*Remedy: .*offloaded to the CPU or to disk.*device_map"
    ):
        generate(model)


def test_a_device_map_with_offload(tmp_path: Any) -> None:
    tiny_llava().save_pretrained(tmp_path / "model")
    parts = ["vision_tower", "multi_modal_projector", "language_model.embed_tokens", "language_model.layers.0"]
    parts += ["language_model.norm", "language_model.rotary_emb"]
    placed = {f"model.{part}": "cpu" for part in parts} | {"model.language_model.layers.1": "disk", "lm_head": "cpu"}
    model = type(tiny_llava()).from_pretrained(tmp_path / "model", device_map=placed, offload_folder=tmp_path / "disk")
    tgvkv_compile.compile(model, 0.3, lowering="eager")
    with pytest.raises(SplitDecoderError, match="offloaded to the CPU or to disk"):
        generate(model)


def test_hooks_that_move_nothing_between_layers() -> None:
    model = tiny_llava()
    accelerate.hooks.add_hook_to_module(model, accelerate.hooks.AlignDevicesHook(execution_device="cpu"))
    backend = tgvkv_backend(0.3, lowering="eager")
    model.compile(backend=backend)
    generate(model)
    assert backend.graphs["prefill"] == backend.graphs["decode"] == 1


# Compiled in the wrong place


@pytest.mark.parametrize("how", ["compile", "torch.compile", "layers"])
def test_the_language_model_alone(how: str) -> None:
    model, backend = tiny_llava(), tgvkv_backend(0.3, lowering="eager")
    if how == "compile":
        model.model.language_model.compile(backend=backend)
    elif how == "torch.compile":
        model.model.language_model = torch.compile(model.model.language_model, backend=backend)
    else:
        model.model.language_model.layers[0].compile(backend=backend)
    with pytest.raises(UnsupportedGraphError, match="compile the whole model, not its language model") as caught:
        generate(model)
    assert "give input_ids" not in str(caught.value)


def test_embeddings_given_to_the_whole_model() -> None:
    model = tgvkv_compile.compile(tiny_llava(), 0.3, lowering="eager")
    with pytest.raises(UnsupportedGraphError, match="give input_ids, not inputs_embeds") as caught, torch.no_grad():
        model(inputs_embeds=model.get_input_embeddings()(prompt()["input_ids"]))
    assert "compile the whole model" not in str(caught.value)


def test_the_model_without_its_head_is_whole_enough() -> None:
    model, backend = tiny_llava(), tgvkv_backend(0.3, lowering="eager")
    model.model.compile(backend=backend)
    generate(model)
    assert backend.graphs == {"prefill": 1, "decode": 1}


def test_warm_up_and_explain_look_inside(one_rank: None) -> None:
    model = Peft(tiny_llava(layers=1))
    assert explain(model, prompt(), 0.3).model == "LlavaForConditionalGeneration"
    model.compile(backend=tgvkv_backend(0.3, lowering="eager"))  # its generate() calls the model inside
    with pytest.raises(ConfigError, match=r"\(Peft\) was not compiled with this backend.*tgvkv_compile.compile\(model\)"):
        warm_up(model, prompt())
    for wrapper in (model, parallel(tiny_llava(layers=1))):  # the one has generate(), the other has not
        warm_up(tgvkv_compile.compile(wrapper, 0.3, lowering="eager"), prompt())


def test_the_warning_at_exit_names_wrappers() -> None:
    said = run_script("""
        from tests.backend.test_wrappers import Peft
        model = Peft(tiny_llava())
        model.compile(backend=tgvkv_compile.tgvkv_backend(0.3, lowering="eager"))
        model.generate(**prompt(), max_new_tokens=2)
    """)
    for part in (
        "never reached",
        "PEFT model.get_base_model()",
        "DistributedDataParallel",
        "model.module",
        "tgvkv_compile.compile",
    ):
        assert part in said
