"""``bitwright bench``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitwright.errors import InputError

if TYPE_CHECKING:
    from bitwright.evaluation.record import Speed, Spread

__all__ = ["app"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def bench(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Checkpoint folders or GGUF files, or org/name on the hub.")
    ],
    against: Annotated[
        str | None, typer.Option("--against", help="A model that the others are compared with, usually the original.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", help="Tokens of a prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="Tokens of an answer.")] = 128,
    batch: Annotated[str, typer.Option("--batch", help="Sequences at a time; several sizes with commas.")] = "1",
    repetitions: Annotated[int, typer.Option("--repetitions", help="Measured runs.")] = 5,
    warmup: Annotated[int, typer.Option("--warmup", help="Runs before them that do not count.")] = 1,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            "--engine", help="transformers, llamacpp or vllm; repeatable.  [default: those that are installed]"
        ),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="Of activations: float32, float16 or bfloat16.  [default: the model's]"),
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", help="Threads.  [default: as many as cores]")] = None,
    vllm_python: Annotated[
        Path | None, typer.Option("--vllm-python", metavar="PATH", help="An interpreter that has vLLM.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the prompts.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Pure JSON on stdout.")] = False,
) -> None:
    """Time to the first token, latency of the next ones, tokens a second and peak memory. Every model in a process of its own."""
    from bitwright.io.hub import resolve_model
    from bitwright.runtime.bench import BenchOptions
    from bitwright.runtime.bench import bench as run

    given = {} if threads is None else {"threads": threads}
    options = BenchOptions(
        prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch=_sizes(batch), repetitions=repetitions, warmup=warmup, device=device,
        dtype=dtype, seed=seed, vllm_python=vllm_python, **given,
    )  # fmt: skip
    found: list[Speed] = []
    base: list[Speed] = []
    for name in ([against] if against is not None else []) + models:
        path = resolve_model(name, file=True)
        speeds = run(
            path,
            options,
            engines=tuple(engine or ()),
            progress=lambda words: typer.echo(f"measuring {words}", err=True),
        )
        (base if name == against and not base else found).extend(speeds)
    if as_json:
        value = {"against": [asdict(speed) for speed in base], "speeds": [asdict(speed) for speed in found]}
        typer.echo(json.dumps(value, indent=2, allow_nan=False))
    else:
        _show(base, found)
    if all(speed.note is not None for speed in base + found):
        raise InputError("nothing could be measured", mend="see the notes above")


def _sizes(text: str) -> tuple[int, ...]:
    """Batch sizes from ``1,8``.

    >>> _sizes("1,8")
    (1, 8)
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise InputError(f"'{text}' is no list of batch sizes", mend="write it like 1,8")
    return tuple(dict.fromkeys(int(part) for part in parts))


def _show(base: list[Speed], found: list[Speed]) -> None:
    from bitwright.cli.tables import print_facts, print_table, size

    headings = (
        "model",
        "engine",
        "batch",
        "first token ms",
        "next p50 ms",
        "p99 ms",
        "prompt tok/s",
        "new tok/s",
        "peak memory",
        "load s",
    )
    rows = []
    for speed in base + found:
        if speed.note is not None:
            continue
        first = next((one for one in base if one.batch == speed.batch and one.note is None), None)
        times = "" if first is None or speed in base else _ratio(speed.new_tokens_per_s, first.new_tokens_per_s)
        rows.append(
            (
                speed.name, f"{speed.engine} {speed.dtype}".strip(), str(speed.batch), _number(speed.time_to_first_token_ms),
                _plain(speed.inter_token_p50_ms), _plain(speed.inter_token_p99_ms), _number(speed.prompt_tokens_per_s),
                _number(speed.new_tokens_per_s) + times, "-" if speed.peak_resident_bytes is None else size(speed.peak_resident_bytes),
                "-" if speed.load_ms is None else f"{speed.load_ms / 1000:.1f}",
            )
        )  # fmt: skip
    print_table(headings, rows)
    for speed in base + found:
        if speed.note is not None:
            print_facts([(f"{speed.name}, {speed.engine}", speed.note)])
    some = next((speed for speed in base + found if speed.note is None), None)
    if some is not None:
        print_facts(
            [
                (
                    "measured",
                    f"{some.prompt_tokens} prompt tokens, {some.new_tokens} new ones, {some.repetitions} repetitions (median, and spread), "
                    f"{some.threads} threads on {some.device}",
                )
            ]
        )


def _number(spread: Spread | None) -> str:
    """Median, and half the way from the smallest to the largest in percent."""
    if spread is None:
        return "-"
    half = 50 * (spread.high - spread.low) / spread.median if spread.median else 0.0
    return f"{spread.median:.4g} ±{half:.0f} %"


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _ratio(ours: Spread | None, theirs: Spread | None) -> str:
    return f" ({ours.median / theirs.median:.2f}x)" if ours and theirs and theirs.median else ""
