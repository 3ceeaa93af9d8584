"""Embeddings of prompts by the shipped model, and the subset command over its real programs."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from services.cli.__main__ import app
from services.cli.session import Parts
from services.contracts.spec import Data, Model, RunSpec
from services.control_plane.data import open_source
from services.runtime.tokenizer import PromptTokenizer
from trainer.embed import main, pooled
from trainer.policy import Policy

TINY = Path(__file__).parents[2] / "deploy/models/tiny"


@pytest.fixture(scope="module")
def policy():
    return Policy.load(TINY)


@pytest.fixture
def spec_file(tmp_path):
    path = tmp_path / "spec.json"
    path.write_text(RunSpec(model=Model(path=str(TINY))).model_dump_json())
    return path


PROMPTS = [[1, 48, 56, 61], [1, 49, 50, 61], [1], [1, 48, 56, 61], [1, *range(48, 58)] * 6]


def test_an_embedding_is_the_mean_of_the_models_last_hidden_states(policy):
    found = pooled(policy, PROMPTS)
    model = AutoModelForCausalLM.from_pretrained(TINY)
    assert (found.shape, found.dtype) == ((len(PROMPTS), model.config.hidden_size), np.float32)
    for tokens, row in zip(PROMPTS, found, strict=True):
        with torch.no_grad():
            hidden = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[-1][0]
        np.testing.assert_allclose(row, hidden.mean(0).numpy(), atol=1e-4)


def test_equal_prompts_have_equal_embeddings_and_others_not(policy):
    found = pooled(policy, PROMPTS)
    np.testing.assert_allclose(found[0], found[3], atol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 0.01


def test_how_prompts_are_packed_does_not_matter(policy):
    together, alone = pooled(policy, PROMPTS), pooled(policy, PROMPTS, max_tokens=1)
    np.testing.assert_allclose(together, alone, atol=1e-5)


def embed(monkeypatch, spec_file: Path, *options: str) -> int:
    """Exit code of the program, run in this process: to load the library again takes longer than all that is tested."""
    prompts = spec_file.with_name("prompts.jsonl")
    prompts.write_text("".join(json.dumps({"id": str(n), "prompt": f"{n:02d}="}) + "\n" for n in range(8, 20)))
    files = ("--spec", spec_file, "--prompts", prompts, "--out", spec_file.with_name("out.npy"))
    monkeypatch.setattr("sys.argv", ["trainer.embed", *map(str, files), *options])
    return main()


def test_the_program_writes_a_row_a_prompt_and_tells_its_progress(policy, spec_file, monkeypatch, capsys):
    assert embed(monkeypatch, spec_file) == 0
    assert capsys.readouterr().err == "12 of 12 prompts embedded\n"
    source, tokenizer = open_source(Data(), seed=0), PromptTokenizer(TINY)
    expected = pooled(policy, [tokenizer.encode(source[n], chat=False) for n in range(12)])
    np.testing.assert_allclose(np.load(spec_file.with_name("out.npy")), expected, atol=1e-5)


def test_a_sentence_transformers_model_is_asked_for_the_texts(spec_file, monkeypatch):
    class Lengths:
        def __init__(self, name, *, local_files_only):
            assert (name, local_files_only) == ("some/model", True)

        def encode(self, texts):
            return [[float(len(text)), float(text[:2])] for text in texts]

    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=Lengths))
    assert embed(monkeypatch, spec_file, "--embedding", "sentence-transformers:some/model") == 0
    np.testing.assert_array_equal(np.load(spec_file.with_name("out.npy")), [[3, n] for n in range(8, 20)])


def test_a_missing_library_or_model_is_one_clear_sentence(spec_file, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    assert embed(monkeypatch, spec_file, "--embedding", "sentence-transformers:x") == 1
    assert capsys.readouterr().err == "the embedding needs the package sentence-transformers: install it, or use --embedding policy\n"
    spec_file.write_text(RunSpec(model=Model(path="no/such/model")).model_dump_json())
    assert embed(monkeypatch, spec_file) == 1
    assert re.fullmatch("model 'no/such/model' is neither .*\n", capsys.readouterr().err)


@pytest.fixture
def offbeat(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")

    def run(*arguments: str):
        return CliRunner().invoke(app, ["--home", str(tmp_path / "home"), *arguments], obj=Parts())

    return run


def test_a_subset_by_clusters_is_chosen_without_a_stack_and_used_by_a_source(offbeat, spec_file, tmp_path):
    out = tmp_path / "ids.txt"
    command = ["data", "subset", str(spec_file), "--size", "12", "--by", "clusters", "--clusters", "4", "--out", str(out), "--json"]
    done = offbeat(*command)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout[done.stdout.index("{") : done.stdout.rindex("}") + 1])
    assert (told["size"], told["prompts"], told["by"], told["clusters"], told["embedding"]) == (12, 33, "clusters", 4, "policy")
    ids = out.read_text().splitlines()
    source = open_source(Data(ids=str(out)), seed=0)
    assert [source[n].id for n in range(len(source))] == ids
    again = offbeat(*command)
    assert (again.exit_code, "is there: give another file" in again.output) == (2, True)


def test_a_subset_at_random_has_its_size_and_seed(offbeat, spec_file, tmp_path):
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        done = offbeat("data", "subset", str(spec_file), "--size", "10", "--seed", str(seed), "--out", str(tmp_path / name))
        assert done.exit_code == 0, done.output
        found.append((tmp_path / name).read_text().splitlines())
    assert found[0] == found[1] != found[2]
    assert [len(set(ids)) for ids in found] == [10, 10, 10]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--size", "34"), "above the 33 prompts"),
        (("--size", "3", "--clusters", "2"), "--clusters is for --by clusters"),
        (("--size", "3", "--by", "clusters", "--embedding", "bert"), "'bert' is unknown: use policy or sentence-transformers:NAME"),
        (("--size", "3", "--by", "clusters", "--embedding", "sentence-transformers:"), "names no model"),
        (("--size", "3", "--set", "data.source=nowhere"), "'nowhere' is unknown"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_sentence(offbeat, spec_file, tmp_path, options, words):
    done = offbeat("data", "subset", str(spec_file), "--out", str(tmp_path / "ids.txt"), *options)
    assert done.exit_code in (1, 2)
    assert words in done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "ids.txt").exists()
