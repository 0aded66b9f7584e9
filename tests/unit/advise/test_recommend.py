"""Advice against the decision tables of public guides, against memory, and against what the commands really do."""

import json
import shlex

import pytest
from tests.small import STORY, STORY_TEXT

import bitwright.api
from bitwright.advise import knowledge
from bitwright.advise.engines import CPU, engine, gpu
from bitwright.advise.knowledge import CANDIDATES, measured
from bitwright.advise.recommend import Subject, _try, recommend
from bitwright.advise.scenario import TASKS, Scenario
from bitwright.advise.shape import model_shape, shape_for
from bitwright.advise.stored import planned_weights
from bitwright.advise.trial import try_suggestions
from bitwright.cli.main import main
from bitwright.cli.recommend import app
from bitwright.errors import InputError

#: Which scheme for which GPU, and the use of each scheme.
SCHEMES = "https://docs.vllm.ai/projects/llm-compressor/en/0.11.0/steps/choosing-scheme/"
USES = "https://docs.vllm.ai/projects/llm-compressor/en/latest/guides/compression_schemes/"
#: Small and large batches, GPUs with and without float8.
NVIDIA = "https://nvidia.github.io/Model-Optimizer/guides/_choosing_quant_methods.html"
#: Which method of transformers for inference and for fine-tuning.
SELECTING = "https://huggingface.co/docs/transformers/quantization/selecting"
#: Which GGUF file: the table of quality words that accompanies bartowski's files, and three guides by memory and task.
BARTOWSKI = "https://ozeki.chat/p_8590-understanding-ai-model-files.html"
LARGEST = "https://mylocalai.org/blog/gguf-quantization-cheat-sheet"
LADDER = "https://solar.codes/blog/choosing-quantized-models/"
PRECISION = "https://llmconfigurator.com/en/guides/troubleshooting/which-gguf-quant"

W4A16 = {"awq", "gptq", "w4a16", "awq-gptq"}
FP8 = {"fp8", "fp8-block"}
FP4 = {"nvfp4", "mxfp4"}

CASES = [
    # guide, parameters, device, GB, further facts, recipes that the guide names
    (SCHEMES, 70, "b200", 180, {"engine": "vllm"}, FP4 | FP8),
    (SCHEMES, 8, "h100", 80, {"engine": "vllm"}, FP8),
    (SCHEMES, 70, "h200", 141, {"engine": "vllm"}, FP8),
    (SCHEMES, 8, "a100", 80, {"engine": "vllm"}, W4A16 | {"w8a8"}),
    (SCHEMES, 8, "rtx3090", 24, {"engine": "vllm"}, W4A16 | {"w8a8"}),
    (SCHEMES, 8, "t4", 16, {"engine": "vllm", "context": 4096}, W4A16 | {"w8a8"}),
    (SCHEMES, 3, "t4", 16, {"engine": "vllm", "task": "batch-serving", "batch": 8, "context": 2048}, {"w8a8"} | W4A16),
    (SCHEMES, 8, "v100", 32, {"engine": "vllm"}, set()),
    (USES, 8, "l40s", 48, {"task": "batch-serving", "batch": 16}, FP8),
    (USES, 8, "a10", 24, {"task": "batch-serving", "batch": 4}, {"w8a8"}),
    (USES, 8, "rtx4090", 24, {}, W4A16),
    (NVIDIA, 8, "l4", 24, {"batch": 1}, W4A16),
    (NVIDIA, 8, "a100", 80, {"batch": 4}, W4A16),
    (NVIDIA, 8, "h100", 80, {"batch": 16}, FP8),
    (NVIDIA, 8, "l40s", 48, {"batch": 16}, FP8),
    (NVIDIA, 8, "a100", 80, {"batch": 32}, {"w8a8"} | W4A16),
    (NVIDIA, 3, "t4", 16, {"batch": 16, "context": 2048}, {"w8a8"} | W4A16),
    (NVIDIA, 8, "h100", 80, {"task": "arithmetic"}, FP8),
    (SELECTING, 8, "rtx4090", 24, {"task": "finetune", "context": 2048}, {"nf4"}),
    (SELECTING, 3, "t4", 16, {"task": "finetune", "context": 1024}, {"nf4"}),
    (SELECTING, 8, "rtx4090", 24, {"engine": "transformers"}, {"gptq", "awq"}),
    (SELECTING, 8, "p100", 16, {"engine": "transformers", "context": 4096}, {"nf4"}),
    (BARTOWSKI, 8, "cpu", 16, {}, {"Q4_K_M"}),
    (BARTOWSKI, 3, "cpu", 8, {}, {"Q4_K_M"}),
    (BARTOWSKI, 70, "a6000", 48, {"engine": "llamacpp", "context": 4096}, {"Q4_K_M", "IQ4_XS"}),
    (LARGEST, 8, "rtx3060", 12, {"engine": "llamacpp"}, {"Q6_K", "Q5_K_M", "Q8_0"}),
    (LARGEST, 8, "rtx4060", 8, {"engine": "llamacpp", "context": 4096}, {"Q5_K_M", "Q4_K_M"}),
    (LARGEST, 8, "v100", 32, {}, {"Q8_0", "Q6_K"}),
    (LADDER, 8, "cpu", 32, {"task": "long-context", "context": 32768}, {"Q5_K_M", "Q6_K"}),
    (LADDER, 70, "cpu", 40, {"context": 4096}, {"Q3_K_M"}),
    (PRECISION, 8, "rtx4090", 24, {"engine": "llamacpp", "task": "code"}, {"Q5_K_M", "Q6_K"}),
    (PRECISION, 8, "cpu", 32, {"task": "code"}, {"Q5_K_M", "Q6_K"}),
    (PRECISION, 8, "cpu", 32, {"task": "arithmetic"}, {"Q6_K", "Q8_0"}),
]


