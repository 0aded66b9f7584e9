"""``bitwright recommend``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitwright.cli import options as o
from bitwright.errors import InputError

if TYPE_CHECKING:
    from bitwright.advise.engines import Hardware
    from bitwright.advise.recommend import Advice, Subject

__all__ = ["app"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

#: Tokens of a sequence where nothing is said: in a conversation, and of a training example.
_SERVED, _TRAINED = 8192, 2048
_TASKS = "chat, code, long-context, arithmetic, embedding, batch-serving or finetune"
#: A GPU of which only the memory is known.
_UNNAMED = 8.0


@app.command()
def recommend(
    model: Annotated[
        str | None,
        typer.Argument(help="Checkpoint folder, or org/name on the hub; or give --params.", show_default=False),
    ] = None,
    params: Annotated[
        str | None, typer.Option("--params", help="A number of parameters such as 8B: a typical shape is taken.")
    ] = None,
    task: Annotated[str, typer.Option("--task", help=f"{_TASKS}.")] = "chat",
    finetune: Annotated[bool, typer.Option("--finetune", help="The same as --task finetune.")] = False,
    engine: Annotated[
        str | None,
        typer.Option("--engine", help="vllm, llamacpp, transformers, ...: see `bitwright engines`.  [default: any]"),
    ] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", help="A GPU by name: h100, a100, 4090, t4, ...")] = None,
    capability: Annotated[
        float | None, typer.Option("--compute-capability", metavar="X.Y", help="Of a GPU that is not in the list.")
    ] = None,
    gpu_memory: Annotated[
        str | None, typer.Option("--gpu-memory", metavar="SIZE", help="Of the GPU, such as 24GB.  [default: --gpu's]")
    ] = None,
    cpu_only: Annotated[bool, typer.Option("--cpu-only", help="There is no GPU.")] = False,
    memory: Annotated[
        str | None,
        typer.Option("--memory", metavar="SIZE", help="With --cpu-only: main memory.  [default: this machine's]"),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            "--context", help="Tokens of a sequence.  [default: 8192, to fine-tune 2048; at most the model's]"
        ),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", help="Sequences at a time.")] = 1,
    kv: Annotated[
        str | None,
        typer.Option("--kv", help="KV cache: fp8 (vLLM), q8_0 or q4_0 (llama.cpp).  [default: 16 bits]"),
    ] = None,
    most: Annotated[int, typer.Option("--most", help="Suggestions at most.")] = 4,
    measure: Annotated[
        bool, typer.Option("--measure", help="Quantize the first three here and rank them by what they lose.")
    ] = False,
    text: Annotated[
        str | None, typer.Option("--text", help="Text to measure on.  [default: the model's own samples]")
    ] = None,
    calibration: o.CalibrationFile = None,
    samples: o.Samples = None,
    windows: Annotated[int | None, typer.Option("--windows", help="With --measure: windows of text at most.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Pure JSON on stdout.")] = False,
) -> None:
    """Recipes for a task on a machine, ranked, with the memory they take, what they lose, and the commands. Exit code 1: nothing fits."""
    from bitwright.advise.recommend import recommend as advise
    from bitwright.advise.scenario import Scenario

    if most < 1:
        raise InputError(f"--most {most} asks for nothing", mend="use 1 or more")
    hardware, size, said = _machine(gpu, capability, gpu_memory, cpu_only, memory)
    subject = _subject(model, params, calibration)
    usual = _TRAINED if finetune or task == "finetune" else _SERVED
    asked = context if context is not None else min(usual, subject.longest or usual)
    scenario = Scenario(
        hardware=hardware,
        memory=size,
        task="finetune" if finetune else task,
        engine=engine,
        context=asked,
        batch=batch,
        kv=kv,
    )
    found = advise(subject, scenario, most=most)
    if measure:
        found = _measured(subject, found, text, windows, samples)
    if as_json:
        facts = {"task": scenario.task, "context": asked, "batch": batch, "device": hardware.name, "memory_bytes": size}
        typer.echo(json.dumps({"scenario": facts, **found.to_json()}, indent=2, allow_nan=False))
    else:
        _show(found, said)
    if not found.suggestions:
        raise typer.Exit(1)


def _machine(
    gpu: str | None, capability: float | None, gpu_memory: str | None, cpu_only: bool, memory: str | None
) -> tuple[Hardware, int, list[str]]:
    """What the model runs on, its memory, and what was assumed."""
    from bitwright.advise.engines import CPU, Hardware
    from bitwright.advise.engines import gpu as named
    from bitwright.cli.engines import chosen_hardware

    if cpu_only:
        if gpu_memory is not None:
            raise InputError("--gpu-memory and --cpu-only exclude each other", mend="use --memory for main memory")
        chosen_hardware(gpu, capability, cpu_only)
        if memory is not None:
            return CPU, o.parse_bytes(memory), []
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return CPU, size, [f"main memory of this machine: {size / 1e9:.1f} GB (--memory names another)"]
    if memory is not None:
        raise InputError("--memory is for --cpu-only", mend="use --gpu-memory")
    hardware = chosen_hardware(gpu, capability, cpu_only)
    size_given = o.parse_bytes(gpu_memory) if gpu_memory is not None else None
    if hardware is None and size_given is None:
        raise InputError("there is no machine to advise for", mend="use --gpu h100, --gpu-memory 24GB or --cpu-only")
    said = []
    if hardware is None:
        hardware = Hardware(name=f"a GPU of compute capability {_UNNAMED}", capability=_UNNAMED)
        said.append(f"no GPU was named: taken for one of compute capability {_UNNAMED}; --gpu 4090 says more")
    if size_given is None:
        in_gb = named(gpu)[1] if gpu is not None else None
        if in_gb is None:
            raise InputError("the memory of this GPU is not known", mend="use --gpu-memory 24GB")
        size_given = int(in_gb * 1e9)
    return hardware, size_given, said


def _subject(model: str | None, params: str | None, calibration: str | None) -> Subject:
    from bitwright.advise.recommend import Subject
    from bitwright.advise.shape import model_shape, parse_parameters, shape_for

    if (model is None) == (params is None):
        raise InputError("one model is needed", mend="name a folder, or give --params 8B")
    if params is not None:
        return Subject(shape=shape_for(parse_parameters(params)), text=calibration)
    from bitwright.advise.stored import is_quantized
    from bitwright.io.hub import resolve_model
    from bitwright.io.safetensors_dir import SafetensorsDir

    path = resolve_model(str(model), file=True)
    if is_quantized(path):
        raise InputError(f"{model} is quantized already", mend="name the original")
    with SafetensorsDir.open(path) as source:
        config: dict[str, Any] = dict(source.config)
    shape = model_shape(config, source=f"config.json of {path.name}")
    text = config.get("text_config")
    longest = (text if isinstance(text, dict) else config).get("max_position_embeddings")
    return Subject(
        shape=shape, path=path, name=str(model), text=calibration, longest=longest if isinstance(longest, int) else None
    )


def _measured(subject: Subject, found: Advice, text: str | None, windows: int | None, samples: int | None) -> Advice:
    from bitwright.advise.trial import try_suggestions
    from bitwright.cli.progress import ConsoleProgress

    with ConsoleProgress() as progress:
        return try_suggestions(
            subject, found, text=Path(text) if text else None, windows=windows, samples=samples, progress=progress
        )


def _show(found: Advice, said: list[str]) -> None:
    from bitwright.advise.knowledge import quality_origin
    from bitwright.cli.tables import print_facts, print_table, size
    from bitwright.io.text import printable

    here = any(suggestion.kl_here is not None for suggestion in found.suggestions)
    rows = [
        (
            f"{number}. {one.name}",
            one.engine,
            f"{size(one.memory.total_bytes)} of {size(one.budget)}",
            "-" if one.kl is None else f"{one.kl:.2g}",
            *((("-" if one.kl_here is None else f"{one.kl_here:.3g}"),) if here else ()),
            one.reason,
        )
        for number, one in enumerate(found.suggestions, 1)
    ]
    if rows:
        headings = ("recipe", "engine", "memory", "loss (KL)", *(("loss here",) if here else ()), "for")
        print_table(headings, rows)
        for number, one in enumerate(found.suggestions, 1):
            typer.echo(f"{number}. {one.command}")
            typer.echo(f"   {one.start}")
            for note in one.notes:
                typer.echo(f"   note: {note}")
        typer.echo("")
        print_facts([("loss (KL)", f"{quality_origin()}. Larger models lose less; the order is what counts")])
    else:
        typer.echo("Nothing fits. What would:")
        for line in found.otherwise:
            typer.echo(f"  {line}")
        typer.echo("")
    typer.echo("How this was decided:")
    for line in (*said, *found.path):
        typer.echo(f"  {printable(line)}")
