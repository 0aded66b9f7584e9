"""Tables of quality, tasks and limits, from the document."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from bitwright.evaluation.record import Quality, TaskScore
from bitwright.report.document import Candidate, Document, GateLine
from bitwright.report.numbers import bytes_text, column, decimals, fixed, signed, significant
from bitwright.report.tables import Cell, Columns, Head, Row, Table
from bitwright.report.verdict import grade, increase

__all__ = ["domain_table", "gate_sentences", "gate_table", "quality_table", "task_table"]

_Values = Sequence[float | None]
_Writer = Callable[[_Values], list[str]]


def _column(figures: int, most: int = 6) -> _Writer:
    return lambda values: column(values, figures, most=most)


def _shares(places: int = 2) -> _Writer:
    """Shares in percent."""
    return lambda values: ["" if value is None else fixed(100 * value, places) for value in values]


def _changes(places: int) -> _Writer:
    return lambda values: ["" if value is None else signed(value, places) for value in values]


def _signed_column(figures: int, most: int) -> _Writer:
    def write(values: _Values) -> list[str]:
        places = decimals([value for value in values if value is not None], figures, most=most)
        return _changes(places)(values)

    return write


def _sizes(values: _Values) -> tuple[str, _Writer]:
    """The unit that all sizes of a column share, and how to write them in it."""
    largest = max((value for value in values if value is not None), default=0.0)
    unit = bytes_text(largest).split()[-1]
    scale = {"bytes": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    return unit, lambda found: column([None if v is None else v / scale for v in found], 3, most=0 if scale == 1 else 3)


def quality_table(document: Document, chosen: Candidate) -> Table:
    """Every candidate against the source: size, perplexity, divergence, agreement."""
    found = document.candidates
    source = next((one.quality.source for one in found if one.quality and one.quality.source), None)
    origin = document.source.size if document.source else None
    has_source = source is not None or origin is not None
    fixed_rows = int(has_source)

    def values(of: Callable[[Candidate], float | None], original: float | None = None) -> list[float | None]:
        return ([original] if has_source else []) + [of(one) for one in found]

    def measured(of: Callable[[Quality], float | None]) -> list[float | None]:
        return values(lambda one: None if one.quality is None else of(one.quality))

    table = Columns()

    def add(
        head: Head,
        cells: list[float | None],
        write: _Writer,
        best: Callable[..., float] | None,
        titles: Sequence[str] = (),
    ) -> None:
        table.add(head, cells, write, best=best, titles=titles, fixed=fixed_rows)

    sizes = values(lambda one: one.size.weight_file_bytes, origin.weight_file_bytes if origin else None)
    unit, write = _sizes(sizes)
    add(Head(f"files, {unit}", "All weight files together", "size"), sizes, write, min)
    add(
        Head("bits / weight", "Over all parameters of the model", "size"),
        values(lambda one: one.size.bits_per_weight, origin.bits_per_weight if origin else None), _changeless(2), min,
    )  # fmt: skip
    ppl = "perplexity"
    absolute = values(
        lambda one: one.quality.model.perplexity if one.quality else None, source.perplexity if source else None
    )
    add(Head("model", "exp of the mean negative log-likelihood", ppl), absolute, _column(4, 4), min)
    add(
        Head("increase", "Model less original", ppl),
        measured(lambda q: None if q.source is None else q.model.perplexity - q.source.perplexity), _signed_column(2, 4), min,
    )  # fmt: skip
    shares = measured(increase)
    add(
        Head("%", "The same in percent of the original's", ppl),
        [None if v is None else 100 * v for v in shares],
        _changes(2),
        min,
    )
    kl = "KL divergence from the original, nats"
    errors = [""] * fixed_rows + [
        f"standard error {significant(one.quality.kl.error, 2)}" if one.quality and one.quality.kl else ""
        for one in found
    ]
    add(
        Head("mean", "Over all positions", kl),
        measured(lambda q: q.kl.mean if q.kl else None),
        _column(3, 5),
        min,
        errors,
    )
    for text, of in (
        ("median", lambda q: q.kl.median if q.kl else None), ("99 %", lambda q: q.kl.p99 if q.kl else None),
        ("99.9 %", lambda q: q.kl.p999 if q.kl else None), ("max", lambda q: q.kl.max if q.kl else None),
    ):  # fmt: skip
        help_ = "" if text in ("median", "max") else f"{text} of positions are below"
        add(Head(text, help_, kl), measured(of), _column(3, 5 if text == "median" else 4), min)
    same = "agreement, %"
    add(Head("top 1", "Positions with the same most likely token", same), measured(lambda q: q.top1), _shares(), max)
    add(Head("top 5", "Mean overlap of the five most likely tokens", same), measured(lambda q: q.top5), _shares(), max)
    add(
        Head("Δp rms", "Root mean square of the change of the text's own token's probability", same),
        measured(lambda q: q.delta_p.rms if q.delta_p else None),
        _shares(),
        min,
    )
    add(
        Head("flips", "Predictions that changed from right to wrong or back", same),
        measured(lambda q: q.flips.total if q.flips else None), _shares(), min,
    )  # fmt: skip
    rows = [Row(_origin_name(document), table.row(0), "original", "source")] if has_source else []
    for i, one in enumerate(found):
        words = grade(one.quality)
        note = words.short if words else ", ".join(part for part in (one.method, one.layout) if part)
        rows.append(
            Row(one.name, table.row(i + fixed_rows), note, "chosen" if one is chosen and len(found) > 1 else "")
        )
    legend = ("Bold: the best of its column.",) if len(found) > 1 else ()
    return Table(
        "Quality of every candidate against the original",
        "candidate",
        tuple(table.heads),
        tuple(rows),
        legend,
        len(found) > 2,
    )


def _changeless(places: int) -> _Writer:
    return lambda values: ["" if value is None else fixed(value, places) for value in values]


def _origin_name(document: Document) -> str:
    return document.source.name if document.source else "original"


def domain_table(document: Document, chosen: Candidate) -> Table | None:
    """Quality text by text; None where no candidate was measured on several."""
    found = [one for one in document.candidates if len(one.domains) > 1]
    if not found:
        return None
    table = Columns()
    for name in dict.fromkeys(name for one in found for name in one.domains):
        qualities = [one.domains.get(name) for one in found]
        source = next((q.source for q in qualities if q is not None and q.source is not None), None)
        group = name if source is None else f"{name} (original {significant(source.perplexity, 4)})"
        table.add(
            Head("perplexity", "", group),
            [None if q is None else q.model.perplexity for q in qualities],
            _column(4, 4),
            best=min,
        )
        shares = [None if q is None else increase(q) for q in qualities]
        table.add(
            Head("increase, %", "", group), [None if v is None else 100 * v for v in shares], _changes(2), best=min
        )
        table.add(
            Head("mean KL", "", group),
            [q.kl.mean if q is not None and q.kl else None for q in qualities],
            _column(3, 5),
            best=min,
        )
        table.add(Head("top 1, %", "", group), [None if q is None else q.top1 for q in qualities], _shares(), best=max)
    several = len(document.candidates) > 1
    rows = tuple(
        Row(one.name, table.row(i), kind="chosen" if several and one is chosen else "") for i, one in enumerate(found)
    )
    return Table("Quality on each text", "candidate", tuple(table.heads), rows, sortable=len(found) > 2)


def task_table(document: Document) -> Table | None:
    """Scores with their standard errors; None where no task was run. Marked: worse than the original by more than two errors."""
    found = [one for one in document.candidates if one.tasks]
    if not found:
        return None
    keys = list(dict.fromkeys((score.task, score.metric) for one in found for score in one.tasks))
    scores = [{(score.task, score.metric): score for score in one.tasks} for one in found]
    heads, columns = [], []
    for key in keys:
        column_ = [one.get(key) for one in scores]
        first = next(score for score in column_ if score is not None)
        places = _task_places([score for score in column_ if score is not None])
        heads.append(
            Head(
                key[1],
                f"{first.samples} questions, {'higher' if first.higher_is_better else 'lower'} is better",
                key[0],
            )
        )
        with_source = next((score for score in column_ if score is not None and score.source_value is not None), None)
        original = (
            Cell("–") if with_source is None else _score(with_source.source_value, with_source.source_error, places)
        )
        columns.append([original, *(_task_cell(score, places) for score in column_)])
    rows = [Row(one.name, tuple(cells[i + 1] for cells in columns)) for i, one in enumerate(found)]
    if any(cells[0].value is not None for cells in columns):
        rows.insert(0, Row(_origin_name(document), tuple(cells[0] for cells in columns), "original", "source"))
    legend = (
        "Below each score its standard error over the questions. Marked: worse than the original by more than twice the standard "
        "error of the difference, taken as if both had answered different questions.",
    )
    return Table("Scores on tasks", "candidate", tuple(heads), tuple(rows), legend)


def _task_places(scores: Sequence[TaskScore]) -> int:
    """Decimals that show the standard error with two figures."""
    errors = [score.error for score in scores if score.error]
    return min(4, decimals(errors, 2)) if errors else 4


def _score(value: float | None, error: float | None, places: int, tone: str = "") -> Cell:
    if value is None:
        return Cell("–")
    return Cell(fixed(value, places), "" if error is None else f"± {fixed(error, places)}", value=value, tone=tone)


def _task_cell(score: TaskScore | None, places: int) -> Cell:
    if score is None:
        return Cell("–")
    tone = ""
    if score.source_value is not None and score.error is not None and score.source_error is not None:
        lost = (score.source_value - score.value) * (1 if score.higher_is_better else -1)
        tone = "bad" if lost > 2 * math.hypot(score.error, score.source_error) else ""
    return _score(score.value, score.error, places, tone)


_RELATIONS = {"<=": "≤", ">=": "≥"}


def gate_table(document: Document) -> Table | None:
    """What every candidate came to for every limit; None where no gate was given."""
    found = [one for one in document.candidates if one.gate is not None]
    if not found:
        return None
    lines = [
        {(line.name, line.relation, line.limit): line for line in one.gate.lines} if one.gate else {} for one in found
    ]
    keys = list(dict.fromkeys(key for some in lines for key in some))
    columns = []
    for key in keys:
        places = decimals([some[key].value for some in lines if key in some], 3, most=5)
        columns.append([_gate_cell(some.get(key), places) for some in lines])
    rows = tuple(
        Row(one.name, (_pass(one.gate is not None and one.gate.passed), *(cells[i] for cells in columns)))
        for i, one in enumerate(found)
    )
    heads = (
        Head("", number=False),
        *(Head(f"{name} {_RELATIONS.get(relation, relation)} {limit:g}") for name, relation, limit in keys),
    )
    return Table("Limits, and what each candidate came to", "candidate", heads, rows)


def _pass(passed: bool) -> Cell:
    return Cell("pass" if passed else "fail", tone="good" if passed else "bad")


def _gate_cell(line: GateLine | None, places: int) -> Cell:
    if line is None:
        return Cell("–")
    return Cell(
        fixed(line.value, places),
        "" if line.passed else "fails",
        line.sentence,
        line.value,
        tone="" if line.passed else "bad",
    )


def gate_sentences(document: Document, chosen: Candidate) -> list[tuple[str, list[tuple[bool, str]]]]:
    """The limits in words: all of the chosen candidate's, and those that others failed."""
    found = []
    for one in [chosen, *(one for one in document.candidates if one is not chosen)]:
        if one.gate is not None:
            said = [(line.passed, line.sentence) for line in one.gate.lines if one is chosen or not line.passed]
            found.append((one.name, said))
    return [(name, said) for name, said in found if said]
