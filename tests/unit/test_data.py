import json
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.contracts.spec import Data, RunSpec
from services.control_plane.data import DataError, PromptItem, issue, open_source, shuffled_index

ROOT = Path(__file__).parents[2]
ROWS = [{"prompt": f"{a}+1=", "answer": a + 1, "note": "x"} for a in range(5)]
EXPECTED = [(f"{a}+1=", a + 1) for a in range(5)]


def write_jsonl(path: Path, lines: list[object]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), encoding="utf-8")
    return path


def refusal(**data: object) -> str:
    with pytest.raises(DataError) as caught:
        open_source(Data(**data), seed=0)
    return str(caught.value)


def _refused(data: Data, seed: int) -> str:
    try:
        open_source(data, seed=seed)
    except DataError as error:
        return str(error)
    return ""


# The order of prompts.


@given(size=st.integers(1, 300), seed=st.integers(0, 2**31 - 1), epoch=st.integers(0, 1000))
def test_every_epoch_issues_each_prompt_once(size, seed, epoch):
    places = [shuffled_index(epoch * size + i, size=size, seed=seed) for i in range(size)]
    assert sorted(places) == list(range(size))


def test_order_differs_between_epochs_and_between_seeds():
    def order(epoch: int, seed: int) -> list[int]:
        return [shuffled_index(epoch * 33 + i, size=33, seed=seed) for i in range(33)]

    assert len({tuple(order(epoch, seed)) for epoch in range(5) for seed in range(5)}) == 25
    assert order(0, 0) != list(range(33))


def test_order_is_the_same_on_every_machine():
    assert [shuffled_index(n, size=33, seed=7) for n in range(8)] == [28, 19, 2, 20, 18, 0, 8, 17]


def test_every_place_comes_first_about_as_often():
    first = Counter(shuffled_index(epoch * 10, size=10, seed=1) for epoch in range(5000))
    chi_squared = sum((first[place] - 500) ** 2 / 500 for place in range(10))
    assert chi_squared < 27.9  # 9 degrees of freedom, p = 0.001


def test_order_of_a_huge_source_needs_no_table():
    assert 0 <= shuffled_index(10**15 + 3, size=10**12, seed=0) < 10**12


def test_cursor_is_the_issue_index_alone():
    source = open_source(Data(), seed=3)
    straight = [issue(source, n, seed=3) for n in range(100)]
    resumed = open_source(Data(), seed=3)
    assert [issue(resumed, n, seed=3) for n in range(60, 100)] == straight[60:]


# Procedural sources.


def test_sum_to_target_asks_for_two_digits():
    source = open_source(Data(), seed=0)
    assert len(source) == 33
    assert source[0] == PromptItem(id="sum_to_target:8", prompt="08=", answer=8)
    assert source[32] == PromptItem(id="sum_to_target:40", prompt="40=", answer=40)


def test_sum_to_target_takes_a_range_or_a_list_of_targets():
    assert [item.answer for item in map(open_source(Data(options={"min_target": 41, "max_target": 43}), seed=0).__getitem__, range(3))] == [
        41,
        42,
        43,
    ]
    listed = open_source(Data(options={"targets": [12, 9]}), seed=0)
    assert [listed[0].prompt, listed[1].prompt] == ["12=", "09="]


def test_size_draws_targets_by_the_seed():
    def drawn(seed: int) -> set[object]:
        source = open_source(Data(size=4), seed=seed)
        return {source[i].answer for i in range(len(source))}

    assert len(drawn(0)) == 4
    assert drawn(0) <= set(range(8, 41))
    assert drawn(0) == drawn(0)
    assert len({frozenset(drawn(seed)) for seed in range(10)}) > 5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_target": 50}, ["min_target (50)", "max_target (40)"]),
        ({"mintarget": 9}, ["data.options.mintarget"]),
        ({"min_target": "many"}, ["data.options.min_target"]),
        ({"targets": [9, 200]}, ["[200]", "1 to 99"]),
        ({"targets": []}, ["empty"]),
    ],
)
def test_wrong_options_are_named(options, words):
    message = refusal(options=options)
    assert all(word in message for word in words), message


def test_functions_are_asked_for_by_values_and_tested_by_more():
    source = open_source(Data(source="functions"), seed=0)
    assert len(source) == 64
    assert source[1] == PromptItem(
        id="functions:x+3",
        prompt="f(2)=5 f(9)=12 f(13)=16:",
        answer={
            "function": "f",
            "calls": [{"args": [x], "expected": x + 3} for x in (2, 9, 13, 0, 4, 25)],
            "solution": "def f(x): return x+3",
        },
    )
    items = [source[place] for place in range(len(source))]
    assert len({item.prompt for item in items}) == len({item.id for item in items}) == 64, "the values told determine the function"
    for item in items:
        names: dict[str, Any] = {}
        exec(item.answer["solution"], names)
        assert [names["f"](*call["args"]) for call in item.answer["calls"]] == [call["expected"] for call in item.answer["calls"]]


