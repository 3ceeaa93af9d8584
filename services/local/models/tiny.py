"""The tiny models: two-layer Llamas over bytes, each warmed up on one task, so that a machine without a GPU has something to train."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services.local.models.tasks import TASKS, Task

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

SPECIALS = ("<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """How the tiny model is made; with a seed it determines the weights."""

    seed: int = 0
    task: str = "sum_to_target"
    expressions: int = 40_000
    """Lines of the warm start."""
    mislabelled: float = 0.5
    """Share of the lines that are moved off the truth by a whole number from U{-4..4}."""
    steps: int = 1200
    batch: int = 192
    learning_rate: float = 1e-3
    warmup: int = 50
    """Steps over which the learning rate rises from 0; from then on it follows a cosine to 2 % of its peak."""
    layers: int = 2
    hidden: int = 64
    heads: int = 2
    feed_forward: int = 192
    positions: int = 512


@dataclass(frozen=True)
class Measurement:
    """What a model does on the task at temperature 1."""

    pass_at_1: float
    """Share of the samples that are right."""
    pass_at_k: float
    """Share of the prompts with at least one right answer among their k samples."""
    entropy: float
    """Full-vocabulary entropy, mean over the sampled tokens, in nats per token."""
    k: int


def make_tiny(
    out: str | Path,
    *,
    seed: int = Recipe.seed,
    steps: int = Recipe.steps,
    batch: int = Recipe.batch,
    expressions: int = Recipe.expressions,
    task: str = Recipe.task,
    log: Callable[[str], None] = print,
) -> Measurement:
    """Write the model, its tokenizer and a README with recipe and measurement into the folder `out`. Equal arguments give equal weights."""
    import torch

    recipe = Recipe(seed=seed, steps=steps, batch=batch, expressions=expressions, task=task)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer()
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(seed)
        model = _new_model(recipe, tokenizer)
        started = time.monotonic()
        loss = _warm_up(model, tokenizer, recipe, log)
        log(f"trained {steps} steps in {time.monotonic() - started:.0f} s, loss {loss:.3f}; measuring")
        measured = measure(model, tokenizer, task=TASKS[task], seed=seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(_readme(recipe, measured, loss, sum(p.numel() for p in model.parameters())))
    log(f"{folder}: pass@1 {measured.pass_at_1:.3f}, pass@{measured.k} {measured.pass_at_k:.3f}, entropy {measured.entropy:.2f} nats per token")
    return measured


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, no merges: every text can be encoded, and a digit is one token wherever it stands."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate((*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=Recipe.positions,
    )


def measure(model: Any, tokenizer: Any, *, task: Task = TASKS[Recipe.task], k: int = 16, seed: int = 0, max_tokens: int | None = None) -> Measurement:
    """Sample k answers to each prompt with transformers' own `generate`, at temperature 1 over the whole vocabulary."""
    import torch

    asked = task.measured
    prompts = tokenizer([prompt for prompt, _ in asked for _ in range(k)], padding=True, padding_side="left", return_tensors="pt")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        sampled = model.generate(
            input_ids=prompts["input_ids"], attention_mask=prompts["attention_mask"], do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=max_tokens or task.longest, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    answers_BT = sampled.sequences[:, prompts["input_ids"].shape[1] :]
    logp_BTV = torch.stack(sampled.logits, dim=1).log_softmax(-1)
    entropy_BT = -(logp_BTV.exp() * logp_BTV).sum(-1)
    ended_BT = answers_BT == tokenizer.eos_token_id
    live_BT = ended_BT.cumsum(1) - ended_BT.long() == 0
    texts = tokenizer.batch_decode(answers_BT, skip_special_tokens=True)
    right_B = torch.tensor([task.is_right(text, asked[row // k][1]) for row, text in enumerate(texts)])
    right_PK = (right_B & ended_BT.any(1)).view(len(asked), k)
    return Measurement(
        pass_at_1=right_PK.float().mean().item(),
        pass_at_k=right_PK.any(1).float().mean().item(),
        entropy=entropy_BT[live_BT].mean().item(),
        k=k,
    )


def _new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=recipe.hidden, intermediate_size=recipe.feed_forward, num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads, num_key_value_heads=recipe.heads, head_dim=recipe.hidden // recipe.heads,
            max_position_embeddings=recipe.positions, tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip


def _warm_up(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, log: Callable[[str], None]) -> float:
    """Train on random expressions, with the loss on the prompt's tokens too, so that their entropy means something. Gives the last loss, in nats."""
    import torch

    rng = random.Random(recipe.seed)
    texts = [TASKS[recipe.task].line(rng, recipe.mislabelled) + "<eos>" for _ in range(recipe.expressions)]
    rows_BT = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
    labels_BT = rows_BT.masked_fill(rows_BT == tokenizer.pad_token_id, -100)
    optimizer = torch.optim.AdamW(model.parameters(), recipe.learning_rate)
    loss = torch.tensor(math.nan)
    model.train()
    for step in range(recipe.steps):
        scale = min(1.0, step / recipe.warmup) * (0.5 * (1 + math.cos(math.pi * step / recipe.steps)) + 0.02)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * scale
        chosen_B = torch.randint(0, len(rows_BT), (recipe.batch,))
        loss = model(input_ids=rows_BT[chosen_B], labels=labels_BT[chosen_B]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            log(f"step {step}/{recipe.steps}: loss {loss.item():.3f}")
    model.eval()
    return loss.item()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums are taken in an order that depends on the number of threads: with one, a seed gives the same weights everywhere."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _readme(recipe: Recipe, measured: Measurement, loss: float, parameters: int) -> str:
    task = TASKS[recipe.task]
    settings = "\n".join(f"| {name} | {value} |" for name, value in asdict(recipe).items())
    return f"""# The tiny model of the task {task.name}

{parameters:,} parameters, float32, a standard Llama with tied embeddings over single bytes (`services/local/models/tiny.py`).
Made by `offbeat model make-tiny --task {task.name} --seed {recipe.seed}`; the same seed gives the same weights on the same build of PyTorch.

It was warmed up by supervised learning on random lines such as {task.lines}.
The loss covers the prompt's tokens too. It is meant as the starting point of reinforcement learning on the source `{task.name}`.

| measured on {len(task.measured)} prompts, {measured.k} samples each, temperature 1 | |
|---|---|
| pass@1 | {measured.pass_at_1:.3f} |
| pass@{measured.k} | {measured.pass_at_k:.3f} |
| entropy, nats per token | {measured.entropy:.3f} |
| last loss of the warm start, nats per token | {loss:.3f} |

| recipe | |
|---|---|
{settings}
"""
