"""What scoring a set of prompts takes, beside the passes through the model that it needs anyway.

    python benchmarks/locate_speed.py --rounds 9                       # a Llama of 25 M weights
    python benchmarks/locate_speed.py --hidden 64 --layers 2 --rows 8 --rounds 3   # a trial of it

SSAH, Wanda and hidden states are held against one forward pass over the set in the same batches,
SNIP and ESI against one forward and backward pass; SNIP takes absolute values prompt by prompt, so
that pass once more in batches of one. Weights and tokens are random: time does not depend on them,
but which expert a token reaches does. All scores hash the weights for their provenance, once
however long the set is: "fingerprint" says how much of their time that is. Ratios are taken within
a round (interleave.py), printed as median [first quartile, third quartile].

"held" is what a scorer holds between two batches, beside the model and its units; "returned" the
scores or states.
"""

from __future__ import annotations

import argparse
import gc
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from interleave import Case, interleave, quartiles, ratio
from torch import Tensor, nn

from safeopt import artifact
from safeopt.environment import machine
from safeopt.methods import ESI, SNIP, SSAH, Wanda
from safeopt.methods.safety_layers import last_states
from safeopt.scores import score
from safeopt.units import UnitMap

FORWARD, BOTH, SINGLY = "forward", "forward and backward", "forward and backward, singly"
AGAINST = {
    "SSAH": FORWARD, "Wanda": FORWARD, "hidden states": FORWARD,
    "ESI": BOTH, "SNIP": SINGLY, "SNIP, to batches": BOTH, SINGLY: BOTH, BOTH: FORWARD,
    "fingerprint": FORWARD,
}  # fmt: skip


def main() -> None:
    """Measure both models and print their tables."""
    given = arguments()
    torch.set_num_threads(given.threads)
    about = machine(given.device)
    script = f"benchmarks/{Path(__file__).name}"
    print(f"`{shlex.join(['python', script, *sys.argv[1:]])}`\n")
    print(
        f"{about['name']}, {about['cores']} cores, {about['threads']} threads, {about['system']},"
        f" torch {torch.__version__}, {given.device}, float32; {given.rows} rows of {given.tokens}"
        f" tokens, half of them a response, in batches of {given.batch}"
    )
    for kind in given.kinds:
        torch.manual_seed(0)
        model = (llama if kind == "llama" else mixtral)(given).to(given.device).eval()
        batches = random_batches(given)
        cases = cases_of(model, batches)
        seconds = interleave(cases, given.rounds, given.device, given.budget)
        weights = sum(p.numel() for p in model.parameters())
        rounds = len(seconds[FORWARD])
        print(f"\n{type(model).__name__}, {weights / 1e6:.1f} M weights, {rounds} rounds\n")
        print(table(seconds, memory(model, batches)))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--vocab", type=int, default=10000)
    parser.add_argument("--experts", type=int, default=8, help="of the model with experts, top 2")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="of each row")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--budget", type=float, default=900.0, help="seconds for each model")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--kinds", nargs="+", choices=("llama", "moe"), default=["llama", "moe"])
    return parser.parse_args()


