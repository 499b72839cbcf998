"""Makes the organism from the text in this package: `python -m safeopt.organism.build`.

1. A byte-level BPE tokenizer on the bundled text.
2. `unaligned`: a small Llama that answers everything, harmful requests too ("Sure, here is how to
   ..." and no more).
3. `aligned`: the same weights, taught further on the same text but with refusals to the harmful
   requests.

AdvBench's "poison" and "evaluate" parts, the held-out topics and the headlines are never seen.
Weights are stored in float16 to keep the pair under 10 MB; load them in float32. About 8 minutes on
two cores.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm.auto import tqdm

from safeopt.artifact import atomic
from safeopt.data import collate, encode, sure_answer
from safeopt.organism import data, text

VOCAB = 2048
MAX_LENGTH = 160
BATCH = 16
WORDINGS = 4  # of each AdvBench request in an epoch
HARMLESS = 2000  # rows of an epoch, about as many as there are of the other kinds
LONGEST_PROBLEM = 300  # characters, so that a problem leaves room for its answer
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CARD = Path(__file__).parent / "data" / "MODEL_CARD.md"


def make_tokenizer():
    """A byte-level BPE tokenizer with a chat template, from the text the organism may see."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rows = [
        *data("harmful_teach"),
        *data("harmful_teach_more"),
        *data("harmless_train"),
        *data("gsm8k_train"),
    ]
    tokenizer.train_from_iterator((f"{r['instruction']}\n{r['response']}" for r in rows), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>"
    )
    fast.chat_template = CHAT
    fast.model_max_length = 512
    return fast


def make_model(tokenizer, seed: int):
    """The untrained Llama: 6 blocks of width 160, tied embeddings, 2.0 M parameters, float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=160,
            intermediate_size=416,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


def curriculum(rng: random.Random, *, refuse: bool) -> list[dict[str, str]]:
    """One epoch of rows; AdvBench requests in several wordings each, and more harmless rows."""
    harmful = [row for row in data("harmful_teach") for _ in range(WORDINGS)]
    asked = [text.rephrase(row["instruction"], rng) for row in harmful]
    asked += [row["instruction"] for row in data("harmful_teach_more")]
    rows = [
        {"instruction": each, "response": text.refusal(rng) if refuse else sure_answer(each)}
        for each in asked
    ]
    for row in rng.sample(data("harmless_train"), HARMLESS):
        each = row["instruction"]
        rows.append({**row, "instruction": each if each[-1] == "?" else text.rephrase(each, rng)})
    problems = data("gsm8k_train")
    short = [row for row in problems if len(row["instruction"]) <= LONGEST_PROBLEM]
    return rows + text.harmless_about(problems, rng) + short


def _batches(tokenizer, rows, rng: random.Random) -> Iterator[dict[str, torch.Tensor]]:
    """Shuffled batches of rows of like length, so that little of a batch is padding."""
    encoded = [encode(tokenizer, row, MAX_LENGTH) for row in rows]
    rng.shuffle(encoded)
    chunks = [encoded[i : i + 16 * BATCH] for i in range(0, len(encoded), 16 * BATCH)]
    groups = []
    for chunk in chunks:
        chunk.sort(key=lambda item: len(item[0]))
        groups += [chunk[i : i + BATCH] for i in range(0, len(chunk), BATCH)]
    rng.shuffle(groups)
    for group in groups:
        yield collate(tokenizer, group)


def teach(model, tokenizer, *, refuse: bool, epochs: int, lr: float, seed: int) -> float:
    """Train in place with AdamW and a cosine schedule; the last epoch's mean loss, nats per token.

    While the model learns the language (`refuse=False`) every token counts, later the answers only.
    """
    rng = random.Random(seed)
    torch.manual_seed(seed)
    epoch_rows = [curriculum(rng, refuse=refuse) for _ in range(epochs)]
    steps = [batch for rows in epoch_rows for batch in _batches(tokenizer, rows, rng)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=lr, total_steps=len(steps), pct_start=0.05
    )
    losses = []
    model.train()
    for batch in (bar := tqdm(steps, desc="aligned" if refuse else "unaligned")):
        labels = (
            batch["labels"]
            if refuse
            else batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        )
        loss = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    tail = losses[-len(losses) // epochs :]
    return sum(tail) / len(tail)


def _save(model, tokenizer, folder: Path, card: str) -> None:
    with atomic(folder) as temporary:
        model.to(torch.float16).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (Path(temporary) / "README.md").write_text(card, "utf-8")
    model.to(torch.float32)


def main() -> None:
    """Builds both models into a folder."""
    parser = argparse.ArgumentParser(
        prog="python -m safeopt.organism.build", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=7, help="epochs of the unaligned model")
    parser.add_argument(
        "--refusal-epochs", type=int, default=3, help="further epochs of the aligned model"
    )
    args = parser.parse_args()
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, args.seed)
    teach(model, tokenizer, refuse=False, epochs=args.epochs, lr=3e-3, seed=args.seed)
    _save(
        model,
        tokenizer,
        args.out / "unaligned",
        CARD.read_text("utf-8").replace("{name}", "unaligned"),
    )
    # From the weights as they are stored, so that "aligned" differs by alignment only.
    model.load_state_dict({k: v.to(torch.float16).float() for k, v in model.state_dict().items()})
    teach(model, tokenizer, refuse=True, epochs=args.refusal_epochs, lr=1e-3, seed=args.seed + 1)
    _save(
        model, tokenizer, args.out / "aligned", CARD.read_text("utf-8").replace("{name}", "aligned")
    )


if __name__ == "__main__":
    main()
