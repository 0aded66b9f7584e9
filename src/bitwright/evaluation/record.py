"""What is measured of a model, as plain frozen records: the same numbers go to the terminal, to JSON, to the model card and to the page."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = [
    "BlockError",
    "DeltaP",
    "Divergence",
    "Flips",
    "Increase",
    "LayerError",
    "Perplexity",
    "Quality",
    "Speed",
    "Spread",
    "TaskScore",
    "WeightHistogram",
]  # fmt: skip


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood over ``tokens`` predictions; nll, error: that mean and its standard error, in nats."""

    perplexity: float
    nll: float
    error: float
    tokens: int


@dataclass(frozen=True)
class Divergence:
    """KL(source || model) of the next-token distribution, in nats, over all positions that count. error: standard error of the mean."""

    mean: float
    error: float
    median: float
    p90: float
    p99: float
    p999: float
    max: float
    tokens: int


@dataclass(frozen=True)
class DeltaP:
    """Change of the probability of the text's own next token, model minus source, each between -1 and 1.

    rms: root of the mean square; p1 .. p99: percentiles (p1: one prediction in a hundred lost more than that).
    """

    mean: float
    error: float
    rms: float
    p1: float
    p10: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Flips:
    """Shares of predictions whose most likely token was the text's and is not any more, or became it (arXiv:2407.09141)."""

    right_to_wrong: float
    wrong_to_right: float

    @property
    def total(self) -> float:
        """Share of predictions that changed from right to wrong or back."""
        return self.right_to_wrong + self.wrong_to_right


@dataclass(frozen=True)
class Increase:
    """How much worse the text's own tokens are predicted than by the source, token by token.

    nll, error: mean difference of the negative log-likelihoods and its standard error, in nats; far smaller than the errors of both,
    which see the same text. perplexity, perplexity_error: the same as a difference of perplexities.
    """

    nll: float
    error: float
    perplexity: float
    perplexity_error: float


@dataclass(frozen=True)
class Quality:
    """A model on one text, or on all of them together; everything but ``model`` is None where no source was given.

    top1, top5: share of positions with the same most likely token; mean overlap of the five most likely ones (0 to 1).
    """

    model: Perplexity
    source: Perplexity | None = None
    kl: Divergence | None = None
    top1: float | None = None
    top5: float | None = None
    delta_p: DeltaP | None = None
    flips: Flips | None = None
    increase: Increase | None = None


@dataclass(frozen=True)
class LayerError:
    """What rounding one linear's weights does to its output, given the source model's own inputs.

    relative: E|(W' - W) x|^2 / E|W x|^2; snr_db: -10 log10 of it (None where it is 0); weight: |W' - W|^2 / |W|^2; role: its place in a
    block, for example ``self_attn.q_proj``; top_channels: share of the output error that comes from the 1 % of input channels that
    contribute most.
    """

    module: str
    block: int | None
    role: str
    scheme: str
    relative: float
    snr_db: float | None
    weight: float
    top_channels: float


@dataclass(frozen=True)
class BlockError:
    """The output of a decoder block, quantized against source: E|h' - h|^2 / E|h|^2.

    own: with the source's input; total: with the quantized model's own input, so that what earlier blocks did is in it.
    """

    block: int
    own: float
    total: float


@dataclass(frozen=True)
class WeightHistogram:
    """Weights of one module before and after. edges: ``bins + 1`` ascending bounds; source, model: shares that fall between them."""

    module: str
    edges: tuple[float, ...]
    source: tuple[float, ...]
    model: tuple[float, ...]


@dataclass(frozen=True)
class TaskScore:
    """A metric of lm-evaluation-harness. samples: how many questions; source_*: the same of the original, where it was run."""

    task: str
    metric: str
    value: float
    error: float | None
    samples: int
    higher_is_better: bool = True
    source_value: float | None = None
    source_error: float | None = None


@dataclass(frozen=True)
class Spread:
    """Median of repeated measurements, with the smallest and the largest."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Speed:
    """One model in one engine at one batch size. Times in milliseconds, rates in tokens a second over the whole batch, sizes in bytes.

    time_to_first_token: prompt in, first token out. inter_token: p50 and p99 over all tokens after the first. repetitions: measured ones,
    after the warm-up. peak_device_bytes: None without an accelerator. note: why there are no figures, where there are none.
    """

    name: str
    engine: str
    device: str
    dtype: str
    threads: int
    batch: int
    prompt_tokens: int
    new_tokens: int
    repetitions: int
    load_ms: float | None = None
    time_to_first_token_ms: Spread | None = None
    inter_token_p50_ms: float | None = None
    inter_token_p99_ms: float | None = None
    prompt_tokens_per_s: Spread | None = None
    new_tokens_per_s: Spread | None = None
    peak_resident_bytes: int | None = None
    peak_device_bytes: int | None = None
    note: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
