"""Task files, and scores against log-likelihoods that are computed here with nothing but transformers."""

import json
import math
import random
import sys

import numpy as np
import pytest
import torch
from tests.small import EXAMPLES, STORY

from bitwright.errors import InputError, NumericError
from bitwright.evaluation import tasks as module
from bitwright.evaluation.task_files import is_task_path, read_task_files

pytest.importorskip("lm_eval")

TASKS = EXAMPLES / "tasks"


@pytest.fixture(scope="module")
def story():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(STORY, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(STORY)


def log_likelihood(model, tokenizer, context, continuation):
    """Sum over the continuation's tokens, in float64; greedy: each of them is the most likely one."""
    start = tokenizer(context, add_special_tokens=False)["input_ids"] if context else [tokenizer.bos_token_id]
    whole = tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
    whole = whole if context else start + whole
    with torch.no_grad():
        scores = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return sum(scores[i - 1, whole[i]].item() for i in range(len(start), len(whole)))


def rows(name):
    return [json.loads(line) for line in (TASKS / name).read_text().splitlines()]


def by_metric(scores):
    return {(score.task, score.metric): score for score in scores}


def write_task(folder, text, data=None, name="made"):
    folder.mkdir(exist_ok=True)
    if data is not None:
        (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    file = folder / f"{name}.yaml"
    file.write_text(text)
    return file


CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: data.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""
QUESTIONS = [{"question": "He said", "choices": ["that he would go.", "would that go he."], "answer": 0}] * 3


def test_multiple_choice_scores_are_those_of_a_plain_computation(story):
    found = by_metric(module.run_tasks(*story, [str(TASKS / "story_endings.yaml")], limit=24, batch_size=8))
    right, right_by_length = [], []
    for row in rows("story_endings.jsonl")[:24]:
        scores = [log_likelihood(*story, row["beginning"], f" {ending}") for ending in row["endings"]]
        by_length = [score / len(ending) for score, ending in zip(scores, row["endings"], strict=True)]
        right.append(int(np.argmax(scores)) == row["answer"])
        right_by_length.append(int(np.argmax(by_length)) == row["answer"])
    score = found["story_endings", "acc"]
    assert score.value == np.mean(right)
    assert score.error == pytest.approx(np.std(right, ddof=1) / math.sqrt(24))
    assert score.samples == 24
    assert score.higher_is_better
    assert found["story_endings", "acc_norm"].value == np.mean(right_by_length)


def test_text_scores_are_those_of_a_plain_computation(story):
    found = by_metric(module.run_tasks(*story, [str(TASKS / "story_text.yaml")], limit=10))
    total, size = 0.0, 0
    for row in rows("word_order.jsonl")[:10]:
        text = f"{row['beginning']} {row['endings'][row['answer']]}"
        total, size = total + log_likelihood(*story, "", text), size + len(text.encode())
    score = found["story_text", "bits_per_byte"]
    assert score.value == pytest.approx(-total / size / math.log(2), rel=1e-5)
    assert not score.higher_is_better


def test_generated_text_is_greedy_decoding(story, tmp_path):
    model, tokenizer = story
    prompts = ["The old man sat down by the", "She was so"]
    expected = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
        for _ in range(6):
            with torch.no_grad():
                ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        expected.append(tokenizer.decode(ids[0])[len(prompt) :].split(".")[0])
    data = [{"prompt": p, "answer": a} for p, a in zip(prompts, [expected[0], "not this"], strict=True)]
    file = write_task(
        tmp_path / "t",
        """
task: continue
dataset_path: json
dataset_kwargs: {data_files: {test: data.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["."], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
""",
        data,
    )
    found = module.run_tasks(model, tokenizer, [str(file)], batch_size=2)
    assert [(score.metric, score.value, score.samples) for score in found] == [("exact_match", 0.5, 2)]


def test_batch_size_does_not_change_scores(story):
    one, eight = (by_metric(module.run_tasks(*story, [str(TASKS)], limit=12, batch_size=size)) for size in (1, 8))
    assert one.keys() == eight.keys()
    for key, score in one.items():
        assert eight[key].value == pytest.approx(score.value, rel=1e-5)


def test_a_second_run_gives_the_same_numbers(story):
    assert module.run_tasks(*story, [str(TASKS)], limit=6) == module.run_tasks(*story, [str(TASKS)], limit=6)


def test_a_folder_means_all_its_tasks_in_order_and_its_groups_by_name(story, tmp_path):
    folder = tmp_path / "set"
    for name in ("b", "a"):
        write_task(folder, CHOICE.format(name=name), QUESTIONS, name)
    group = "group: both\ntask: [a, b]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    file = write_task(folder, group, name="zz")
    assert [score.task for score in module.run_tasks(*story, [str(folder)])] == ["a", "b"]
    found = by_metric(module.run_tasks(*story, [str(file)]))
    assert found["both", "acc"].value == found["a", "acc"].value == 1.0
    assert found["both", "acc"].samples == 6


def test_a_task_of_the_folder_include_is_known_by_name(story, tmp_path):
    write_task(tmp_path / "set", CHOICE.format(name="mine"), QUESTIONS)
    assert module.run_tasks(*story, ["mine"], include=tmp_path / "set")[0].task == "mine"


def test_examples_before_the_question_are_chosen_by_the_seed(story, tmp_path):
    data = [{"question": f"Number {i}", "choices": [f"is {i}.", f"was {i}."], "answer": i % 2} for i in range(8)]
    text = CHOICE.format(name="few") + "fewshot_split: test\n"
    text = text.replace("metric: acc", "metric: brier_score")
    file = str(write_task(tmp_path / "t", text, data))
    values = [module.run_tasks(*story, [file], fewshot=2, seed=seed)[0].value for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2]
    assert values[0] != module.run_tasks(*story, [file], fewshot=0)[0].value


def test_nothing_is_printed_and_random_states_stay(story, tmp_path, capfd):
    # `median` has no formula for its error, so that the harness resamples, which it says on stdout.
    file = write_task(
        tmp_path / "t", CHOICE.format(name="t").replace("metric: acc", "metric: acc, aggregation: median"), QUESTIONS
    )
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert module.run_tasks(*story, [str(file)])[0].value == 1.0
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert capfd.readouterr().out == ""


def test_the_tokenizer_keeps_having_no_padding_token(story, tmp_path):
    file = write_task(tmp_path / "t", CHOICE.format(name="t"), QUESTIONS)
    module.run_tasks(*story, [str(file)])
    assert story[1].pad_token_id is None


def test_a_task_that_imports_python_needs_leave(story, tmp_path):
    folder = tmp_path / "t"
    file = write_task(folder, CHOICE.format(name="coded") + "process_docs: !function beside.keep\n", QUESTIONS)
    (folder / "beside.py").write_text("import sys\nsys.imported_by_task = True\ndef keep(docs):\n    return docs\n")
    with pytest.raises(InputError, match="imports Python code") as error:
        module.run_tasks(*story, [str(file)])
    assert "--allow-code-execution" in error.value.mend
    assert not hasattr(sys, "imported_by_task")
    try:
        assert module.run_tasks(*story, [str(file)], allow_code_execution=True)[0].value == 1.0
        assert sys.imported_by_task
    finally:
        vars(sys).pop("imported_by_task", None)


def test_code_in_an_included_file_is_seen(tmp_path):
    write_task(tmp_path, "process_docs: !function beside.keep\n", name="_base")
    file = write_task(tmp_path, "task: t\ninclude: _base.yaml\n")
    assert read_task_files(file)[0].code
    assert [task.name for task in read_task_files(tmp_path)] == ["t"]


def test_tasks_that_run_generated_programs_need_leave(story, tmp_path):
    file = write_task(tmp_path / "t", CHOICE.format(name="unsafe") + "unsafe_code: true\n", QUESTIONS)
    group = write_task(tmp_path / "t", "group: g\ntask: [unsafe]\n", name="g")
    for named in (file, group):
        with pytest.raises(InputError, match="runs programs that the model writes"):
            module.check_tasks([str(named)])
    module.check_tasks([str(file)], allow_code_execution=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: [", "not valid YAML"),
        ("- a\n- b\n", "a mapping of keys is expected"),
        ("dataset_path: json\n", "no YAML file in this folder describes a task|names neither"),
        ("task: t\ninclude: made.yaml\n", "includes itself"),
        ("task: t\ninclude: other.yaml\n", "cannot be read"),
        (
            "task: t\ndataset_path: json\ndataset_kwargs: {data_files: gone.jsonl}\n",
            "gone.jsonl: the task names this file",
        ),
        ("task: !!python/object/apply:os.system [ls]\n", "not valid YAML"),
    ],
)
def test_damaged_task_files_are_refused_with_their_name(tmp_path, text, message):
    file = write_task(tmp_path / "t", text)
    with pytest.raises(InputError, match=message) as error:
        module.check_tasks([str(file)])
    assert "made.yaml" in str(error.value) or "t/" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('doc_to_text: "{{question}}"', 'doc_to_text: "{{nothing}}"'), "nothing"),
        (("output_type: multiple_choice", "output_type: what"), "what"),
        (("metric: acc", "metric: nonsense_metric"), "made.yaml: not a task that can be run"),
    ],
)
def test_tasks_that_do_not_fit_their_data_are_refused(story, tmp_path, change, message):
    text = CHOICE.format(name="t")
    assert change[0] in text
    file = write_task(tmp_path / "t", text.replace(*change), QUESTIONS)
    with pytest.raises(InputError, match=message):
        module.run_tasks(*story, [str(file)])


