"""Trainer, with any optimizer, over a model that `safeopt.parametrize` rules."""

from __future__ import annotations

import pytest
import torch
from trainer_cases import arguments, copy_of, llama, mask_of, rows

from safeopt import parametrize
from safeopt.integrations.transformers import SafeOptCallback

transformers = pytest.importorskip("transformers")


def trainer_of(folder):
    model = parametrize.freeze(llama(), mask_of(llama()))
    return transformers.Trainer(
        model=model,
        args=arguments(folder),
        train_dataset=rows(),
        callbacks=[SafeOptCallback(check_every=1)],
    )


def test_the_callback_takes_a_parametrized_model_and_its_checkpoints_are_plain(tmp_path):
    whole, resumed = trainer_of(tmp_path), trainer_of(tmp_path)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    trained, again = whole.model.state_dict(), resumed.model.state_dict()
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6")
    start, mask = copy_of(llama()), mask_of(llama())
    assert set(trained) == set(start)
    for name, value in trained.items():
        assert torch.equal(again[name], value), name
        assert torch.equal(saved.get_parameter(name), value), name
        frozen = mask.to_bool(name) if name in mask else torch.zeros(value.shape, dtype=torch.bool)
        assert torch.equal(value[frozen], start[name][frozen])
        assert frozen.all() or not torch.equal(value[~frozen], start[name][~frozen])
