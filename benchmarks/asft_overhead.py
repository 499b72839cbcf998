"""What AsFTAdamW adds to a training step of a Llama: LoRA r 8 on q and v, and full fine-tuning.

    python benchmarks/asft_overhead.py --rounds 9             # 100 M weights
    python benchmarks/asft_overhead.py --hidden 64 --layers 2 --rounds 3     # a trial of the script

A step is forward, backward and optimizer step on random tokens. Every case has a model of its own
with the same weights; the plain optimizer is SafeAdamW, whose step is AdamW's. LoRA has the
authors' direction ("safelora", whole rank), full fine-tuning rank-64 factors ("subspace"), both of
random differences: time does not depend on values. Ratios are taken within a round (interleave.py).
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from interleave import Case, interleave
from transformers import LlamaConfig, LlamaForCausalLM

from safeopt import AlignmentDirection, AsFTAdamW, SafeAdamW
from safeopt.operators import Operator

LIMITS = {"lora": 1.05, "full": 1.10}  # what a step with the penalty may take, of one without


def main() -> None:
    given = arguments()
    torch.set_num_threads(given.threads)
    print(json.dumps(vars(given)))
    for kind in given.kinds:
        cases = list(cases_of(kind, given))
        seconds = interleave(cases, given.rounds, given.device, given.budget)
        plain = seconds[f"{kind} plain"]
        for case in cases:
            ratios = [a / b for a, b in zip(seconds[case.name], plain, strict=True)]
            middle = statistics.median(ratios)
            row = {
                "case": case.name,
                "ms": round(1e3 * statistics.median(seconds[case.name]), 2),
                "ratio": round(middle, 4),
                "spread": [round(min(ratios), 4), round(max(ratios), 4)],
                "met": middle <= LIMITS[kind],
                **case.facts,
            }
            print(json.dumps(row))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocab", type=int, default=20000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="of each row")
    parser.add_argument("--rank", type=int, default=64, help="of full fine-tuning's factors")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--budget", type=float, default=600.0, help="seconds for each kind")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--kinds", nargs="+", choices=list(LIMITS), default=list(LIMITS))
    return parser.parse_args()


def cases_of(kind: str, given: argparse.Namespace) -> Iterator[Case]:
    direction: AlignmentDirection | None = None
    for name in ("plain", "coupled", "decoupled", "coupled, logged"):
        model = llama(given)
        direction = direction or direction_of(kind, model, given)
        if kind == "lora":
            from peft import LoraConfig, get_peft_model

            config = LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"])
            model = get_peft_model(model, config)
        named = list(model.named_parameters())
        facts = {"weights": sum(p.numel() for _, p in named), "matrices": len(direction)}
        optimizer: SafeAdamW
        if name == "plain":
            optimizer = SafeAdamW(named, lr=1e-4)
        else:
            mode, *logged = name.split(", ")
            pull: dict[str, Any] = {"direction": direction, "lam": 1.0, "mode": mode}
            optimizer = AsFTAdamW(named, lr=1e-4, **pull, log=bool(logged))
        yield Case(f"{kind} {name}", step_of(model, optimizer, given), facts=facts)


def llama(given: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=given.vocab,
        hidden_size=given.hidden,
        intermediate_size=8 * given.hidden // 3,
        num_hidden_layers=given.layers,
        num_attention_heads=max(1, given.hidden // 64),
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(given.device)


def direction_of(kind: str, model: Any, given: argparse.Namespace) -> AlignmentDirection:
    parts = ("q_proj", "v_proj") if kind == "lora" else ("_proj",)
    operators = {}
    for name, p in model.named_parameters():
        if any(f"{part}.weight" in name for part in parts):
            V = torch.randn(p.shape, device=p.device) * 1e-3
            option = ("safelora", None) if kind == "lora" else ("subspace", given.rank)
            operators[name] = Operator.of(V, *option, 0).to(given.device)
    return AlignmentDirection(operators)


def step_of(model: Any, optimizer: SafeAdamW, given: argparse.Namespace) -> Callable[[], None]:
    rows = torch.randint(0, given.vocab, (given.batch, given.tokens), device=given.device)

    def step() -> None:
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