def test_two_tasks_of_one_name_are_refused(tmp_path):
    files = [str(write_task(tmp_path / name, CHOICE.format(name="same"), QUESTIONS)) for name in "ab"]
    with pytest.raises(InputError, match="both describe the task same"):
        module.check_tasks(files)


@pytest.mark.parametrize("options", [{"limit": 0}, {"fewshot": -1}, {"batch_size": 0}, {"tasks": []}])
def test_senseless_numbers_are_refused(options):
    with pytest.raises(InputError):
        module.run_tasks(None, None, **{"tasks": [str(TASKS)], **options})


def test_a_tokenizer_without_beginning_and_end_is_refused(llama, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama), AutoTokenizer.from_pretrained(llama)
    file = write_task(tmp_path / "t", CHOICE.format(name="t"), QUESTIONS)
    with pytest.raises(InputError, match="neither a BOS nor an EOS"):
        module.run_tasks(model, tokenizer, [str(file)])


def test_a_score_that_is_not_a_number_is_an_error():
    found = {"results": {"t": {"alias": "t", "acc,none": float("nan")}}, "higher_is_better": {}, "n-samples": {}}
    with pytest.raises(NumericError, match="acc is nan"):
        module._scores(found)


def test_only_paths_are_taken_for_files():
    assert is_task_path("x.yml")
    assert is_task_path("folder/x")
    assert not is_task_path("mmlu_anatomy")
    with pytest.raises(InputError, match="no such task file"):
        module.check_tasks(["gone/x.yaml"])
