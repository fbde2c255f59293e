"""The commands and their options. What they do is loaded when they are called: torch takes seconds to import."""

import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Literal

import typer

from tgvkv_compile.cli.eviction import Decode, Eviction, with_eviction
from tgvkv_compile.cli.problems import told_plainly
from tgvkv_compile.config import BudgetOf, EvictionConfig

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

app = typer.Typer(
    name="tgvkv",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Option(help="Folder of a model, or its id on the Hugging Face hub.", show_default=False)]
Remote = Annotated[bool, typer.Option("--trust-remote-code", help="Allow the model's repository to run its own code.")]
As = Annotated[Dtype, typer.Option(help="Type of the weights; auto is the checkpoint's.")]
Device = Annotated[str, typer.Option(help="Where to run, such as cpu or cuda:0.")]


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    from tgvkv_compile import __version__

    typer.echo(f"tgvkv-compile {__version__}")
    typer.echo(f"torch {_version_of('torch')}, transformers {_version_of('transformers')}, Python {platform.python_version()}")
    raise typer.Exit()


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


@app.callback()
def tgvkv(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the versions and exit.")
    ] = False,
) -> None:
    """Run vision-language models on a fraction of their KV cache, with TGV-KV as a torch.compile backend.

    [bold]Examples[/bold]

    tgvkv demo

    tgvkv run --model ./llava --image cat.jpg --prompt "What is this?" --budget 0.05

    tgvkv explain --model ./llava

    tgvkv export onnx --model ./llava --out ./engines
    """


@app.command()
def demo(
    questions: Annotated[int, typer.Option(min=1, help="Held-out questions that accuracy is measured on.")] = 200,
    budgets: Annotated[str, typer.Option(help="Budgets to compare, comma-separated.")] = "1.0,0.5,0.2,0.05",
    budget_of: Annotated[Literal["all", "vision", "both"], typer.Option(help="What the budgets are fractions of.")] = "both",
    lowering: Annotated[
        Literal["inductor", "eager"],
        typer.Option(help="Compiler for everything, the full cache included; eager for debugging."),
    ] = "inductor",
    decode: Decode = EvictionConfig.decode,
    out: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("tgvkv-demo.png"),
    seed: Annotated[int, typer.Option(min=0, help="Draws other questions.")] = 0,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write all results here.", show_default=False)] = None,
) -> None:
    """Show what eviction does to a small model that reads digits off a picture: answers, speed, accuracy, memory.

    Nothing is downloaded: the model (LLaVA, 1.7 M parameters) and its pictures come with the package.

    [bold]Examples[/bold]

    tgvkv demo

    tgvkv demo --questions 40 --budgets 1.0,0.2 --budget-of all --json results.json
    """
    with told_plainly():
        from tgvkv_compile.cli.demo import run_demo
        from tgvkv_compile.cli.inputs import parse_budgets
        from tgvkv_compile.cli.results import Settings

        bases: tuple[BudgetOf, ...] = ("all", "vision") if budget_of == "both" else (budget_of,)
        run_demo(
            Settings(
                questions=questions,
                budgets=parse_budgets(budgets),
                bases=bases,
                lowering=lowering,
                decode=decode,
                seed=seed,
                picture=out,
                json=json,
            )
        )