def settings(given: argparse.Namespace) -> dict[str, Any]:
    heads = max(2, given.hidden // 64)
    return {
        "vocab_size": given.vocab, "hidden_size": given.hidden, "num_attention_heads": heads,
        "num_key_value_heads": heads // 2, "num_hidden_layers": given.layers,
        "tie_word_embeddings": True,
    }  # fmt: skip


def llama(given: argparse.Namespace) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    inner = 8 * given.hidden // 3
    return LlamaForCausalLM(LlamaConfig(**settings(given), intermediate_size=inner))


def mixtral(given: argparse.Namespace) -> Any:
    """Half as wide, with stacked experts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    half = argparse.Namespace(**{**vars(given), "hidden": given.hidden // 2})
    config = MixtralConfig(
        **settings(half), intermediate_size=given.hidden, num_local_experts=given.experts,
        num_experts_per_tok=2,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def random_batches(given: argparse.Namespace) -> list[dict[str, Tensor]]:
    ids = torch.randint(0, given.vocab, (given.rows, given.tokens), device=given.device)
    labels = ids.clone()
    labels[:, : given.tokens // 2] = -100
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    parts = {name: tensor.split(given.batch) for name, tensor in whole.items()}
    return [dict(zip(parts, each, strict=True)) for each in zip(*parts.values(), strict=True)]


def scorers(model: nn.Module) -> dict[str, Any]:
    return {"SSAH": SSAH(units=UnitMap.of(model)), "Wanda": Wanda(), "ESI": ESI(), "SNIP": SNIP()}


def cases_of(model: nn.Module, batches: list[dict[str, Tensor]]) -> list[Case]:
    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])

    def both(size: int) -> Callable[[], None]:
        def run() -> None:
            for batch in batches:
                parts = zip(*(tensor.split(size) for tensor in batch.values()), strict=True)
                for part in parts:
                    model(**dict(zip(batch, part, strict=True))).loss.backward()
                    model.zero_grad()

        return run

    def scoring(scorer: Any) -> Callable[[], object]:
        return lambda: score(model, batches, scorer, progress=False)

    cases = [Case(FORWARD, forward), Case(BOTH, both(len(batches[0]["input_ids"])))]
    cases += [Case(SINGLY, both(1)), Case("fingerprint", lambda: artifact.fingerprint(model))]
    cases += [Case(name, scoring(scorer)) for name, scorer in scorers(model).items()]
    return [*cases, Case("hidden states", lambda: states(model, batches))]


def states(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> Tensor:
    return torch.cat([last_states(model, dict(batch)) for batch in batches])


def memory(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, tuple[int, int]]:
    """Bytes held between two batches and bytes returned, by method."""
    known = {t.untyped_storage().data_ptr() for t in model.parameters()}
    known |= {t.untyped_storage().data_ptr() for batch in batches for t in batch.values()}
    found = {}
    methods = scorers(model)
    gc.collect()
    gc.freeze()  # what is there already is neither searched nor collected: that takes seconds
    try:
        for name, scorer in methods.items():
            seen: list[int] = []
            scores = score(model, watched(batches[:2], known, seen), scorer, progress=False)
            found[name] = (max(seen), sum(tensor.nbytes for tensor in scores.values()))
            del scores
    finally:
        gc.unfreeze()
    found["hidden states"] = (0, states(model, batches).nbytes)
    return found


def watched(batches: Iterable[Any], known: set[int], seen: list[int]) -> Iterator[Any]:
    for batch in batches:
        yield batch
        seen.append(held(known))


def held(known: set[int]) -> int:
    """Bytes of all tensors that Python has made since gc.freeze, each unknown storage once."""
    gc.collect()
    storages = {}
    for one in gc.get_objects():
        if issubclass(type(one), Tensor) and one.device.type != "meta":
            storage = one.untyped_storage()
            if storage.data_ptr() not in known:
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def table(seconds: Mapping[str, list[float]], used: Mapping[str, tuple[int, int]]) -> str:
    """A row a comparison; times are those of the whole set."""
    lines = ["| case | s | compared with | ratio | held (MB) | returned (MB) |"]
    lines.append("| --- | ---: | --- | ---: | ---: | ---: |")
    lines.append(f"| {FORWARD} | {quartiles(seconds[FORWARD])[1]:.3f} | - | 1 | - | - |")
    for label, against in AGAINST.items():
        name = label.removesuffix(", to batches")
        low, middle, high = ratio(seconds[name], seconds[against])
        bytes_ = [f"{count / 1e6:.3g}" for count in used.get(name, ())] or ["-", "-"]
        cells = [name, f"{quartiles(seconds[name])[1]:.3f}", against]
        cells += [f"{middle:.3f} [{low:.3f}, {high:.3f}]", *bytes_]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