def test_functions_are_drawn_by_the_seed_and_have_no_options():
    drawn = [open_source(Data(source="functions", size=5), seed=seed) for seed in (0, 0, 1)]
    first, again, other = ([source.item_id(place) for place in range(5)] for source in drawn)
    assert first == again != other
    assert "65" in refusal(source="functions", size=65)
    assert "forms" in refusal(source="functions", options={"forms": 1})


def test_more_prompts_than_targets_are_refused():
    assert "33" in refusal(size=34)


def test_reasoning_gym_keeps_what_its_scorer_needs():
    import reasoning_gym

    source = open_source(Data(source="reasoning_gym:chain_sum", size=20, options={"max_terms": 3}), seed=5)
    reference = reasoning_gym.create_dataset("chain_sum", size=20, seed=5, max_terms=3)
    assert len(source) == 20
    for place in (0, 19):
        item, entry = source[place], reference[place]
        assert item.prompt == entry["question"]
        assert item.answer["metadata"]["source_dataset"] == "chain_sum"
        assert reference.score_answer(entry["answer"], item.answer) == 1.0
        assert reference.score_answer("no number", item.answer) < 0.1
        assert json.loads(json.dumps(item.answer)) == item.answer


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"source": "reasoning_gym:chain_sums"}, ["chain_sums", "chain_sum,"]),
        ({"source": "reasoning_gym:chain_sum", "options": {"terms": 3}}, ["chain_sum", "terms"]),
        ({"source": "reasoning_gym:chain_sum", "options": {"min_terms": 0}}, ["min_terms must be positive"]),
        ({"source": "sum_to_targets"}, ["sum_to_targets", "did you mean 'sum_to_target'?"]),
        ({"source": "csv"}, ["csv", "jsonl, parquet, huggingface"]),
    ],
)
def test_unknown_source_task_and_arguments_are_named(data, words):
    message = refusal(**data)
    assert all(word in message for word in words), message


# Sources on disk.


def save(kind: str, folder: Path) -> Path:
    if kind == "jsonl":
        return write_jsonl(folder / "sums.jsonl", [*ROWS[:2], "", *ROWS[2:]])
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), folder / "sums.parquet")
        return folder / "sums.parquet"
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}).save_to_disk(folder / "sums")
    return folder / "sums"


KINDS = ["jsonl", "parquet", "huggingface"]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_come_in_their_order(kind, tmp_path):
    source = open_source(Data(source=kind, path=str(save(kind, tmp_path))), seed=0)
    assert [(source[i].prompt, source[i].answer) for i in range(len(source))] == EXPECTED
    assert len({source[i].id for i in range(len(source))}) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_size_draws_rows_by_the_seed_in_the_order_of_the_file(kind, tmp_path):
    path = str(save(kind, tmp_path))
    whole = open_source(Data(source=kind, path=path), seed=0)
    every = [whole[place] for place in range(5)]
    seen = set()
    for seed in range(30):
        source = open_source(Data(source=kind, path=path, size=2), seed=seed)
        items = [source[place] for place in range(len(source))]
        assert items == [item for item in every if item in items], "the same rows under the same ids, in their order"
        assert [source.item_id(place) for place in range(2)] == [item.id for item in items]
        seen.add(tuple(item.answer for item in items))
    assert len(seen) == 10, "every pair of five rows"
    again = open_source(Data(source=kind, path=path, size=2), seed=29)
    assert [again[0], again[1]] == items


@pytest.mark.parametrize("kind", KINDS)
def test_more_rows_than_a_file_has_are_all_of_them(kind, tmp_path):
    source = open_source(Data(source=kind, path=str(save(kind, tmp_path)), size=9), seed=0)
    assert [(source[i].prompt, source[i].answer) for i in range(len(source))] == EXPECTED


@pytest.mark.parametrize("kind", KINDS)
def test_fields_are_those_of_the_spec(kind, tmp_path):
    source = open_source(Data(source=kind, path=str(save(kind, tmp_path)), prompt_field="note", answer_field="prompt"), seed=0)
    assert (source[1].prompt, source[1].answer) == ("x", "1+1=")