@app.command()
@with_eviction
def run(
    *,
    context: typer.Context,
    image: Annotated[list[Path], typer.Option(help="Picture file; give it again for more.", show_default=False)],
    prompt: Annotated[str, typer.Option(help="The question.", show_default=False)],
    model: Annotated[
        str | None, typer.Option(help="Folder of a model, or its id on the Hugging Face hub.", show_default=False)
    ] = None,
    onnx: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="What `tgvkv export onnx` wrote, in place of a model.", show_default=False),
    ] = None,
    eviction: Eviction,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
    lowering: Annotated[
        Literal["inductor", "aot_eager", "eager"], typer.Option(help="Compiler; all but inductor are for debugging.")
    ] = "inductor",
    dtype: As = "auto",
    device: Device = "cpu",
    trust_remote_code: Remote = False,
) -> None:
    """Answer a question about pictures with any supported vision-language model, or with an export of one.

    The prompt goes through the processor's chat template if it has one; otherwise it is used as it is, with the image
    token put in front where it is missing. The answer is streamed; then comes what the KV cache holds.

    [bold]Example[/bold]

    tgvkv run --model ./llava --image cat.jpg --prompt "What is this?" --budget 0.05

    tgvkv run --onnx ./engines --image cat.jpg --prompt "What is this?"
    """
    with told_plainly():
        from tgvkv_compile.cli.inputs import check_prompt, load, read_budget, read_images
        from tgvkv_compile.cli.problems import CommandError
        from tgvkv_compile.cli.run import answer

        if onnx is not None:
            from tgvkv_compile.cli.export import answer_from_onnx

            _refuse_beside_onnx(context)
            check_prompt(prompt)
            given = context.get_parameter_source("max_new_tokens")
            wanted = max_new_tokens if given is not None and given.name == "COMMANDLINE" else None
            answer_from_onnx(onnx, read_images(image), prompt, wanted)
            return
        if model is None:
            raise CommandError("neither --model nor --onnx was given; give a model, or what `tgvkv export onnx` wrote")

        kept = read_budget(eviction)
        check_prompt(prompt)
        images = read_images(image)
        loaded = load(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        answer(loaded, images, prompt, kept, {**eviction, "lowering": lowering}, max_new_tokens)


def _refuse_beside_onnx(context: typer.Context) -> None:
    """Raises for an option that has no meaning for engines, which were exported with theirs."""
    from tgvkv_compile.cli.problems import CommandError

    beside = {"onnx", "image", "prompt", "max_new_tokens"}
    for name in context.params:
        source = context.get_parameter_source(name)
        if name not in beside and source is not None and source.name == "COMMANDLINE":
            option = name.replace("_", "-")
            raise CommandError(f"--{option} cannot be given beside --onnx: the export has its own; export again to change it")


exports = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Write engines of static shapes, eviction inside.")
app.add_typer(exports, name="export")

Out = Annotated[Path, typer.Option(metavar="DIR", help="Folder to write to.", show_default=False)]
Sample = Annotated[
    list[Path] | None,
    typer.Option(help="Picture of the sample; again for more, a blank one if not given.", show_default=False),
]
Question = Annotated[str, typer.Option(help="Question of the sample, which capacities are made for.")]
Answer = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
Longest = Annotated[
    int | None, typer.Option(min=1, help="Longest prompt, in tokens; the sample's if not given.", show_default=False)
]
Asked = Annotated[
    int | None,
    typer.Option(
        min=1, help="Most tokens behind the last picture; twice the sample's, at least 256, if not given.", show_default=False
    ),
]
Slack = Annotated[float, typer.Option(min=0.0, help="Share of a layer's slots that is added, for prompts that want more.")]
Where = Annotated[str, typer.Option(help="Where to trace, such as cpu or cuda:0.")]


def _exporting(target: Literal["onnx", "tensorrt"], weights: Dtype, where: str) -> Callable[..., None]:
    """The command that exports for `target`; `weights` and `where` are its defaults of `--dtype` and `--device`."""

    @with_eviction
    def command(
        *,
        model: Model,
        out: Out,
        image: Sample = None,
        prompt: Question = "What is in the picture?",
        eviction: Eviction,
        max_new_tokens: Answer = 128,
        max_prompt: Longest = None,
        max_question: Asked = None,
        slack: Slack = 0.25,
        dtype: As = weights,
        device: Where = where,
        trust_remote_code: Remote = False,
    ) -> None:
        with told_plainly():
            from tgvkv_compile.cli.export import check_folder, check_weights, export
            from tgvkv_compile.cli.inputs import check_prompt, load, read_budget, read_images

            kept = read_budget(eviction)
            check_prompt(prompt)
            check_folder(out)
            check_weights(dtype)
            images = read_images(image or [])
            if target == "tensorrt":
                from tgvkv_compile.export.tensorrt.engines import torch_tensorrt_module

                torch_tensorrt_module()
            loaded = load(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
            sizes = {"max_prompt": max_prompt, "max_question": max_question, "slack": slack}
            export(target, loaded, images, prompt, out, kept, max_new_tokens, {**sizes, **eviction})

    return command


exports.command(
    "onnx",
    help="""Write prefill.onnx and decode.onnx, for ONNX Runtime or TensorRT's parser.

    The sample decides the number and size of pictures, and how many slots each layer gets.

    [bold]Example[/bold]

    tgvkv export onnx --model ./llava --image cat.jpg --prompt "What is this?" --budget 0.05 --out ./engines
    """,
)(_exporting("onnx", "float32", "cpu"))

exports.command(
    "tensorrt",
    help="""Write prefill.engine and decode.engine with Torch-TensorRT. It has not run on TensorRT yet (docs/export.md).

    [bold]Example[/bold]

    tgvkv export tensorrt --model ./llava --image cat.jpg --prompt "What is this?" --budget 0.05 --out ./engines
    """,
)(_exporting("tensorrt", "auto", "cuda"))


@app.command()
@with_eviction
def explain(
    *,
    model: Model,
    image: Annotated[
        list[Path] | None, typer.Option(help="Picture file; a blank picture if not given.", show_default=False)
    ] = None,
    prompt: Annotated[str, typer.Option(help="The question.")] = "What is in the picture?",
    eviction: Eviction,
    dtype: As = "auto",
    device: Device = "cpu",
    trust_remote_code: Remote = False,
) -> None:
    """Tell what the backend finds in a model and would do with it. Nothing is compiled.

    [bold]Example[/bold]

    tgvkv explain --model ./llava --budget 0.1
    """
    with told_plainly():
        from tgvkv_compile.cli.inputs import check_prompt, load, read_budget, read_images
        from tgvkv_compile.cli.run import explanation

        kept = read_budget(eviction)
        check_prompt(prompt)
        images = read_images(image or [])
        loaded = load(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        typer.echo(explanation(loaded, images, prompt, kept, eviction))
