"""Documents for the page: the figures are made up by formulas, plausible, and nobody's measurement."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from bitwright.evaluation.record import (
    BlockError,
    DeltaP,
    Divergence,
    Flips,
    LayerError,
    Perplexity,
    Quality,
    Speed,
    Spread,
    TaskScore,
    WeightHistogram,
)
from bitwright.report.document import Activation, Candidate, Document, GateLine, GateResult, Measurement, Origin, Size

ROLES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
INPUTS = ("self_attn.q_proj, k_proj, v_proj", "self_attn.o_proj", "mlp.gate_proj, up_proj", "mlp.down_proj")
#: name, bits per weight, mean KL
TWELVE = (
    ("rtn-int8-g128", 8.13, 0.00003),
    ("fp8-e4m3", 8.10, 0.00047),
    ("gptq-int4-g128", 4.13, 0.00303),
    ("awq+gptq-int4-g128", 4.13, 0.00297),
    ("search-int4-g128", 4.13, 0.00708),
    ("rtn-int4-g128", 4.13, 0.00901),
    ("nf4-double", 4.13, 0.00585),
    ("gptq-nvfp4", 4.50, 0.00246),
    ("gptq-mxfp4", 4.25, 0.00358),
    ("spqr-3.5", 3.50, 0.00691),
    ("gptq-int3-g128", 3.13, 0.01268),
    ("gptq-int2-g32", 2.50, 0.06924),
)
PARAMETERS = 7_890_000_000
SOURCE = 6.2431


def wave(*seeds: float) -> float:
    """A number between 0 and 1 that looks arbitrary and is the same every time."""
    value = math.sin(sum((i + 1) * 12.9898 * seed for i, seed in enumerate(seeds, 1))) * 43758.5453
    return value - math.floor(value)


def quality(kl: float, *, perplexity: float = SOURCE, tokens: int = 65536, against: bool = True) -> Quality:
    model = perplexity * (1 + 1.9 * kl**1.04)
    if not against:
        return Quality(Perplexity(model, math.log(model), 0.01, tokens))
    return Quality(
        model=Perplexity(model, math.log(model), 0.0121, tokens),
        source=Perplexity(perplexity, math.log(perplexity), 0.012, tokens),
        kl=Divergence(kl, kl / 80, kl * 0.42, kl * 2.3, kl * 7.5, kl * 26, kl * 140, tokens),
        top1=1 - 0.55 * math.sqrt(kl),
        top5=1 - 0.48 * math.sqrt(kl),
        delta_p=DeltaP(
            -kl / 4,
            kl / 100,
            0.35 * math.sqrt(kl),
            -math.sqrt(kl),
            -0.3 * math.sqrt(kl),
            0,
            0.3 * math.sqrt(kl),
            0.9 * math.sqrt(kl),
        ),
        flips=Flips(0.12 * math.sqrt(kl), 0.1 * math.sqrt(kl)),
    )


def layers(kl: float, blocks: int, seed: int) -> tuple[LayerError, ...]:
    found = []
    for block in range(blocks):
        for place, role in enumerate(ROLES):
            depth = block / max(1, blocks - 1)
            worse = (
                1.8 * (role == "mlp.down_proj" and block < 2)
                + 0.9 * depth
                + 0.25 * place
                + 1.3 * wave(seed, block, place)
            )
            relative = 0.35 * kl * 2.0 ** (worse - 1.4)
            found.append(
                LayerError(
                    f"model.layers.{block}.{role}",
                    block,
                    role,
                    "int4 g128 sym",
                    relative,
                    -10 * math.log10(relative),
                    relative * 1.3,
                    0.02 + 0.3 * wave(place, block),
                )
            )
    head = 0.1 * kl
    found.append(LayerError("lm_head", None, "lm_head", "int8", head, -10 * math.log10(head), head, 0.03))
    return tuple(found)


def blocks_of(kl: float, blocks: int, seed: int) -> tuple[BlockError, ...]:
    total, found = 0.0, []
    for block in range(blocks):
        own = 0.12 * kl * (0.5 + wave(seed, block) + (3.0 if block == 1 else 0))
        total = 0.86 * total + own
        found.append(BlockError(block, own, total))
    return tuple(found)


def histogram(module: str, levels: int) -> WeightHistogram:
    bins = 61
    edges = tuple(-0.12 + 0.24 * i / bins for i in range(bins + 1))
    middles = [(a + b) / 2 for a, b in pairwise(edges)]
    source = [math.exp(-0.5 * (middle / 0.03) ** 2) for middle in middles]
    step = 0.2 / levels
    model = [0.0] * bins
    for middle, share in zip(middles, source, strict=True):
        snapped = round(middle / step) * step * 0.98
        model[min(bins - 1, max(0, int((snapped + 0.12) / 0.24 * bins)))] += share
    total = sum(source)
    return WeightHistogram(module, edges, tuple(s / total for s in source), tuple(m / total for m in model))


def speed(name: str, engine: str, device: str, batch: int, bits: float) -> Speed:
    slow = (12.0 if device == "cpu" else 1.0) * bits / 4
    first, rate = 38 * slow * (1 + 0.35 * (batch - 1)), 96 * batch**0.8 / slow
    return Speed(
        name,
        engine,
        device,
        "bfloat16",
        8,
        batch,
        512,
        128,
        7,
        load_ms=2400.0,
        time_to_first_token_ms=Spread(first, first * 0.96, first * 1.09),
        inter_token_p50_ms=1000 * batch / rate,
        inter_token_p99_ms=1300 * batch / rate,
        prompt_tokens_per_s=Spread(512 * batch / first * 1000, 490 * batch / first * 1000, 520 * batch / first * 1000),
        new_tokens_per_s=Spread(rate, rate * 0.95, rate * 1.02),
        peak_resident_bytes=int(PARAMETERS * bits / 8 + 9e8),
        peak_device_bytes=None if device == "cpu" else int(PARAMETERS * bits / 8 + 6e8),
        versions={"transformers": "5.20.0"},
    )


def tasks(kl: float, seed: int) -> tuple[TaskScore, ...]:
    found = []
    for i, (task, metric, value, samples) in enumerate(
        (
            ("arc_easy", "acc_norm", 0.812, 2376),
            ("hellaswag", "acc_norm", 0.791, 10042),
            ("piqa", "acc", 0.803, 1838),
            ("wikitext", "word_perplexity", 8.91, 62),
        )
    ):
        better = metric != "word_perplexity"
        error = math.sqrt(value * (1 - value) / samples) if better else 0.21
        change = (-0.22 if better else 12) * kl + 0.004 * (wave(seed, i) - 0.5)
        found.append(TaskScore(task, metric, value + change, error, samples, better, value, error))
    return tuple(found)


def gate(found: Quality, limit: float) -> GateResult:
    assert found.kl is not None and found.source is not None and found.top1 is not None  # noqa: PT018
    change = found.model.perplexity / found.source.perplexity - 1
    lines = (
        GateLine(
            name="mean KL",
            relation="<=",
            limit=limit,
            value=found.kl.mean,
            passed=found.kl.mean <= limit,
            sentence=f"mean KL {found.kl.mean:.5f} is {'within' if found.kl.mean <= limit else 'above'} {limit}",
        ),
        GateLine(
            name="perplexity increase",
            relation="<",
            limit=0.01,
            value=change,
            passed=change < 0.01,
            sentence=f"perplexity rose by {100 * change:.2f} %, {'below' if change < 0.01 else 'not below'} 1 %",
        ),
        GateLine(
            name="top-1",
            relation=">=",
            limit=0.95,
            value=found.top1,
            passed=found.top1 >= 0.95,
            sentence=f"the same top token in {100 * found.top1:.1f} % of positions, {'at least' if found.top1 >= 0.95 else 'under'} 95 %",
        ),
    )
    return GateResult(passed=all(line.passed for line in lines), lines=lines)


def candidate(name: str, bits: float, kl: float, *, blocks: int = 8, seed: int = 1, **changes: Any) -> Candidate:
    """Everything that a candidate can have."""
    found = quality(kl)
    fields: dict[str, Any] = {
        "name": name,
        "layout": "compressed-tensors" if seed % 3 else "gguf",
        "method": name.split("-", maxsplit=1)[0],
        "scheme": f"int{bits:.0f} symmetric, groups of 128",
        "size": Size(
            weight_file_bytes=int(PARAMETERS * bits / 8 + 1.1e6 * seed),
            parameters=PARAMETERS,
            bits_per_weight=bits,
            quantized_bits_per_weight=bits - 0.05,
        ),
        "quality": found,
        "domains": {
            "books.txt": quality(kl * 0.8, perplexity=9.31),
            "code.py": quality(kl * 1.7, perplexity=2.87),
            "wiki.txt": found,
        },
        "blocks": blocks_of(kl, blocks, seed),
        "layers": layers(kl, blocks, seed),
        "histograms": tuple(
            histogram(f"model.layers.{b}.{role}", 2 ** round(bits))
            for b, role in ((0, "self_attn.q_proj"), (0, "mlp.down_proj"), (blocks - 1, "mlp.up_proj"))
        ),
        "tasks": tasks(kl, seed),
        "speed": tuple(
            speed(name, engine, device, batch, bits)
            for engine, device in (("transformers", "cuda"), ("llama.cpp", "cpu"))
            for batch in (1, 8)
        ),
        "gate": gate(found, 0.005),
        "loads_in": {
            "transformers": None,
            "vllm": None,
            "llama.cpp": None if seed % 3 == 0 else "llama.cpp reads GGUF files alone",
            "exllama": "symmetric 4-bit groups only" if bits > 5 else None,
        },
        "recipe": {
            "method": "gptq",
            "bits": round(bits),
            "group_size": 128,
            "symmetric": True,
            "layout": "compressed-tensors",
            "method_options": {"damp": 0.01, "order": "activation"},
            "keep": ["lm_head"],
        },
        "files": {
            "model-00001-of-00002.safetensors": "sha256:" + f"{seed:x}" * 64,
            "model-00002-of-00002.safetensors": "sha256:" + f"{(seed + 3) % 16:x}" * 64,
        },
        "hashes": {
            f"model.layers.{b}.mlp.down_proj.weight": f"{b % 16:x}{seed % 16:x}" * 32 for b in range(min(blocks, 8))
        },
        "fallbacks": (
            {
                "tensor": "model.layers.0.mlp.down_proj.weight",
                "fallback": "Hessian not positive definite at damp 0.01: damp 0.1",
            },
        )
        if seed % 4 == 1
        else (),
        "notes": ("lm_head stays in bfloat16",),
        "seconds": 412.0 + 30 * seed,
    }
    return Candidate(**{**fields, **changes})


def activations(blocks: int) -> tuple[Activation, ...]:
    found = []
    for block in range(blocks):
        for place, label in enumerate(INPUTS):
            largest = 4 + 30 * wave(block, place) * (1 + place) * (40 if (block, place) == (1, 3) else 1)
            tensor = max(0.2, math.log2(largest) - 2.2)
            token = max(0.0, tensor - 2.0)
            advice = "fine" if tensor <= 2 else "per-token" if token <= 2 else "smoothquant" if token <= 5 else "keep"
            found.append(
                Activation(
                    block=block,
                    label=label,
                    largest=largest,
                    lost_bits_tensor=tensor,
                    lost_bits_token=token,
                    advice=advice,
                )
            )
    return tuple(found)


def document(*candidates: Candidate, blocks: int = 8, **changes: Any) -> Document:
    fields: dict[str, Any] = {
        "bitwright": "0.1.0",
        "title": "Example-8B, quantized twelve ways",
        "source": Origin(
            name="Example-8B",
            model_type="llama",
            files={f"model-0000{i}-of-00004.safetensors": "sha256:" + f"{i}f" * 32 for i in range(1, 5)},
            size=Size(weight_file_bytes=2 * PARAMETERS, parameters=PARAMETERS, bits_per_weight=16.0),
        ),
        "source_speed": tuple(
            speed("original", engine, device, batch, 16)
            for engine, device in (("transformers", "cuda"), ("llama.cpp", "cpu"))
            for batch in (1, 8)
        ),
        "measurement": Measurement(
            convention="non-overlapping",
            length=512,
            stride=None,
            windows=128,
            dtype="bfloat16",
            texts={"books.txt": 24576, "code.py": 16384, "wiki.txt": 24576},
        ),
        "candidates": candidates,
        "activations": activations(blocks),
        "environment": {
            "python": "3.12.4",
            "torch": "2.9.1",
            "transformers": "5.20.0",
            "processor": "Example CPU, 16 threads",
            "accelerator": "Example GPU, 80 GB",
        },
        "not_measured": ("llama.cpp at batch 32: the machine has too little memory",),
    }
    return Document(**{**fields, **changes})


def twelve(blocks: int = 8) -> Document:
    """Twelve candidates close together, with everything."""
    return document(
        *(candidate(name, bits, kl, blocks=blocks, seed=i + 1) for i, (name, bits, kl) in enumerate(TWELVE)),
        blocks=blocks,
    )


def bare() -> Document:
    """One candidate of which nothing but its size is known."""
    return Document(
        bitwright="0.1.0",
        title="out",
        source=None,
        measurement=None,
        candidates=(Candidate(name="out", layout="native", size=Size(weight_file_bytes=7_467_840)),),
    )


def single() -> Document:
    """One candidate with its quality, as ``bitwright eval`` makes it."""
    one = Candidate(
        name="storylm-gptq",
        layout="gptq",
        method="gptq",
        scheme="int4 g128",
        quality=quality(0.0031, perplexity=35.41),
        size=Size(weight_file_bytes=4_120_000, parameters=7_980_000, bits_per_weight=4.13),
    )
    return Document(
        bitwright="0.1.0",
        title="storylm-gptq",
        candidates=(one,),
        source=Origin(
            name="storylm-8m",
            model_type="llama",
            size=Size(weight_file_bytes=14_900_000, parameters=7_980_000, bits_per_weight=16.0),
        ),
        measurement=Measurement(
            convention="sliding", length=1024, stride=512, windows=16, dtype="float32", texts={"books.txt": 8703}
        ),
    )


def deep() -> Document:
    """Two candidates of a model of eighty blocks."""
    return document(
        candidate("gptq-int4", 4.13, 0.0012, blocks=80, seed=2),
        candidate("gptq-int3", 3.13, 0.0071, blocks=80, seed=3),
        blocks=80,
    )


#: Names that break pages: markup, mathematics, control characters, direction overrides, and too much of everything.
HOSTILE = (
    "<script>alert(1)</script>",
    "$\\frac{a}{b}$ & $x$",
    "two\nlines\tand\ra \x1b[31mcolour\x00",
    "x" * 900,
    "\u202eright to left\u2066",
    "שלום עולם",
    "'\"><img src=x onerror=alert(1)>",
    "{{ 7 * 7 }}{% raw %}",
    "模型量化",
    "</style></svg></title>",
    "_^{}\\%#~",
)


def hostile() -> Document:
    """Strangers' names wherever a document has one."""

    def name(index: int) -> str:
        return HOSTILE[index % len(HOSTILE)]

    found = []
    for i, text in enumerate(HOSTILE):
        one = candidate(f"{text}", 3 + 0.4 * i, 0.02 / (i + 1), seed=i + 1)
        found.append(
            one.model_copy(
                update={
                    "layout": name(i + 1),
                    "method": name(i + 2),
                    "scheme": name(i + 3),
                    "notes": (name(i + 4),),
                    "domains": {name(i): one.quality, name(i + 1): one.quality},
                    "layers": tuple(
                        LayerError(name(j), b, name(j), name(j + 1), 0.01, 20.0, 0.01, 0.1)
                        for b in range(3)
                        for j in range(len(HOSTILE))
                    ),
                    "histograms": tuple(
                        WeightHistogram(name(j), h.edges, h.source, h.model) for j, h in enumerate(one.histograms)
                    ),
                    "tasks": tuple(TaskScore(name(j), name(j + 1), 0.5, 0.01, 10, True, 0.6, 0.01) for j in range(3)),
                    "speed": (speed(text, name(i), name(i + 1), 1, 4),),
                    "gate": GateResult(
                        passed=False,
                        lines=(
                            GateLine(
                                name=name(i), relation="<", limit=1.0, value=2.0, passed=False, sentence=name(i + 1)
                            ),
                        ),
                    ),
                    "loads_in": {name(j): name(j + 1) for j in range(4)},
                    "recipe": {name(j): [name(j + 1)] for j in range(4)},
                    "files": {text: text},
                    "hashes": {text: text},
                    "fallbacks": ({"tensor": text, "fallback": text},),
                }
            )
        )
    return document(
        *found,
        title=HOSTILE[0],
        bitwright=HOSTILE[0],
        environment={text: text for text in HOSTILE},
        not_measured=HOSTILE,
        source=Origin(name=HOSTILE[0], model_type=HOSTILE[1], files={text: text for text in HOSTILE}),
        measurement=Measurement(
            convention=HOSTILE[0], length=5, stride=None, windows=1, dtype=HOSTILE[1], texts=dict.fromkeys(HOSTILE, 5)
        ),
        activations=tuple(
            Activation(block=0, label=text, largest=5.0, lost_bits_tensor=3.0, lost_bits_token=1.0, advice=text)
            for text in HOSTILE
        ),
    )
