from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from trainer.batching import Trajectory, pack
from trainer.policy import Policy

SIZES = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}


def tiny(family: str = "llama", *, tied: bool = True) -> PreTrainedModel:
    torch.manual_seed(0)
    config, model = FAMILIES[family]
    return model(config(**SIZES, tie_word_embeddings=tied))


def trajectories(lengths=((3, 9), (1, 1), (30, 40), (5, 2), (2, 7), (1, 25))) -> list[Trajectory]:
    generator = torch.Generator().manual_seed(1)

    def ids(n: int) -> list[int]:
        return torch.randint(0, 61, (n,), generator=generator).tolist()

    return [Trajectory(ids(p), ids(c), [-1.0] * c, [0] * c, 1.0) for p, c in lengths]


def alone(model: PreTrainedModel, trajectory: Trajectory, *, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies of one completion from transformers' own model, run on that sequence only."""
    ids = torch.tensor([[*trajectory.prompt_ids, *trajectory.completion_ids]])
    log_p_TV = (model(ids).logits[0, len(trajectory.prompt_ids) - 1 : -1].double() / temperature).log_softmax(-1)
    return log_p_TV.gather(1, torch.tensor(trajectory.completion_ids)[:, None])[:, 0], -(log_p_TV.exp() * log_p_TV).sum(-1)


@pytest.mark.parametrize("max_tokens", [16, 64, 2048])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sequences_get_what_each_gets_alone(family, tied, max_tokens):
    batch, reference = trajectories(), tiny(family, tied=tied).eval()
    policy = Policy(tiny(family, tied=tied))
    expected = [alone(reference, trajectory, temperature=0.8) for trajectory in batch]
    packs = pack(batch, max_tokens=max_tokens)
    assert max(len(packed.row_T.unique()) for packed in packs) > 1
    for packed in packs:
        logp_T, entropy_T, _ = policy.forward(packed, temperature=0.8)
        for row in packed.row_T.unique().tolist():
            mine_T = packed.row_T == row
            assert torch.allclose(logp_T[mine_T].double(), expected[row][0], atol=1e-5, rtol=1e-5)
            assert torch.allclose(entropy_T[mine_T].double(), expected[row][1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_packed_gradients_equal_those_of_the_sequences_alone(tied):
    batch, reference = trajectories(), tiny(tied=tied).eval()
    policy = Policy(tiny(tied=tied))
    sum((logp_T + entropy_T).sum() for logp_T, entropy_T in (alone(reference, t, temperature=1.0) for t in batch)).backward()
    for packed in pack(batch, max_tokens=64):
        logp_T, entropy_T, _ = policy.forward(packed, temperature=1.0)
        (logp_T + entropy_T).sum().backward()
    for (name, mine), theirs in zip(policy.model.named_parameters(), reference.parameters(), strict=True):
        assert mine.grad is not None, name
        scale = theirs.grad.abs().max()
        assert scale > 0, name
        assert torch.allclose(mine.grad, theirs.grad, atol=1e-4 * scale.item(), rtol=1e-3), name


def test_a_token_of_one_sequence_does_not_move_another():
    batch = trajectories(((3, 6), (3, 6)))
    changed = Trajectory([7, 8, 9], batch[1].completion_ids, [-1.0] * 6, [0] * 6, 1.0)
    policy = Policy(tiny())
    with torch.no_grad():
        (before_T, *_), (after_T, *_) = (policy.forward(pack([batch[0], other])[0], temperature=1.0) for other in (batch[1], changed))
    assert torch.equal(before_T[:6], after_T[:6])
    assert not torch.allclose(before_T[6:], after_T[6:], atol=1e-2)


def test_a_saved_model_loads_with_float32_weights(tmp_path: Path):
    model = tiny(tied=False).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    policy = Policy.load(tmp_path, dtype="bfloat16")
    assert {parameter.dtype for parameter in policy.model.parameters()} == {torch.float32}
    packed = pack(trajectories())[0]
    logp_T, entropy_T, _ = policy.forward(packed, temperature=1.0)
    assert logp_T.dtype == entropy_T.dtype == torch.float32
    exact_T, *_ = Policy.load(tmp_path).forward(packed, temperature=1.0)
    difference = (logp_T - exact_T).abs().mean().item()
    assert 1e-4 < difference < 0.2  # the forward pass did run in bfloat16, and not in nonsense
    logp_T.sum().backward()
    assert {p.grad.dtype for p in policy.model.parameters() if p.grad is not None} == {torch.float32}


def test_a_folder_without_a_model_is_refused(tmp_path: Path):
    for path in (tmp_path, tmp_path / "nowhere", "no-such-owner/no-such-model"):
        with pytest.raises(ValueError, match=r"model\.path: no model at"):
            Policy.load(path)


def test_a_model_that_is_no_causal_language_model_is_refused(tmp_path: Path):
    BertModel(BertConfig(vocab_size=61, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds BertModel, no causal language model"):
        Policy.load(tmp_path)


def test_missing_and_broken_weights_are_refused(tmp_path: Path):
    tiny().save_pretrained(tmp_path / "gone")
    (tmp_path / "gone" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="weights"):
        Policy.load(tmp_path / "gone")
    tiny(tied=False).save_pretrained(tmp_path / "headless", state_dict={k: v for k, v in tiny(tied=False).state_dict().items() if "lm_head" not in k})
    with pytest.raises(ValueError, match=r"lacks the weights lm_head\.weight"):
        Policy.load(tmp_path / "headless")


def test_a_model_that_scales_its_logits_is_refused():
    class Scaled(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits / 2
            return output

    torch.manual_seed(0)
    with pytest.raises(ValueError, match="Scaled cannot be trained"):
        Policy(Scaled(LlamaConfig(**SIZES)))


def test_a_sequence_longer_than_a_sliding_window_is_refused():
    torch.manual_seed(0)
    policy = Policy(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=16)))
    policy.forward(pack(trajectories(((5, 5),)))[0], temperature=1.0)
    with pytest.raises(ValueError, match="sliding window"):
        policy.forward(pack(trajectories(((5, 20),)))[0], temperature=1.0)


def test_the_model_cannot_be_run_around_the_packs():
    with pytest.raises(ValueError, match="call it through"):
        Policy(tiny()).model(torch.tensor([[1, 2, 3]]))


def test_backbone_weights_alone_are_refused(tmp_path: Path):
    LlamaModel(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no causal language model"):
        Policy.load(tmp_path)