def scenario(device, gb, **facts):
    return Scenario(hardware=CPU if device == "cpu" else gpu(device)[0], memory=int(gb * 1e9), **facts)


def of_size(billions):
    return Subject(shape=shape_for(int(billions * 1e9)))


@pytest.fixture(scope="module")
def story():
    config = json.loads((STORY / "config.json").read_text())
    return Subject(shape=model_shape(config), path=STORY, name=str(STORY), longest=2048)


def check(advice, asked):
    """What holds for every answer."""
    for one in advice.suggestions:
        assert one.memory.total_bytes <= one.budget < asked.memory
        reading = engine(one.engine).reading(CANDIDATES[one.name].kind)
        assert reading.refused_on(asked.hardware) is None
        assert reading.packed
    assert advice.path
    assert bool(advice.suggestions) != bool(advice.otherwise)


@pytest.mark.parametrize(("guide", "billions", "device", "gb", "facts", "accepted"), CASES)
def test_the_first_answer_is_one_that_the_guide_gives(guide, billions, device, gb, facts, accepted):
    asked = scenario(device, gb, **facts)
    advice = recommend(of_size(billions), asked)
    check(advice, asked)
    first = advice.suggestions[0].name if advice.suggestions else None
    assert first in accepted or (first is None and not accepted), (guide, advice.path)


def test_at_least_three_guides_and_twenty_cases_are_held_against_it():
    assert len(CASES) >= 20
    assert len({guide.split("/")[2] for guide, *_ in CASES}) >= 3


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("device", "gb"), [("cpu", 4), ("cpu", 64), ("t4", 16), ("rtx4090", 24), ("b200", 180), ("p100", 16)]
)
@pytest.mark.parametrize("billions", [0.4, 8, 70])
def test_no_answer_exceeds_the_memory_or_does_not_load(task, device, gb, billions):
    asked = scenario(device, gb, task=task, context=4096)
    check(recommend(of_size(billions), asked, most=20), asked)


def test_faithful_recipes_come_first_where_errors_add_up():
    found = recommend(of_size(70), scenario("h100", 80, task="arithmetic"), most=20).suggestions
    faithful = [one.name in ("fp8", "w8a16", "Q8_0", "Q6_K", "Q5_K_M") for one in found]
    assert faithful == sorted(faithful, reverse=True)
    assert found[0].name == "Q6_K"  # float8 does not fit; 6 bits do


def test_decoded_files_are_no_help_in_transformers():
    advice = recommend(of_size(8), scenario("rtx3090", 24, engine="transformers", task="arithmetic"))
    assert advice.refused["fp8-block (transformers)"] == "decoded to 16 bits while it runs: no memory is saved"
    advice = recommend(of_size(8), scenario("h100", 80, engine="transformers", task="arithmetic"), most=9)
    assert "fp8-block" in {one.name for one in advice.suggestions}


