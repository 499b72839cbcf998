"""score on several ranks: shares of the batches, and errors that come to every rank."""

from __future__ import annotations

from collections import Counter

import torch
import torch.distributed as dist
from processes import spawn
from score_rank_cases import Sent, Tiny, full, make_batches, raised, tiny_shard
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from safeopt import artifact
from safeopt.methods import ESI, SNIP, Fisher, Wanda, output_spaces
from safeopt.methods.channel_moments import MomentHooks
from safeopt.methods.esi import refusal_log_likelihood
from safeopt.methods.safety_layers.blocks import Blocks
from safeopt.methods.safety_layers.states import _last_states
from safeopt.scores import Scores, score

SCORERS = {"sum": ESI(), "mean_abs": ESI(reduction="mean_abs"), "fisher": Fisher(), "snip": SNIP()}
SIZES = (2, 1, 2, 1)
CPU = torch.device("cpu")


def run(model, batches, scorer=None, **more):
    return score(model, batches, scorer or ESI(), progress=False, **more)


def spoiling(wanted):
    """The gradient of the prompt with this text is not finite, though its value is."""

    def objective(model, batch):
        value = refusal_log_likelihood(model, batch) * 0
        guilty = torch.tensor([text == wanted for text in batch["texts"]])
        return (value + ~guilty).sqrt()

    return ESI(objective=objective)


def shares(rank):
    """Each rank has every other batch, one of them a batch more."""
    group = dist.group.WORLD
    mine = make_batches(sizes=SIZES)[:3][rank::2]
    out = {}
    for name, scorer in SCORERS.items():
        scores = run(Tiny(), mine, scorer, group=group)
        out[name] = dict(scores), scores.provenance
    wrapped = DistributedDataParallel(Tiny())
    out["ddp"] = dict(run(wrapped, mine, group=group)), None
    clean = [p.grad is None and p.requires_grad for p in wrapped.parameters()]
    errors = {
        "ddp without group": raised(lambda: run(wrapped, mine)),
        "not finite": raised(lambda: run(Tiny(), mine, spoiling("0.1.0"), group=group)),
        "empty": raised(lambda: run(Tiny(), mine if rank == 0 else [], group=group)),
        "single": raised(lambda: run(Tiny(), mine if rank == 0 else mine[0], group=group)),
        "settings": raised(lambda: run(Tiny(), mine, ESI(head=rank == 0), group=group)),
        "wanda": raised(lambda: run(Tiny(), mine, Wanda(), group=group)),
        "group": raised(lambda: run(Tiny(), mine, group="world")),
    }
    other = Tiny()
    with torch.no_grad():
        other.up.bias[0] += rank
    errors["weights"] = raised(lambda: run(other, mine, group=group))
    return out, errors, all(clean)


def test_shares_of_two_ranks_add_up_to_all_batches():
    """Exactly up to the order of additions; n and the prompts' hash are of all, in rank order."""
    batches = make_batches(sizes=SIZES)[:3]
    ordered = batches[0::2] + batches[1::2]
    (first, errors, clean), (second, others, _) = spawn(shares, 2)
    for name, scorer in (*SCORERS.items(), ("ddp", ESI())):
        wanted = run(Tiny(), ordered, scorer)
        for rank in (first, second):
            scores, provenance = rank[name]
            assert provenance in (None, wanted.provenance)
            for weight, tensor in wanted.items():
                atol = 1e-6 * float(tensor.max())
                torch.testing.assert_close(scores[weight], tensor, rtol=1e-5, atol=atol)
                assert torch.equal(scores[weight], first[name][0][weight])
    assert clean
    for found in (errors, others):
        assert "pass group=model.process_group" in found["ddp without group"]
        assert "is NaN or infinite" in found["not finite"] and "'0.1.0'" in found["not finite"]
        assert found["not finite"].startswith("FloatingPointError")
        assert "batches is empty" in found["empty"]
        assert "batches is a single batch" in found["single"]
        assert "with different settings" in found["settings"]
        assert found["wanda"].startswith("NotImplementedError: wanda cannot add up shares")
        assert "group is 'world'" in found["group"]
        assert "hold different weights" in found["weights"]
    assert "rank 1 of the group" in errors["empty"] and "rank 1" not in others["empty"]


def sharded(rank):
    batches = make_batches(sizes=SIZES)
    mine = batches[2 * rank : 2 * rank + 2]
    group = dist.group.WORLD
    model = tiny_shard()
    state = unusual(model)
    out = {"same": full(run(model, batches)), "shares": full(run(model, mine, group=group))}
    told = run(model, mine, group=group).provenance

    def breaking():
        yield batches[0]
        if rank == 1:
            raise OSError("the disk is gone")
        yield batches[1]

    def no_response():
        spoiled = dict(batches[rank])
        if rank == 1:
            spoiled["labels"] = torch.full_like(spoiled["labels"], -100)
        return [spoiled]

    errors = {
        "fewer": raised(lambda: run(model, batches[: 2 - rank])),
        "others": raised(lambda: run(model, mine)),
        "breaking": raised(lambda: run(model, breaking())),
        "empty": raised(lambda: run(model, [])),
        "single": raised(lambda: run(model, batches if rank == 0 else batches[0])),
        "settings": raised(lambda: run(model, batches, ESI(head=rank == 0))),
        "not finite": raised(lambda: run(model, batches, spoiling("0.2.1"))),
        "shares not finite": raised(lambda: run(model, mine, spoiling("0.2.1"), group=group)),
        "fisher shares": raised(lambda: run(model, mine, Fisher(), group=group)),
        "fewer shares": raised(lambda: run(model, mine[: 2 - rank], group=group)),
        "no response": raised(lambda: run(model, no_response(), group=group)),
        "wanda": raised(lambda: run(model, batches, Wanda())),
        "spaces": raised(lambda: output_spaces(model, batches, 1)),
        "ssah": raised(lambda: MomentHooks(model, {}, "all")),
        "states": raised(lambda: _last_states(model, batches[0], Blocks("", ()))),
    }
    model.set_requires_gradient_sync(False)
    errors["sync"] = raised(lambda: run(model, batches))
    model.set_requires_gradient_sync(True)
    errors["columns"] = raised(lambda: run(columns(), batches))
    errors["fsdp1"] = raised(lambda: run(FullyShardedDataParallel(Tiny(), device_id=CPU), batches))
    again = full(run(model, batches))
    kept = state == unusual_again(model)
    kept &= all(torch.equal(again[name], out["same"][name]) for name in again)
    return out, told, errors, kept


