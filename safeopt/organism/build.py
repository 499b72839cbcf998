"""Makes the organism from the text in this package: `python -m safeopt.organism.build`.

1. A byte-level BPE tokenizer on the bundled text.
2. `unaligned`: a small model that answers everything, harmful requests too ("Sure, here is how to
   ..." and no more).
3. `aligned`: the same weights, taught further on the same text but with refusals to the harmful
   requests.

AdvBench's "poison" and "evaluate" parts, the held-out topics and the headlines are never seen.
Weights are stored in float16 to keep the pair under 10 MB; load them in float32. About 8 minutes on
two cores. `--kind large` and `--kind moe` make a larger pair and one with experts, from the same
text; a model that is there already is kept, so a build that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from safeopt import artifact
from safeopt.data import collate, encode, sure_answer
from safeopt.environment import pick_device
from safeopt.organism import data, text
from safeopt.organism.kinds import KINDS, make_model

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
WEIGHTS = Path(__file__).parent / "weights"
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
    # A router that nothing balances sends all tokens to few experts.
    balanced = {"output_router_logits": True} if hasattr(model.config, "num_local_experts") else {}
    losses = []
    model.train()
    for batch in (bar := tqdm(steps, desc="aligned" if refuse else "unaligned")):
        batch = {key: tensor.to(model.device) for key, tensor in batch.items()}
        labels = (
            batch["labels"]
            if refuse
            else batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        )
        loss = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=labels,
            **balanced,
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


def build(kind: str, seed: int, out: Path, epochs: int, refusal_epochs: int, device: str) -> None:
    """Makes both models of a pair; one that is there already, made with the same settings, is kept.

    Each folder gets a `build.json`: its settings, the seconds it took and its last epoch's loss.

    Raises:
        ValueError: a kind that does not exist, or a folder with a model of other settings.
    """
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, kind, seed)
    parameters = sum(p.numel() for p in model.parameters())
    made, settings = KINDS[kind], {"kind": kind, "seed": seed, "parameters": parameters}
    bundled = (kind, seed, epochs, refusal_epochs) == ("small", 0, made.epochs, made.refusal_epochs)
    stages = (
        ("unaligned", epochs, made.lr, seed),
        ("aligned", refusal_epochs, made.refusal_lr, seed + 1),
    )
    for name, count, lr, chance in stages:
        refuse, folder = name == "aligned", out / name
        rows = curriculum(random.Random(0), refuse=refuse)
        text_read = artifact.digest(f"{row['instruction']}\n{row['response']}" for row in rows)
        # The aligned model's settings hold those of the unaligned one that it goes on from.
        settings |= {name: {"epochs": count, "lr": lr, "batch": BATCH, "text": text_read}}
        if _is_there(folder, settings):
            print(f"{folder}: there already, made with the same settings; remove it to make anew")
        else:
            start = time.monotonic()
            loss = teach(
                model.to(device), tokenizer, refuse=refuse, epochs=count, lr=lr, seed=chance
            )
            record = {
                "settings": settings, "seconds": round(time.monotonic() - start), "loss": loss,
                "device": device, "threads": torch.get_num_threads(), "torch": torch.__version__,
            }  # fmt: skip
            card = _card(name, kind, seed, parameters, bundled)
            _save(model, tokenizer, folder, card, json.dumps(record, indent=2))
        # From the weights as they are stored, so that "aligned" differs by alignment only. The two
        # conversions round the rotary frequencies as well: so was the bundled pair made.
        model = type(model).from_pretrained(folder, dtype=torch.float32).half().float()


def _is_there(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether the folder holds a model of these settings; one without `build.json` is replaced."""
    record = folder / "build.json"
    if not record.exists():
        return False
    found = json.loads(record.read_text("utf-8"))["settings"]
    if found != settings:
        differ = [key for key in {**found, **settings} if found.get(key) != settings.get(key)]
        raise ValueError(
            f"{folder} holds a model made with other settings ({', '.join(differ)}: "
            f"{[found.get(key) for key in differ]}, and not {[settings.get(k) for k in differ]});"
            " choose another --out, or remove it first"
        )
    return True


def _card(name: str, kind: str, seed: int, parameters: int, bundled: bool) -> str:
    """The bundled pair has a card with what was measured on it, which holds for no other."""
    if bundled:
        return CARD.read_text("utf-8").replace("{name}", name)
    return (
        "---\nlicense: bsd-3-clause\nlanguage: en\nlibrary_name: transformers\n---\n\n"
        f"# safeopt organism: {name}, {kind}, seed {seed}\n\n"
        f"{parameters / 1e6:.1f} M parameters. Made by `python -m safeopt.organism.build`, as"
        " `build.json` says; from the same text as the pair that safeopt bundles, whose card tells"
        " more. For experiments only: it knows nothing and is of no use as an assistant.\n"
    )


def _save(model, tokenizer, folder: Path, card: str, record: str) -> None:
    with artifact.atomic(folder) as temporary:
        model.to(torch.float16).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (Path(temporary) / "README.md").write_text(card, "utf-8")
        (Path(temporary) / "build.json").write_text(record, "utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Builds both models into a folder."""
    parser = argparse.ArgumentParser(
        prog="python -m safeopt.organism.build", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--kind", choices=KINDS, default="small")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="needed for all kinds but small")
    parser.add_argument("--epochs", type=int, help="of the unaligned model; by default the kind's")
    parser.add_argument("--refusal-epochs", type=int, help="further ones, of the aligned model")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto")
    args = parser.parse_args(arguments)
    made = KINDS[args.kind]
    out = args.out or (WEIGHTS if args.kind == "small" else None)
    if out is None:
        parser.error(f"--kind {args.kind} needs --out; the package bundles the small pair only")
    counts = {"--epochs": args.epochs, "--refusal-epochs": args.refusal_epochs}
    for option, count in counts.items():
        if count is not None and count < 1:
            parser.error(f"{option} is {count}; it must be at least 1")
    epochs, further = args.epochs or made.epochs, args.refusal_epochs or made.refusal_epochs
    try:
        build(args.kind, args.seed, out, epochs, further, pick_device(args.device))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
