"""Weights from a trainer on the first GPU to an engine on the second, over NCCL. NCCL refuses two ranks on one GPU, so two are needed."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from anyio.from_thread import BlockingPortal, start_blocking_portal
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from rollout_server.engine import VllmEngine, WeightLoadFailed
from services.contracts.messages import LoadWeights
from services.contracts.spec import KvPolicy, Model
from trainer.weights import TransportFailed, make_transport, named_weights

pytestmark = [pytest.mark.gpu, pytest.mark.vllm, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]

CANARY = tuple(range(40, 72))
TOLERANCE = 0.1
"""bfloat16: largest mean absolute difference of log-probabilities, as `Weights.canary_tolerance` has it."""


def make_model(folder: Path, seed: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen2Config(vocab_size=300, max_position_embeddings=256, tie_word_embeddings=True, eos_token_id=2, initializer_range=0.06, **shape)
    model = Qwen2ForCausalLM(config).to(torch.bfloat16).eval()
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(300)}, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t2", pad_token="t0").save_pretrained(folder)
    return model.to("cuda:0")


def mean_distance(model: Qwen2ForCausalLM, logprobs: tuple[float, ...]) -> float:
    tokens = torch.tensor([CANARY], device="cuda:0")
    with torch.no_grad():
        logp_T_V = model(tokens).logits[0, :-1].float().log_softmax(-1)
    return (logp_T_V.gather(1, tokens[0, 1:, None])[:, 0].cpu() - torch.tensor(logprobs)).abs().mean().item()


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[VllmEngine, BlockingPortal, Qwen2ForCausalLM, Qwen2ForCausalLM]]:
    a, b = make_model(tmp_path / "a", 0), make_model(tmp_path / "b", 1)
    before = dict(os.environ)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")  # for the engine's process: this one has its devices already
    engine = VllmEngine(Model(path=str(tmp_path / "a"), dtype="bfloat16", max_model_len=256), max_num_seqs=4, load_timeout=60.0)
    with start_blocking_portal() as portal:
        portal.call(engine.start)
        try:
            yield engine, portal, a, b
        finally:
            portal.call(engine.stop)
            os.environ.clear()
            os.environ.update(before)


def test_versions_arrive_over_nccl_and_a_refusal_leaves_the_one_before(
    served: tuple[VllmEngine, BlockingPortal, Qwen2ForCausalLM, Qwen2ForCausalLM], tmp_path: Path
) -> None:
    engine, portal, a, b = served
    torch.cuda.set_device(0)
    transport = make_transport("nccl", directory=tmp_path, host="127.0.0.1", timeout=60.0)

    def request(version: int) -> LoadWeights:
        source = transport.sources(["s"])["s"]
        return LoadWeights(run_id="r", version=version, transport="nccl", kv_policy=KvPolicy.RECOMPUTE, canary=CANARY, source=source)

    for version, (model, other) in enumerate(((a, b), (b, a), (a, b))):
        transport.prepare(version, named_weights(model, torch.bfloat16))
        loading = portal.start_task_soon(engine.load, request(version))
        transport.send()
        logprobs = loading.result(60).canary_logprobs
        assert mean_distance(model, logprobs) < TOLERANCE < mean_distance(other, logprobs)

    transport.prepare(3, [("w", torch.ones(3, device="cuda:0"))])
    loading = portal.start_task_soon(engine.load, request(3))
    with pytest.raises(TransportFailed, match="s refused"):
        transport.send()
    with pytest.raises(WeightLoadFailed, match="not weights of the model served"):
        loading.result(60)
    assert engine.version == 2
    assert mean_distance(a, (*portal.call(engine.score, CANARY),)) < TOLERANCE
    transport.close()