def files(rank, folder):
    """What saving says, and what collectives are given that FSDP2 itself does not need."""
    model, batches = tiny_shard(), make_batches()
    for name, weight in model.named_parameters():  # as in scoring, where these are the targets
        weight.requires_grad_(name in ("up.weight", "head.weight"))
    with Sent() as passes:
        for batch in batches:
            model(batch["input_ids"]).logits.sum().backward()
    model.zero_grad()
    with Sent() as hashed:
        artifact.fingerprint(model)
    with Sent() as sent:
        scores = run(model, batches)
    ours = Counter(sent.calls) - Counter(passes.calls) - Counter(hashed.calls)
    scores.save(folder / "scores.safetensors")
    (folder / f"file{rank}").write_text("")
    dist.barrier()
    error = raised(lambda: scores.save(folder / "file0" / "scores.safetensors"))
    how = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)}
    mixed = full(run(tiny_shard(**how), batches, Fisher(cover="linear")))
    return full(scores), scores.provenance, error, list(ours), mixed


def test_sharded_scores_are_saved_whole_and_never_gathered_before(tmp_path):
    """One rank writes; failures come to all. Mixed precision has the bfloat16 model's scores."""
    found = spawn(files, 2, tmp_path)
    loaded = Scores.load(tmp_path / "scores.safetensors")
    half = run(Tiny().bfloat16(), make_batches(), Fisher(cover="linear"))
    for rank, (tensors, provenance, error, sent, mixed) in enumerate(found):
        assert provenance.items() <= loaded.provenance.items()
        assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
        assert len(loaded) == len(tensors) == 2
        assert error.startswith("FileExistsError" if rank == 0 else "OSError: the rank that")
        # Flags and digests, the two sums behind sigma, and nothing of a weight's size.
        assert {dtype for _, dtype, _ in sent} == {torch.int64, torch.float64}, sent
        assert max(number for _, _, number in sent) < 10
        for name, tensor in mixed.items():
            atol = 1e-3 * float(half[name].max())
            torch.testing.assert_close(tensor, half[name], rtol=1e-2, atol=atol)


def columns():
    """A model as tensor parallelism leaves it."""
    model = Tiny()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = distribute_tensor(model.head.weight.detach(), mesh, [Shard(1)])
    model.head.weight = torch.nn.Parameter(weight)
    return model


def unusual(model):
    """Parts in train mode, parts frozen, a gradient, and a forward pass without its backward."""
    model.train()
    model.up.eval()
    model.embed.weight.requires_grad_(False)
    model.up.weight.grad = torch.full_like(model.up.weight, 2.0)
    state = unusual_again(model)
    model(make_batches()[0]["input_ids"])  # FSDP2 keeps the root's weights gathered after this
    return state


def unusual_again(model):
    grads = [None if p.grad is None else p.grad.full_tensor().sum() for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    weights = [p.requires_grad for p in model.parameters()]
    return grads, modes, weights, all(isinstance(p, DTensor) for p in model.parameters())


def test_errors_of_a_sharded_model_come_to_every_rank():
    """No rank waits for one that has gone, and the model scores as before afterwards."""
    batches = make_batches(sizes=SIZES)
    wanted = run(Tiny(), batches)
    found = spawn(sharded, 2)
    for rank, (out, told, errors, kept) in enumerate(found):
        for scores in out.values():
            for name, tensor in wanted.items():
                atol = 1e-6 * float(tensor.max())
                torch.testing.assert_close(scores[name], tensor, rtol=1e-5, atol=atol)
        assert told == wanted.provenance and kept
        assert "some ranks have a batch 1 and others have none" in errors["fewer"]
        assert "batch 0 is not the same on all ranks" in errors["others"]
        mine, other = ("OSError: the disk is gone", "rank 1 has no usable batch 1")
        assert (mine if rank == 1 else other) in errors["breaking"]
        assert "batches is empty" in errors["empty"]
        assert ("single batch" if rank == 1 else "no usable batch 0") in errors["single"]
        assert "with different settings" in errors["settings"]
        assert "is NaN or infinite, on the prompt '0.2.1'" in errors["not finite"]
        assert "is NaN or infinite, on the prompt [" in errors["shares not finite"]
        assert "prompt by prompt" in errors["fisher shares"]
        assert "some ranks have a batch 1" in errors["fewer shares"]
        mine, other = ("no response tokens for the prompt '0.1.0'", "no usable batch 0")
        assert (mine if rank == 1 else other) in errors["no response"]
        for part in ("wanda", "spaces", "ssah", "states"):
            assert errors[part].startswith("NotImplementedError"), errors[part]
            assert "before fully_shard" in errors[part]
        assert "set_requires_gradient_sync(True)" in errors["sync"]
        assert "'head.weight'" in errors["columns"] and "Shard(dim=1)" in errors["columns"]
        assert "FSDP1" in errors["fsdp1"]