def test_the_decision_is_explained():
    path = " | ".join(recommend(of_size(8), scenario("a100", 40)).path)
    assert "40.00 GB less 4.00 GB" in path
    assert "float8: weights alone are compressed here; products start at 8.9" in path
    assert "vllm-gguf-plugin" in path
    assert "small batch" in path


def test_where_nothing_fits_it_says_what_would_and_that_is_true():
    subject, asked = of_size(8), scenario("cpu", 6, context=32768)
    advice = recommend(subject, asked)
    assert advice.suggestions == ()
    said = " | ".join(advice.otherwise)
    context = int(said.split("with --context ")[1].split(":")[0])
    assert recommend(subject, scenario("cpu", 6, context=context)).suggestions
    assert not recommend(subject, scenario("cpu", 6, context=2 * context)).suggestions
    needed = float(said.split("which takes ")[1].split(" GB")[0])
    assert recommend(subject, scenario("cpu", (needed + 0.01) * 4 / 3, context=32768)).suggestions


def test_a_small_kv_cache_is_offered_with_its_flags():
    subject = of_size(8)
    tight = next(
        gb for gb in (n / 4 for n in range(16, 80))
        if not recommend(subject, scenario("cpu", gb, context=32768)).suggestions
        and recommend(subject, scenario("cpu", gb, context=32768, kv="q8_0")).suggestions
    )  # fmt: skip
    assert "--kv q8_0" in " ".join(recommend(subject, scenario("cpu", tight, context=32768)).otherwise)
    start = recommend(subject, scenario("cpu", tight, context=32768, kv="q8_0")).suggestions[0].start
    assert "-ctk q8_0 -ctv q8_0" in start


def test_the_second_copy_of_weights_is_dropped_before_a_file_is():
    subject = of_size(8)
    with_copy = recommend(subject, scenario("cpu", 16)).suggestions[0]
    assert with_copy.name == "Q4_K_M"
    assert "--no-repack" not in with_copy.start
    tight = recommend(subject, scenario("cpu", 10)).suggestions[0]
    assert tight.name == "Q4_K_M"
    assert tight.start.endswith("--no-repack")
    assert tight.memory.total_bytes < with_copy.memory.total_bytes


# --- commands ----------------------------------------------------------------------------------------------------------------


class Caught(Exception):
    """Carries what a command would have done."""


@pytest.fixture
def caught(monkeypatch):
    """Runs a command line up to the work itself."""

    def instead(model, output, *, recipe, **_):
        raise Caught(model, output, recipe)

    monkeypatch.setattr(bitwright.api, "quantize", instead)
    monkeypatch.setattr(bitwright.api, "to_gguf", instead)

    def run(command):
        program, *arguments = shlex.split(command)
        assert program == "bitwright"
        with pytest.raises(Caught) as found:
            main(arguments)
        return found.value.args

    return run


@pytest.mark.parametrize("name", CANDIDATES)
def test_the_command_makes_the_recipe_that_was_advised_and_it_can_be_carried_out(name, story, caught):
    candidate = CANDIDATES[name]
    where = next(
        e for e in ("vllm", "llamacpp", "transformers", "bitwright") if engine(e).reading(candidate.kind).loads
    )
    asked = scenario("b200", 100, engine=where, context=1024)
    if engine(where).reading(candidate.kind).refused_on(asked.hardware):  # int8 products: not on Blackwell
        asked = scenario("a100", 80, engine=where, context=1024)
    one = _try(story, asked, where, candidate)
    assert not isinstance(one, str), one
    model, output, recipe = caught(one.command)
    assert model == str(STORY)
    assert output.suffix == (
        ".gguf" if name in ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "Q2_K") else ""
    )
    assert recipe == candidate.recipe()
    # What was forecast is what the plan of that very command says.
    planned = planned_weights(STORY, recipe).weights
    counted = one.memory.weights + one.memory.scales + one.memory.embeddings + one.memory.head
    assert counted == planned.total


