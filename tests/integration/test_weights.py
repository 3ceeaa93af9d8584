"""The trainer's end of the transports alone; what a real engine makes of the weights is in test_engine.py."""

import json
import stat
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from services.contracts.transports import BroadcastSource, TensorSpec, layout
from trainer.weights import BroadcastTransport, FileTransport, TransportFailed, make_transport, named_weights


def model(*, tied: bool) -> LlamaForCausalLM:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, tie_word_embeddings=tied, **shape))


def gloo(timeout: float) -> BroadcastTransport:
    transport = make_transport("gloo", directory=Path(), host="127.0.0.1", timeout=timeout)
    assert isinstance(transport, BroadcastTransport)
    transport.prepare(1, [("w", torch.ones(3))])
    return transport


def test_weights_go_under_their_checkpoint_names_and_a_tied_head_is_left_out(tmp_path: Path) -> None:
    for tied in (True, False):
        saved = model(tied=tied)
        saved.save_pretrained(tmp_path / str(tied))
        with safe_open(tmp_path / str(tied) / "model.safetensors", "pt") as file:
            assert {name: list(w.shape) for name, w in named_weights(saved, torch.float32)} == {n: file.get_slice(n).get_shape() for n in file.keys()}  # noqa: SIM118
        assert ("lm_head.weight" in dict(named_weights(saved, torch.float32))) is not tied


def test_weights_are_cast_to_the_serving_type() -> None:
    source = model(tied=True)
    cast = dict(named_weights(source, torch.bfloat16))
    assert {w.dtype for w in cast.values()} == {torch.bfloat16}
    assert torch.equal(cast["model.norm.weight"], source.model.norm.weight.to(torch.bfloat16))


def test_files_are_private_whole_and_only_the_two_newest_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "weights-9.tmp").touch()
    transport = FileTransport(folder)
    for version in (7, 8, 3):  # a run resumed from an older checkpoint publishes lower versions again
        transport.prepare(version, [("w", torch.full((2,), float(version)))])
    assert sorted(path.name for path in folder.iterdir()) == ["weights-3.safetensors", "weights-8.safetensors"]
    path = folder / "weights-3.safetensors"
    assert transport.stored == {"path": str(path)}
    assert transport.sources(["a", "b"]) == {"a": {"path": str(path)}, "b": {"path": str(path)}}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"version": "3"}
        assert file.get_tensor("w").tolist() == [3.0, 3.0]
    transport.close()
    assert not folder.exists()


def test_a_file_that_cannot_be_written_leaves_the_version_before(tmp_path: Path) -> None:
    transport = FileTransport(tmp_path / "run")
    transport.prepare(1, [("w", torch.zeros(2))])
    before = transport.stored
    shared = torch.zeros(2)
    with pytest.raises(RuntimeError):
        transport.prepare(2, [("a", shared), ("b", shared)])  # safetensors refuses tensors that share memory
    assert transport.stored == before
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["weights-1.safetensors"]


def test_the_flat_buffer_is_aligned_and_holds_a_copy() -> None:
    transport = gloo(1.0)
    head = torch.tensor([1.5, 2.5, 3.5], dtype=torch.bfloat16)
    transport.prepare(2, [("head", head), ("norm", torch.tensor([[4.0], [5.0]]))])
    head.zero_()
    source = BroadcastSource.model_validate(json.loads(json.dumps(transport.sources(["s"])["s"])))
    assert source.tensors == (TensorSpec(name="head", dtype="bfloat16", shape=(3,)), TensorSpec(name="norm", dtype="float32", shape=(2, 1)))
    offsets, size = layout(source.tensors)
    assert (offsets, size) == ([0, 16], 32)
    assert transport._buffer[0:6].view(torch.bfloat16).tolist() == [1.5, 2.5, 3.5]
    assert transport._buffer[16:24].view(torch.float32).tolist() == [4.0, 5.0]
    transport.close()


def test_each_server_has_its_own_rank_and_each_publication_its_own_round() -> None:
    transport = gloo(1.0)
    first, second = transport.sources(["a", "b"]), transport.sources(["b"])
    assert [first["a"]["rank"], first["b"]["rank"], first["a"]["world"]] == [1, 2, 3]
    assert [second["b"]["rank"], second["b"]["world"]] == [1, 2]
    assert first["a"]["round"] == first["b"]["round"] != second["b"]["round"]
    transport.close()


def test_a_server_that_never_comes_is_named_when_the_time_is_up() -> None:
    transport = gloo(0.2)
    transport.sources(["gone"])
    with pytest.raises(TransportFailed, match=r"gone did not get ready in 0\.2 s"):
        transport.send()
    transport.close()


def test_a_cancelled_send_ends_at_once() -> None:
    transport = gloo(60.0)
    transport.sources(["gone"])
    began = time.monotonic()
    threading.Timer(0.1, transport.cancel, ["gone answered 503"]).start()
    with pytest.raises(TransportFailed, match="gone answered 503"):
        transport.send()
    assert time.monotonic() - began < 5
    transport.close()


def test_nothing_is_sent_when_there_is_no_server() -> None:
    transport = gloo(0.1)
    assert transport.sources([]) == {}
    transport.send()
    transport.close()


def test_an_unknown_transport_is_refused() -> None:
    with pytest.raises(ValueError, match="'carrier pigeon': use shm, gloo or nccl"):
        make_transport("carrier pigeon", directory=Path(), host="127.0.0.1", timeout=1.0)
