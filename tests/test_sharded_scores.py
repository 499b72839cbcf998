"""Scores of a model sharded by FSDP2, element by element against those of one process."""

from __future__ import annotations

import pytest
import torch
from processes import spawn
from score_rank_cases import SCORERS, bools, full, make_batches, offloaded, shard
from score_rank_cases import uneven_llama as llama
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from safeopt.scores import Scores, score
from safeopt.selection import select

FRACTION = 0.03
HOW = {"plain": shard, "offloaded": offloaded}


def every_way(rank, ways):
    """Scores and masks of every scorer, for a model sharded in each of the ways."""
    out = {}
    for way, scorers in ways.items():
        for name in scorers:
            model = hybrid(llama()) if way == "hybrid" else HOW[way](llama())
            scores = score(model, make_batches(), SCORERS[name], progress=False)
            assert all(isinstance(tensor, DTensor) for tensor in scores.values())
            mask = select(scores, FRACTION)
            gathered = full(scores)
            same = select(Scores(gathered), FRACTION) == mask
            out[way, name] = (gathered, bools(mask), scores.provenance, same, scores.count())
    return out


def hybrid(model):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return shard(model, mesh=mesh)


def alone(name):
    scores = score(llama(), make_batches(), SCORERS[name], progress=False)
    return scores, select(scores, FRACTION)


@pytest.fixture(scope="module")
def one():
    return {name: alone(name) for name in SCORERS}


@pytest.mark.parametrize(
    ("world", "ways"),
    [
        (2, {"plain": list(SCORERS), "offloaded": ["esi"]}),
        pytest.param(
            4,
            {"plain": ["esi", "fisher"], "hybrid": ["esi rows", "snip"]},
            marks=pytest.mark.slow,  # four processes import transformers
        ),
    ],
    ids=["2 ranks", "4 ranks"],
)
def test_scores_and_mask_of_ranks_are_those_of_one(one, world, ways):
    found = spawn(every_way, world, ways)
    for key, (tensors, mask, provenance, same, count) in found[0].items():
        scores, wanted = one[key[1]]
        assert set(tensors) == set(scores) and count == scores.count()
        for name, tensor in tensors.items():
            atol = 1e-6 * float(scores[name].max())
            torch.testing.assert_close(tensor, scores[name], rtol=2e-5, atol=atol)
        assert same, f"{key}: the mask is not that of the gathered scores"
        assert all(torch.equal(mask[name], wanted.to_bool(name)) for name in wanted)
        assert provenance == scores.provenance
        for other in found[1:]:
            assert other[key][2] == provenance
            assert all(torch.equal(other[key][1][name], mask[name]) for name in mask)