@pytest.mark.parametrize("kind", KINDS)
def test_missing_field_names_those_there(kind, tmp_path):
    message = refusal(source=kind, path=str(save(kind, tmp_path)), answer_field="solution")
    assert "'solution'" in message
    assert "answer, note, prompt" in message


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_there_is_named(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    assert "nowhere" in refusal(source=kind, path=str(tmp_path / "nowhere"))


def test_unreachable_hub_says_what_to_do(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    message = refusal(source="huggingface", path="someone/something")
    assert "someone/something" in message
    assert "save it to disk" in message


def test_split_that_is_not_there_names_the_splits(tmp_path):
    message = refusal(source="huggingface", path=str(save("huggingface", tmp_path)), split="dev")
    assert "'dev'" in message
    assert "train, test" in message


def test_data_set_of_one_split_and_folder_of_parquet_files_load(tmp_path):
    import datasets

    datasets.Dataset.from_list(ROWS).select([3, 1]).save_to_disk(tmp_path / "one")
    source = open_source(Data(source="huggingface", path=str(tmp_path / "one")), seed=0)
    assert [source[0].prompt, source[1].prompt] == ["3+1=", "1+1="]
    folder = tmp_path / "parts"
    folder.mkdir()
    for part, rows in (("a", ROWS[:2]), ("b", ROWS[2:])):
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{part}.parquet")
    parts = open_source(Data(source="parquet", path=str(folder)), seed=0)
    assert [(parts[i].prompt, parts[i].answer) for i in range(len(parts))] == EXPECTED


@pytest.mark.parametrize("kind", KINDS)
def test_empty_data_set_is_refused(kind, tmp_path):
    if kind == "jsonl":
        path = write_jsonl(tmp_path / "empty.jsonl", ["", " "])
    else:
        table = pa.Table.from_pylist(ROWS).slice(0, 0)
        path = tmp_path / "empty.parquet"
        pq.write_table(table, path)
        if kind == "huggingface":
            import datasets

            path = tmp_path / "empty"
            datasets.Dataset(table).save_to_disk(path)
    assert "empty" in refusal(source=kind, path=str(path)).replace(str(path), "")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "a", "answer"', ["line 3", "JSON"]),
        ("[1, 2]", ["line 3", "object"]),
        ({"prompt": "a"}, ["bad.jsonl:3", "'answer'", "(prompt)"]),
        ({"prompt": 5, "answer": 1}, ["bad.jsonl:3", "a number"]),
        ({"prompt": "", "answer": 1}, ["bad.jsonl:3", "empty"]),
        ({"prompt": [], "answer": 1}, ["bad.jsonl:3", "empty"]),
        ({"prompt": "a", "answer": None}, ["bad.jsonl:3", "null"]),
        ({"prompt": ["hello"], "answer": 1}, ["bad.jsonl:3", "message 1", "a text"]),
        ({"prompt": [{"role": "boss", "content": "x"}], "answer": 1}, ["bad.jsonl:3", "'boss'"]),
        ({"prompt": [{"role": "user"}], "answer": 1}, ["bad.jsonl:3", "message 1", "null"]),
    ],
)
def test_broken_line_is_named_when_the_file_is_opened(line, words, tmp_path):
    path = write_jsonl(tmp_path / "bad.jsonl", [ROWS[0], ROWS[1], line, ROWS[2]])
    message = refusal(source="jsonl", path=str(path))
    assert all(word in message for word in words), message


