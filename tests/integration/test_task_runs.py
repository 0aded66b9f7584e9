"""Tasks over every kind of loaded model, from the command line, and without a network."""

import json

import pytest
from tests.small import EXAMPLES, STORY

from bitwright.evaluating import load_any, load_any_tokenizer
from bitwright.evaluation.tasks import run_tasks

pytest.importorskip("lm_eval")

TASKS = EXAMPLES / "tasks"
LIMIT = 40


def scores(path, **options):
    found = run_tasks(load_any(path), load_any_tokenizer(path), [str(TASKS)], limit=LIMIT, batch_size=8, **options)
    return {(score.task, score.metric): score.value for score in found}


@pytest.fixture(scope="module")
def original():
    return scores(STORY)


def test_the_example_model_does_much_better_than_chance(original):
    # Four answers; the standard error of 40 guesses is 0.07.
    assert original["story_endings", "acc"] > 0.25 + 0.14
    assert original["word_order", "acc"] > 0.9
    # One byte in eight bits says nothing; the model needs a fifth of that.
    assert original["story_text", "bits_per_byte"] < 2


def test_packed_and_decoded_weights_answer_alike(tmp_path, bitwright, original):
    code, _, err = bitwright(
        "quantize", STORY, "-o", tmp_path / "q", "--method", "rtn", "--bits", 8, "--layout", "gptq"
    )
    assert code == 0, err
    code, _, err = bitwright("quantize", STORY, "-o", tmp_path / "q.gguf", "--type", "Q8_0")
    assert code == 0, err
    for path in (tmp_path / "q", tmp_path / "q.gguf"):
        found = scores(path)
        assert found.keys() == original.keys()
        # Eight bits change next to nothing: at most one question of forty.
        assert found["story_endings", "acc"] == pytest.approx(original["story_endings", "acc"], abs=1 / LIMIT + 1e-9)
        assert found["story_text", "bits_per_byte"] == pytest.approx(original["story_text", "bits_per_byte"], rel=3e-3)


def test_eval_gives_pure_json_with_the_scores_of_both(bitwright, tmp_path):
    text = tmp_path / "t.txt"
    text.write_text((EXAMPLES / "storylm-8m-selfgen.txt").read_text()[:3000])
    code, out, err = bitwright(
        "eval", STORY, "--against", STORY, "--text", text, "--windows", 1, "--no-cache", "--tasks", TASKS / "word_order.yaml",
        "--task-limit", 8, "--json",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(out)["candidates"][0]["tasks"]
    assert [score["metric"] for score in found] == ["acc", "acc_norm"]
    assert all(score["samples"] == 8 and score["value"] == score["source_value"] for score in found)


def test_an_unknown_task_lists_near_names(bitwright):
    code, _, err = bitwright("eval", STORY, "--tasks", "arc_esy")
    assert code == 2
    assert "arc_easy" in err


def test_a_task_whose_data_cannot_be_fetched_is_an_error_of_the_network(bitwright, monkeypatch):
    import datasets

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'allenai/ai2_arc' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    code, _, err = bitwright("eval", STORY, "--tasks", "arc_easy")
    assert code == 6
    assert "task arc_easy: its data is not on this machine" in err
    assert "mend: " in err
