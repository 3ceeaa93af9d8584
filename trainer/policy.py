"""The policy being trained: a Hugging Face causal language model that gives log-probabilities and exact entropies of packed completions.

The backbone runs over a pack laid out as one row of tokens; only attention looks at sequences. It takes each block of a pack (trainer.batching.Block)
as a rectangle padded at its right end under a causal mask, so that a token sees its own sequence and nothing else, no mask of I x I is made, and
torch's own fused kernels serve CPU and GPU alike. Logits are never made whole: the head is applied by trainer.entropy.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from trainer.batching import Block, Pack, Trajectory, pack
from trainer.entropy import logprob_and_entropy
from trainer.ranks import ALONE, Ranks
from trainer.weights import GatheredWeights, named_weights

Dtype = Literal["float32", "bfloat16"]

ATTENTION = "offbeat_packed"
PROBE_TOLERANCE = 1e-3
"""Largest difference of log-probabilities that the probe at load lets pass, in nats: above rounding, below a wrong mask or a scaled logit."""


class Policy:
    """`model` holds the float32 master weights: what the optimiser updates, checkpoints keep and publications send."""

    ranks: Ranks = ALONE

    def __init__(self, model: PreTrainedModel, *, dtype: Dtype = "float32") -> None:
        """`dtype` is that of the forward pass (autocast). The model stays in eval mode: dropout would move the ratio off 1 on its own samples."""
        model.set_attn_implementation(ATTENTION)
        self.model = model
        self.model.train(False)
        self.dtype: Dtype = "float32"
        self._probe()
        self.dtype = dtype

    @classmethod
    def load(cls, path: str | Path, *, dtype: Dtype = "float32", device: str = "cpu") -> Policy:
        """The causal language model in the folder `path`, or of that name in the local cache. ValueError with what to do when there is none."""
        try:
            config = AutoConfig.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model.path: no model at {str(path)!r}: give a folder with config.json and safetensors, or a name that the local cache holds"
            ) from error
        architecture = (config.architectures or ["an unnamed architecture"])[0]
        if architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
            raise ValueError(f"model.path: {str(path)!r} holds {architecture}, no causal language model: give one such as LlamaForCausalLM")
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(path, local_files_only=True, dtype=torch.float32, output_loading_info=True)
        except OSError as error:
            raise ValueError(f"model.path: the weights in {str(path)!r} cannot be read: {error}") from error
        model, info = loaded
        if missing := sorted(info["missing_keys"]):
            # transformers fills these with random numbers and only warns.
            raise ValueError(f"model.path: {str(path)!r} lacks the weights {', '.join(missing[:5])}: save the whole causal language model there")
        return cls(model.to(device), dtype=dtype)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def forward(self, pack: Pack, *, temperature: float, drift: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probability, exact entropy and, if asked, entropy drift at `temperature` of each trained token of the pack, in its order.

        Each (T,), float32, in nats; the drift is what trainer.entropy says of it, and has no gradient.
        """
        return logprob_and_entropy(self.hidden(pack), self._head.weight, pack.targets_T, temperature=temperature, bias_V=self._head.bias, drift=drift)

    @torch.no_grad()
    def sample(self, first: int, length: int, *, seed: int) -> list[int]:
        """`length` tokens that the policy finds ordinary: `first`, then its own samples at temperature 1. One forward pass a token: for a few."""
        generator = torch.Generator().manual_seed(seed)
        tokens = [first]
        while len(tokens) < length:
            (so_far,) = pack([Trajectory(prompt_ids=tokens, completion_ids=[0], behaviour_logps=[0.0], versions=[0], advantage=0.0)])
            logits_V = self.next_logits(so_far.to(self.device))
            tokens.append(int(torch.multinomial(logits_V.softmax(-1).cpu(), 1, generator=generator)))
        return tokens

    def next_logits(self, pack: Pack) -> Tensor:
        """Logits of the first trained token of the pack, (V,), float32."""
        return F.linear(self.hidden(pack)[0].float(), self._head.weight.float(), self._head.bias)

    def weights(self, dtype: torch.dtype) -> GatheredWeights:
        """The weights in this type under their checkpoint names, each whole."""
        return named_weights(self.model, dtype)

    def hidden(self, pack: Pack) -> Tensor:
        """Last hidden states that predict the trained tokens, (T, D)."""
        with self._autocast():
            output = self.model.base_model(**_inputs(pack))
        return cast(Tensor, output.last_hidden_state[0, pack.index_T])

    @property
    def _head(self) -> torch.nn.Linear:
        return cast(torch.nn.Linear, cast(Any, self.model).get_output_embeddings())

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.dtype == "bfloat16" else nullcontext()

    @torch.no_grad()
    def _probe(self) -> None:
        """Do two sequences in a pack get what the model's own logits say of each alone? Not so where a family scales or caps its logits, or has an
        attention of its own that would look from one sequence into the next: both would train on wrong numbers without a word. In float32, since
        bfloat16 rounds logits of 30 to eighths."""
        trajectories = [
            Trajectory(prompt_ids=[0, 1], completion_ids=ids, behaviour_logps=[0.0] * len(ids), versions=[0] * len(ids), advantage=0.0)
            for ids in ([2, 3, 0, 1], [3, 1, 2])
        ]
        expected = []
        for trajectory in trajectories:
            alone = pack([trajectory])[0].to(self.device)
            logits_IV = self.model(**_inputs(alone)).logits[0]
            expected.append(logits_IV.log_softmax(-1)[alone.index_T, alone.targets_T])
        logp_T, _, _ = self.forward(pack(trajectories)[0].to(self.device), temperature=1.0)
        if not torch.allclose(logp_T, torch.cat(expected), atol=PROBE_TOLERANCE, rtol=0):
            name = type(self.model).__name__
            raise ValueError(f"model.path: {name} cannot be trained in packs with a linear head: give a Llama, Qwen2 or Qwen3 model")


def _inputs(pack: Pack) -> dict[str, Any]:
    return {"input_ids": pack.input_ids_I[None], "position_ids": pack.position_ids_I[None], "use_cache": False, "blocks": pack.blocks}


def _packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    blocks: tuple[Block, ...] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface. query (1, heads, I, d), key and value (1, key heads, I, d) -> (1, I, heads, d)."""
    if blocks is None:
        raise ValueError("this model's attention works on packs: call it through Policy.forward")
    if sliding_window is not None and sliding_window < blocks[0].length:
        raise ValueError(f"a sequence of {blocks[0].length} tokens is longer than the model's sliding window ({sliding_window}): lower max_model_len")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        # Not enable_gqa: for float32 on a GPU it falls back to a kernel that makes every rows x heads x length x length score.
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    qkv_IXHd = torch.stack([query[0], key[0], value[0]]).permute(2, 0, 1, 3)
    outputs = []
    for block in blocks:
        rectangle_BLXHd = qkv_IXHd[block.start : block.stop][block.spread].view(block.rows, block.length, *qkv_IXHd.shape[1:])
        q, k, v = rectangle_BLXHd.permute(2, 0, 3, 1, 4)
        out_BHLd = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
        outputs.append(out_BHLd.transpose(1, 2).flatten(0, 1)[block.gather])
    return torch.cat(outputs)[None], None


AttentionInterface.register(ATTENTION, _packed_attention)
