"""Fingerprints of models and digests of texts: what must change them does, and nothing else."""

from __future__ import annotations

import pytest
import torch
from conftest import make_llama

from safeopt import artifact


def test_fingerprint_is_of_values_not_of_storage() -> None:
    model = make_llama(tie_word_embeddings=True)
    first = artifact.fingerprint(model)
    assert set(first) == {"shapes", "weights"}
    assert artifact.fingerprint(torch.compile(model)) == first
    assert artifact.fingerprint(model.state_dict()) == first
    assert artifact.fingerprint(reversed(list(model.named_parameters()))) == first
    low = artifact.fingerprint(make_llama(tie_word_embeddings=True).bfloat16())
    assert low["shapes"] == first["shapes"]
    assert low["weights"] != first["weights"]
    assert artifact.fingerprint(model.bfloat16().float()) == low


def test_fingerprint_sees_one_weight_one_name_one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact, "CHUNK", 64)  # several chunks per tensor
    plain = {"a": torch.arange(40.0).view(5, 8), "b": torch.arange(33.0)}
    first = artifact.fingerprint(plain)
    for at in (0, 15, 16, 39):
        changed = plain["a"].clone()
        changed.view(-1)[at] += 1
        other = artifact.fingerprint({**plain, "a": changed})
        assert other["shapes"] == first["shapes"]
        assert other["weights"] != first["weights"]
    assert artifact.fingerprint({**plain, "a": plain["a"].t()})["weights"] != first["weights"]
    for other in ({"a": plain["a"], "c": plain["b"]}, {**plain, "a": plain["a"].view(8, 5)}):
        assert artifact.fingerprint(other)["shapes"] != first["shapes"]
        assert artifact.fingerprint(other)["weights"] != first["weights"]


def test_fingerprint_without_weights_needs_no_data() -> None:
    with torch.device("meta"):
        empty = make_llama()
    found = artifact.fingerprint(empty, weights=False)
    assert found == {"shapes": artifact.fingerprint(make_llama())["shapes"]}
    with pytest.raises(ValueError, match="meta"):
        artifact.fingerprint(empty)


def test_digest() -> None:
    assert artifact.digest(["a", "b"]) == artifact.digest(iter(["a", "b"]))
    lists = [[], [""], ["a", "b"], ["b", "a"], ["ab"], ["a, b"], ['a", "b'], ["a", "b", ""]]
    assert len({artifact.digest(texts) for texts in lists}) == len(lists)
    assert artifact.digest(["\ud800"])  # a lone surrogate, as json.loads may return
    with pytest.raises(TypeError, match="one string"):
        artifact.digest("ab")


def test_the_layout_in_memory_does_not_matter() -> None:
    strided = torch.rand(4, 6)[:, ::2]
    plain = {"w": strided.contiguous()}
    assert artifact.fingerprint({"w": strided}) == artifact.fingerprint(plain)