def test_large_models_are_told_to_bring_calibration_text(caught):
    one = recommend(of_size(70), scenario("h200", 141, engine="vllm", task="chat", batch=1), most=9).suggestions
    commands = {suggestion.name: suggestion.command for suggestion in one}
    assert "--calibration" not in commands["fp8"]
    assert caught(commands["awq-gptq"])[2].calibration.text == "calibration.txt"
    mine = Subject(shape=shape_for(8_000_000_000), text="my text.txt")
    command = recommend(mine, scenario("rtx4090", 24)).suggestions[0].command
    assert caught(command)[2].calibration.text == "my text.txt"


def test_figures_are_those_that_were_measured():
    from pathlib import Path

    results = json.loads((Path(__file__).parents[3] / "benchmarks/results/recommend.json").read_text())
    lines = {line["name"]: line for line in results["results"]}
    assert set(lines) == set(CANDIDATES)
    for name, candidate in CANDIDATES.items():
        assert measured(name) == pytest.approx(lines[name]["kl_mean"], rel=5e-3)
        assert tuple(lines[name]["flags"]) == candidate.flags
    assert results["files"]["model"] in knowledge.quality_origin()


def test_measuring_ranks_by_the_loss_on_this_model(story, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(STORY_TEXT.read_text()[:6000])
    advice = recommend(story, scenario("cpu", 8, context=512))
    assert [one.name for one in advice.suggestions[:3]] == ["Q4_K_M", "Q5_K_M", "Q6_K"]
    found = try_suggestions(story, advice, most=3, text=text, windows=2)
    assert [one.name for one in found.suggestions] == ["Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS"]
    losses = [one.kl_here for one in found.suggestions]
    assert 0 < losses[0] < losses[1] < losses[2] < 0.1
    assert losses[3] is None
    with pytest.raises(InputError, match="at hand"):
        try_suggestions(of_size(8), advice)


# --- the command line --------------------------------------------------------------------------------------------------------


def call(capsys, *arguments):
    code = 0
    try:
        code = app([str(argument) for argument in arguments], standalone_mode=False) or 0
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().out


def test_json_is_pure_and_complete(capsys):
    code, out = call(capsys, "--params", "8B", "--gpu", "4090", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["scenario"]["memory_bytes"] == 24_000_000_000
    first = found["suggestions"][0]
    assert first["memory"]["total_bytes"] <= first["budget_bytes"]
    assert first["command"].startswith("bitwright quantize MODEL ")
    assert found["decision"]


def test_a_model_at_hand_is_planned_and_named(capsys):
    code, out = call(capsys, STORY, "--cpu-only", "--memory", "8GB")
    assert code == 0
    assert f"bitwright quantize {STORY} -o storylm-8m-Q4_K_M.gguf --type Q4_K_M" in out
    assert "-c 2048" in out  # no more than the model reads


def test_where_nothing_fits_the_exit_code_says_so(capsys):
    code, out = call(capsys, "--params", "70B", "--gpu-memory", "8GB")
    assert code == 1
    assert "Nothing fits" in out
    assert "taken for one of compute capability 8.0" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--params", "8B"], "no machine"),
        (["--gpu", "h100"], "one model"),
        (["--params", "8B", "--gpu", "h100", "--cpu-only"], "exclude each other"),
        (["--params", "8B", "--gpu-memory", "8GB", "--cpu-only"], "exclude each other"),
        (["--params", "8B", "--gpu", "h100", "--memory", "8GB"], "--memory is for --cpu-only"),
        (["--params", "8B", "--compute-capability", "9.0"], "memory of this GPU"),
        (["--params", "8B", "--gpu", "h100", "--task", "poetry"], "poetry"),
        (["--params", "8B", "--gpu", "h100", "--engine", "word"], "engine 'word'"),
        (["--params", "8B", "--gpu", "h100", "--engine", "vllm", "--finetune"], "not trained in vllm"),
        (["--params", "8B", "--gpu", "h100", "--engine", "peft"], "peft trains"),
        (["--params", "8B", "--gpu", "h100", "--measure"], "at hand"),
        (["--params", "8B", "--gpu", "h100", "--context", "0"], "at least 1"),
        ([STORY, "--cpu-only", "--memory", "8GB", "--context", "4096"], "reads 2048 tokens"),
    ],
)
def test_questions_that_make_no_sense_are_refused(capsys, arguments, message):
    with pytest.raises(InputError, match=message):
        call(capsys, *arguments)
