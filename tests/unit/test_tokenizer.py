import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from services.runtime.tokenizer import DataError, ModelError, PromptItem, PromptTokenizer, model_folder

TINY = Path(__file__).parents[2] / "deploy/models/tiny"
CHAT = [{"role": "user", "content": "What is 7+5?"}, {"role": "assistant", "content": "12."}, {"role": "user", "content": "And é €  <b>?\n"}]


@pytest.fixture(scope="module")
def tiny():
    return PromptTokenizer(TINY)


@pytest.fixture(scope="module")
def reference():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY)


def item(prompt):
    return PromptItem(id="p:1", prompt=prompt, answer=None)


def save_words(folder, **config):
    """A tokenizer of four words whose post-processor puts a BOS first."""
    vocabulary = {"<bos>": 0, "<eos>": 1, "one": 2, "two": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="one"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_text_becomes_bos_and_one_token_a_byte(tiny):
    ids = tiny.encode(item("17="), chat=False)
    assert ids[0] == 1
    assert [tiny.decode([i]) for i in ids[1:]] == ["1", "7", "="]
    assert len(tiny.encode(item("é€"), chat=False)) == 1 + 2 + 3


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_text_is_encoded_as_transformers_does_and_comes_back(tiny, reference, text):
    ids = tiny.encode(item(text), chat=False)
    assert ids == reference(text)["input_ids"]
    assert tiny.decode(ids) == reference.decode(ids, skip_special_tokens=True)
    assert tiny.decode(ids, skip_special=False) == reference.decode(ids)


@given(text=st.text(alphabet=st.characters(exclude_characters="<", exclude_categories=["Cs"]), max_size=60))
def test_every_text_comes_back(tiny, text):
    assert tiny.decode(tiny.encode(item(text), chat=False)) == text


def test_chat_is_rendered_as_transformers_does(tiny, reference):
    expected = reference.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    assert tiny.encode(item(CHAT), chat=True) == expected
    assert tiny.encode(item(CHAT), chat=False) == expected
    assert tiny.decode(expected, skip_special=False).endswith("<|im_start|>assistant\n")


def test_text_becomes_the_users_message_after_the_system_message(tiny, reference):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "7+5?"}]
    expected = reference.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert tiny.encode(item("7+5?"), chat=True, system="Be brief.") == expected
    assert tiny.encode(item(messages[1:]), chat=True, system="Be brief.") == expected


def test_system_message_of_the_prompt_is_kept(tiny):
    own = [{"role": "system", "content": "Own."}, {"role": "user", "content": "7+5?"}]
    assert tiny.encode(item(own), chat=True, system="Other.") == tiny.encode(item(own), chat=True)


def test_system_message_without_chat_is_refused(tiny):
    with pytest.raises(DataError, match=r"p:1.*data\.chat = true"):
        tiny.encode(item("7+5?"), chat=False, system="Be brief.")


def test_prompt_longer_than_the_limit_is_named_with_both_lengths(tiny):
    assert len(tiny.encode(item("17="), chat=False, limit=4)) == 4
    with pytest.raises(DataError, match=r"prompt p:1 has 4 tokens and the limit is 3"):
        tiny.encode(item("17="), chat=False, limit=3)


def test_template_of_the_configuration_has_what_transformers_gives_it(tmp_path):
    template = (
        "{{ bos_token }}{% for m in messages %}\n  {% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}\n"
        "{% if loop.index > 2 %}{% break %}{% endif %}{% generation %}{{ m | tojson }}{% endgeneration %}{{ eos_token }}\n{% endfor %}"
        "{% if tools is none and add_generation_prompt %}A:{% endif %}"
    )
    for file in ("tokenizer.json", "generation_config.json"):
        shutil.copy(TINY / file, tmp_path)
    config = json.loads((TINY / "tokenizer_config.json").read_text()) | {"bos_token": {"content": "<bos>", "__type": "AddedToken"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": [{"name": "default", "template": template}]}))
    from transformers import AutoTokenizer

    expected = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    mine = PromptTokenizer(tmp_path)
    assert mine.encode(item(CHAT), chat=True) == expected
    assert '"content": "What is 7+5?"}<eos>' in mine.decode(expected, skip_special=False)
    with pytest.raises(DataError, match=r"p:1.*no tools here"):
        mine.encode(item([{"role": "tool", "content": "x"}]), chat=True)


def test_template_cannot_reach_python(tmp_path):
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(TINY / file, tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages.__class__.__base__.__subclasses__() }}")
    with pytest.raises(DataError, match="p:1"):
        PromptTokenizer(tmp_path).encode(item(CHAT), chat=True)


def test_chat_without_a_template_is_refused(tmp_path):
    mine = PromptTokenizer(save_words(tmp_path))
    with pytest.raises(DataError, match=r"p:1.*data\.chat = false"):
        mine.encode(item("one"), chat=True)


@pytest.mark.parametrize("config", [{}, {"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}])
def test_specials_are_those_of_the_post_processor_whatever_the_flags_say(config, tmp_path):
    from transformers import AutoTokenizer

    folder = save_words(tmp_path, **config)
    assert PromptTokenizer(folder).encode(item("one two"), chat=False) == [0, 2, 3]
    assert AutoTokenizer.from_pretrained(folder)("one two")["input_ids"] == [0, 2, 3]


def test_prompt_without_tokens_is_refused(tmp_path):
    folder = save_words(tmp_path)
    saved = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(saved | {"post_processor": None}))
    with pytest.raises(DataError, match="p:1 has no tokens"):
        PromptTokenizer(folder).encode(item(" "), chat=False)


def test_end_tokens_are_those_of_generation_else_of_the_model_else_of_the_tokenizer(tmp_path):
    folder = save_words(tmp_path)
    assert PromptTokenizer(folder).eos_ids == (1,)
    (folder / "config.json").write_text('{"eos_token_id": 3}')
    assert PromptTokenizer(folder).eos_ids == (3,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 3]}')
    assert PromptTokenizer(folder).eos_ids == (1, 3)


def test_model_without_an_end_token_is_refused(tmp_path):
    with pytest.raises(ModelError, match="eos_token_id"):
        PromptTokenizer(save_words(tmp_path, eos_token=None))


def test_model_that_is_not_there_or_not_whole_is_named(tmp_path):
    with pytest.raises(ModelError, match="hf download no-one/nothing"):
        PromptTokenizer("no-one/nothing")
    with pytest.raises(ModelError, match="missing"):
        PromptTokenizer(tmp_path / "missing")
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        PromptTokenizer(tmp_path)
    folder = save_words(tmp_path)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json is not JSON"):
        PromptTokenizer(folder)


def test_name_in_the_local_cache_is_found(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--some--model/snapshots/abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--some--model/refs").mkdir()
    (tmp_path / "models--some--model/refs/main").write_text("abc")
    save_words(snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert model_folder("some/model") == snapshot
