"""Entry point: finds commands lazily, turns errors into messages and exit codes."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from bitwright.errors import BitwrightError

__all__ = ["COMMANDS", "main"]

#: command -> its one line in `bitwright --help`; the command's file is only imported when it runs
COMMANDS = {
    "plan": "What would become of every tensor: exact bytes, memory, who loads it. Reads no weights.",
    "quantize": "Quantize a checkpoint folder, into another one or into a GGUF file.",
    "allocate": "Choose bits layer by layer under a budget; writes a recipe.",
    "convert": "Another layout without quantizing anew; plain weights; to and from GGUF.",
    "analyze": "Outliers among the inputs of every layer, and what they mean for 8-bit inputs.",
    "imatrix": "Collect importance weights for GGUF files, or rewrite an importance matrix.",
    "run": "Run a GGUF file with llama.cpp.",
    "eval": "Quality: perplexity, KL divergence against the original, tasks, errors of layers; a gate.",
    "compare": "Several recipes on one model: quantized, measured, drawn in one report.",
    "bench": "Time to first token, tokens a second, memory: engines side by side.",
    "memory": "What a model takes to run or to fine-tune: weights, KV cache, activations.",
    "recommend": "Recipes for a task on a machine, ranked: memory, loss, commands.",
    "engines": "Which engine loads which kind of file, on which hardware, and who says so.",
    "report": "Draw saved results as one HTML page that needs no network.",
    "inspect": "What is in a checkpoint or a GGUF file: tensors, schemes, bits per weight, recipe.",
    "demo": "Quantize the embedded model three ways and show the quality table.",
}


class _LazyGroup(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"bitwright.cli.{cmd_name}")
        return typer.main.get_command(module.app)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _build() -> Any:
    app = typer.Typer(
        cls=_LazyGroup,
        name="bitwright",
        help="Takes a trained language model and gives it back in fewer bits.",
        no_args_is_help=True,
        # Plain help for the list of commands: the rich one would import every command to draw it.
        rich_markup_mode=None,
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    @app.callback(invoke_without_command=True)
    def _root(
        version: bool = typer.Option(False, "--version", help="Print the version and exit."),
    ) -> None:
        if version:
            from importlib.metadata import version as installed

            typer.echo(installed("bitwright"))
            raise typer.Exit

    return typer.main.get_command(app)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (see ``bitwright.errors``)."""
    # Set before transformers is imported: its bars and advice would mix with ours.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Read when torch loads its thread pool. Threads that spin while they wait stall each other as soon as anything else uses the
    # cores: on two shared cores a GPTQ run took fifty times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        _build()(args=list(arguments) if arguments is not None else None)
    except BitwrightError as error:
        return _fail(error)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    except MemoryError:
        return _out_of_memory()
    except RuntimeError as error:
        # torch has no type of its own for a failed allocation on the CPU.
        if "allocate memory" not in str(error):
            raise
        return _out_of_memory()
    return 0


def _out_of_memory() -> int:
    sys.stderr.write("error: out of memory\n  mend: use --max-memory, or a machine with more\n")
    return 4


def _fail(error: BitwrightError) -> int:
    from bitwright.io.text import printable

    sys.stderr.write(f"error: {printable(error.message)}\n")
    if error.mend:
        sys.stderr.write(f"  mend: {printable(error.mend)}\n")
    return error.exit_code


def run() -> None:
    """Console script."""
    sys.exit(main())
