"""``bitwright run``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitwright.errors import InputError

__all__ = ["app"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def run(
    model: Annotated[Path, typer.Argument(help="A GGUF file (of a split one, any part).")],
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="Text to continue.")] = None,
    chat: Annotated[
        str | None, typer.Option("--chat", help="A message to answer, by the model's own chat template.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="System message, with --chat.")] = None,
    embed: Annotated[
        list[str] | None, typer.Option("--embed", help="Print this text's vector as JSON; repeatable.")
    ] = None,
    tokens: Annotated[int, typer.Option("-n", "--tokens", help="At most this many new tokens.")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", help="0: always the likeliest token.")] = 0.8,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the sampling.")] = 0,
    context: Annotated[int, typer.Option("--context", help="Tokens of context.")] = 2048,
    threads: Annotated[
        int | None, typer.Option("--threads", help="CPU threads.  [default: llama.cpp's choice]")
    ] = None,
    gpu_layers: Annotated[int, typer.Option("--gpu-layers", help="Blocks that go to a GPU.")] = 0,
) -> None:
    """Run a GGUF file with llama.cpp, in a child process (needs the extra llamacpp)."""
    import json

    from bitwright.runtime.llamacpp import LlamaCpp, LlamaOptions

    if sum(value is not None for value in (prompt, chat, embed)) != 1:
        raise InputError(
            "one of -p, --chat and --embed is needed", mend="for example: bitwright run FILE -p 'Once upon'"
        )
    if tokens < 1 or temperature < 0:
        raise InputError(
            "--tokens must be positive and --temperature not negative", mend="use -n 128 --temperature 0.8"
        )
    options = LlamaOptions(context=context, threads=threads, gpu_layers=gpu_layers, embeddings=embed is not None)
    settings = {"max_tokens": tokens, "temperature": temperature, "seed": seed}
    with LlamaCpp.load(model, options) as loaded:
        if embed is not None:
            typer.echo(json.dumps(loaded.embed(embed)))
            return
        if chat is not None:
            messages = [{"role": "system", "content": system}] if system else []
            pieces = loaded.chat([*messages, {"role": "user", "content": chat}], **settings)
        else:
            assert prompt is not None
            typer.echo(prompt, nl=False)
            pieces = loaded.stream(prompt, **settings)
        for piece in pieces:
            typer.echo(piece, nl=False)
        typer.echo()