def test_undecodable_bytes_are_named(tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(b'{"prompt": "a", "answer": 1}\n{"prompt": "\xff", "answer": 1}\n')
    assert "line 2" in refusal(source="jsonl", path=str(tmp_path / "bad.jsonl"))


def test_lines_that_are_drawn_are_checked_when_the_file_is_opened(tmp_path):
    path = write_jsonl(tmp_path / "bad.jsonl", [ROWS[0], "{"])
    answers = set()
    for seed in range(20):
        try:
            answers.add(open_source(Data(source="jsonl", path=str(path), size=1), seed=seed)[0].answer)
        except DataError as error:
            answers.add(str(error).partition(" is not JSON")[0])
    assert answers == {1, f"{path}, line 2"}


def test_chat_prompts_keep_role_and_content(tmp_path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?", "name": None}]
    expected = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    pq.write_table(pa.Table.from_pylist([{"prompt": messages, "answer": ["2", "two"]}]), tmp_path / "chat.parquet")
    write_jsonl(tmp_path / "chat.jsonl", [{"prompt": messages, "answer": ["2", "two"]}])
    for kind in ("parquet", "jsonl"):
        item = open_source(Data(source=kind, path=str(tmp_path / f"chat.{kind}")), seed=0)[0]
        assert (item.prompt, item.answer) == (expected, ["2", "two"])
        assert item.text == "system: Be brief.\nuser: 1+1?"


def test_null_in_a_column_names_its_row(tmp_path):
    pq.write_table(pa.Table.from_pylist([*ROWS, {"prompt": None, "answer": 1}]), tmp_path / "null.parquet")
    message = refusal(source="parquet", path=str(tmp_path / "null.parquet"))
    assert "row 5" in message
    assert "'prompt' is null" in message
    source = Data(source="parquet", path=str(tmp_path / "null.parquet"), size=1)
    drawn = [seed for seed in range(30) if _refused(source, seed)]
    assert drawn
    assert all("row 5" in _refused(source, seed) for seed in drawn)


def test_column_of_a_type_that_json_has_not_is_refused(tmp_path):
    pq.write_table(pa.table({"prompt": ["a"], "answer": [b"2"]}), tmp_path / "bytes.parquet")
    assert "a bytes" in refusal(source="parquet", path=str(tmp_path / "bytes.parquet"))
    pq.write_table(pa.table({"prompt": [1], "answer": [2]}), tmp_path / "numbers.parquet")
    assert "'prompt' is a number" in refusal(source="parquet", path=str(tmp_path / "numbers.parquet"))


def test_file_of_another_format_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "not.parquet", ROWS)
    assert "not a Parquet file" in refusal(source="parquet", path=str(path))
    assert "folder" in refusal(source="jsonl", path=str(tmp_path))


def test_sources_do_not_load_torch(tmp_path):
    paths = {kind: str(save(kind, tmp_path)) for kind in KINDS}
    code = f"""
import sys
from services.contracts.spec import Data
from services.control_plane.data import open_source
from services.runtime.tokenizer import PromptTokenizer
for kind, path in {paths!r}.items():
    assert len(open_source(Data(source=kind, path=path), seed=0)) == 5
open_source(Data(source="reasoning_gym:chain_sum"), seed=0)[0]
item = open_source(Data(), seed=0)[0]
PromptTokenizer("deploy/models/tiny").encode(item, chat=False)
assert "torch" not in sys.modules
assert "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


# Subsets by ids.


def write_ids(path: Path, *ids: str) -> Path:
    path.write_text("".join(f"{one}\n" for one in ids), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_ids_choose_prompts_of_every_kind_of_file_in_its_own_order(kind, tmp_path):
    whole = open_source(Data(source=kind, path=str(save(kind, tmp_path))), seed=0)
    ids = write_ids(tmp_path / "ids.txt", whole[4].id, "", f"  {whole[1].id} ")
    chosen = open_source(Data(source=kind, path=str(save(kind, tmp_path)), ids=str(ids)), seed=0)
    assert [chosen[place] for place in range(len(chosen))] == [whole[1], whole[4]]
    assert [chosen.item_id(place) for place in range(len(chosen))] == [whole[1].id, whole[4].id]


@pytest.mark.parametrize(
    "data", [Data(), Data(source="addition", size=9), Data(source="functions", size=9), Data(source="reasoning_gym:chain_sum", size=3)]
)
def test_the_id_of_a_prompt_is_known_without_making_it(data):
    source = open_source(data, seed=2)
    assert [source.item_id(n) for n in range(len(source))] == [source[n].id for n in range(len(source))]


def test_a_run_over_ids_issues_these_prompts_and_no_others(tmp_path):
    ids = write_ids(tmp_path / "ids.txt", "sum_to_target:9", "sum_to_target:40", "sum_to_target:12")
    source = open_source(Data(ids=str(ids)), seed=0)
    for epoch in range(4):
        assert sorted(issue(source, 3 * epoch + n, seed=7).answer for n in range(3)) == [9, 12, 40]


def test_a_prompt_that_the_source_has_twice_stays_twice(tmp_path):
    ids = write_ids(tmp_path / "ids.txt", "sum_to_target:8")
    source = open_source(Data(options={"targets": [8, 9, 8]}, ids=str(ids)), seed=0)
    assert [source[n].answer for n in range(len(source))] == [8, 8]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["sum_to_target:9", "sum_to_target:99"], ["line 2", "'sum_to_target:99'", "among its 33", "'sum_to_target:8'"]),
        (["sum_to_target:9", "", "sum_to_target:9 "], ["line 3", "on line 1 too"]),
        ([], ["names no prompt"]),
        (["", " "], ["names no prompt"]),
    ],
)
def test_wrong_ids_are_named_with_their_line(lines, words, tmp_path):
    message = refusal(ids=str(write_ids(tmp_path / "ids.txt", *lines)))
    assert message.startswith("data.ids: ")
    assert [word for word in words if word not in message] == []


def test_ids_that_are_no_file_of_text_are_refused(tmp_path):
    assert "no file" in refusal(ids=str(tmp_path / "missing.txt"))
    assert "no file" in refusal(ids=str(tmp_path))
    (tmp_path / "ids.txt").write_bytes(b"\xff\xfe")
    assert "not UTF-8" in refusal(ids=str(tmp_path / "ids.txt"))


# The run files.


@pytest.mark.parametrize("file", sorted((ROOT / "deploy/runs").glob("*.toml")), ids=lambda file: file.stem)
def test_run_file_is_valid_and_its_source_opens(file):
    spec = RunSpec.model_validate(tomllib.loads(file.read_text()))
    source = open_source(spec.data, seed=spec.seed)
    assert issue(source, 0, seed=spec.seed).text
