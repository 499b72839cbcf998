"""select on sharded scores: bit for bit the mask of the whole scores, without gathering them."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
import torch.distributed as dist
from processes import spawn
from score_rank_cases import Sent, bools, raised
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from safeopt.scores import Scores
from safeopt.selection import select

# Fewer rows than ranks, rows of odd length, one row, a vector, a stack of matrices.
SHAPES = {"n": (3, 5), "b": (7, 9), "w": (37, 53), "r": (1, 17), "v": (13,), "e": (6, 5, 7)}
LEVELS = (0.0, -0.0, 1e-45, 1e-38, 0.1, 0.1000001, 1.0, 7.5)
KINDS = {"ties": 0.45, "distinct": 0.003, "equal": 0.93}
CASES = list(itertools.product(KINDS, ["model", "tensor", "row"], ["top", "bottom", "random"]))


def whole(kind):
    generator = torch.Generator().manual_seed(3)
    values = {
        "ties": lambda shape: torch.tensor(LEVELS)[torch.randint(8, shape, generator=generator)],
        "distinct": lambda shape: torch.rand(shape, generator=generator) + 0.1,
        "equal": lambda shape: torch.full(shape, 0.3),
    }[kind]
    return {name: values(shape) for name, shape in SHAPES.items()}


def masks(kinds):
    """Masks of all cases of some kinds of scores, or the error's text."""
    out = {}
    for kind, scope, order in CASES:
        if kind not in kinds:
            continue
        try:
            mask = select(kinds[kind], KINDS[kind], scope=scope, order=order, seed=5)
            out[kind, scope, order] = bools(mask) | {"": mask.manifest["arguments"]}
        except ValueError as error:
            out[kind, scope, order] = str(error)
    return out


def layouts():
    """Cut over all ranks; of two, some tensors whole; of four, two copies of two parts."""
    world = dist.get_world_size()
    flat = init_device_mesh("cpu", (world,))
    yield lambda name, tensor: distribute_tensor(tensor, flat, [Shard(0)])
    if world == 2:
        yield (
            lambda name, tensor: (
                tensor if name in ("b", "v") else distribute_tensor(tensor, flat, [Shard(0)])
            )
        )
        return
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("replicate", "shard"))
    yield lambda name, tensor: distribute_tensor(tensor, mesh, [Replicate(), Shard(0)])


def kinds_for(world):
    return list(KINDS) if world == 2 else ["ties"]


def on_ranks(rank):
    warnings.simplefilter("ignore")  # the parent looks at warnings
    found = []
    for cut in layouts():
        kinds = {
            k: {n: cut(n, t) for n, t in whole(k).items()} for k in ("ties", "distinct", "equal")
        }
        with Sent() as sent:
            found.append((masks(kinds), sent.calls))
    return found, refusals(rank)


def refusals(rank):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    columns = {"w": distribute_tensor(torch.rand(8, 8), mesh, [Shard(1)])}
    spoiled = distribute_tensor(torch.rand(8, 8) + 0.1, mesh, [Shard(0)])
    scores = Scores({"fine": spoiled.clone(), "w": spoiled})
    if rank == 1:
        scores["w"].to_local()[1, 1] = float("nan")
    nothing = distribute_tensor(torch.zeros(8, 8), mesh, [Shard(0)])
    return {
        "columns": raised(lambda: select(columns, 0.5)),
        "nan": raised(lambda: select(scores, 0.5)),
        "zero": raised(lambda: select({"w": nothing}, 0.5)),
    }


@pytest.mark.filterwarnings("ignore:.*(have score zero|rounds to no weight):UserWarning")
@pytest.mark.parametrize("world", [2, 4])
def test_select_on_shards_is_select_on_the_whole(world):
    """Ties too: the first name, then the smallest index of the whole tensor, wherever it lies."""
    wanted = masks({kind: whole(kind) for kind in kinds_for(world)})
    assert sum(isinstance(mask, dict) for mask in wanted.values()) > 7
    for rank, (found, refused) in enumerate(spawn(on_ranks, world)):
        for got, calls in found:
            for case, want in wanted.items():
                assert isinstance(want, str) == isinstance(got[case], str), case
                if isinstance(want, str):
                    assert got[case] == want
                    continue
                assert got[case].pop("") == want[""], case
                for name, selected in want.items():
                    if name:
                        assert torch.equal(got[case][name], selected), (case, name)
                got[case][""] = want[""]
            assert {dtype for _, dtype, _ in calls} == {torch.int64, torch.uint8}
            largest = max(number for _, dtype, number in calls if dtype == torch.uint8)
            assert largest <= -(-37 // 2) * 53 // 8 + 1  # the bits of the largest part
        assert "placements (Shard(dim=1),)" in refused["columns"]
        assert refused["columns"].startswith("NotImplementedError: select: 'w' of shape (8, 8)")
        assert refused["nan"].startswith("ValueError: scores of 'w'")
        assert ("another rank" in refused["nan"]) == (rank != 1)
        assert "all scores are zero" in refused["zero"]
