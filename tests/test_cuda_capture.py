"""The step on a GPU in time and space: captured in a graph, in another stream, beyond 2^31."""

from __future__ import annotations

import pytest
import torch
from helpers import HYPER, Bag, assert_same, assert_same_state, random_mask, set_grads

from safeopt import SafeAdamW, ops

GPU = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def on_gpu(step: int = 0) -> Bag:
    """A model on the GPU with the gradients of a step."""
    model = Bag()
    set_grads(model, step)
    gradients = [p.grad for p in model.parameters()]
    model.to(GPU)
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        p.grad = gradient.to(GPU)
    return model


def set_grads_in_place(model: Bag, step: int) -> None:
    for p, other in zip(model.parameters(), on_gpu(step).parameters(), strict=True):
        p.grad.copy_(other.grad)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("argument", ["freeze", "train"])
def test_a_captured_step_is_an_eager_one(amsgrad, tensor_lr, argument) -> None:
    """Step counts, and a learning rate that is a tensor, are read anew at each replay."""
    runs = []
    for captured in (True, False):
        model = on_gpu()
        lr = torch.tensor(HYPER["lr"], device=GPU) if tensor_lr else HYPER["lr"]
        optimizer = SafeAdamW(
            model.named_parameters(), capturable=True, amsgrad=amsgrad,
            **{**HYPER, "lr": lr, argument: random_mask(Bag())},
        )  # fmt: skip
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # the state is made outside the graph
                optimizer.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                optimizer.step()
        for step in range(1, 5):
            set_grads_in_place(model, step)
            if tensor_lr:
                lr.mul_(0.5)
            graph.replay() if captured else optimizer.step()
        torch.cuda.synchronize()
        runs.append((model, optimizer))
    (model, optimizer), (wanted, reference) = runs
    assert_same(model, wanted)
    assert_same_state(optimizer, reference)


def test_a_step_waits_for_its_own_stream() -> None:
    """The gradients come late, in a stream that is not the default one."""
    mask = random_mask(Bag())
    expected, model = on_gpu(1), on_gpu(0)
    SafeAdamW(expected.named_parameters(), freeze=mask, **HYPER).step()
    optimizer = SafeAdamW(model.named_parameters(), freeze=mask, **HYPER)
    late = [p.grad.clone() for p in on_gpu(1).parameters()]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        for p, gradient in zip(model.parameters(), late, strict=True):
            p.grad.copy_(gradient)
        optimizer.step()
    stream.synchronize()
    assert_same(model, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_each_device_gets_its_own_launch() -> None:
    mask, models = random_mask(Bag()), [on_gpu(), on_gpu()]
    for k, model in enumerate(models):
        model.to(f"cuda:{k}")
        for p in model.parameters():
            p.grad = p.grad.to(p.device)
        SafeAdamW(model.named_parameters(), freeze=mask, **HYPER).step()
    assert_same(models[1].to("cuda:0"), models[0])


@pytest.mark.slow
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 24 * 2**30,
    reason="not enough memory on the GPU",
)
def test_more_elements_than_32_bits_count() -> None:
    """The last elements of a long tensor are stepped as they would be alone."""
    n, last = 2**31 + 4099, 5001
    torch.manual_seed(0)
    bits = torch.randint(256, (n // 8 + 1,), dtype=torch.uint8)
    options = {"lr": 3e-3, "beta1": 0.85, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.13,
               "amsgrad": False, "maximize": False}  # fmt: skip
    p, g = (torch.empty(n, dtype=torch.bfloat16, device=GPU).normal_() for _ in range(2))
    starts = ops.live_starts(n, bits, 1, n, 0, True)
    count = int(starts[-1])
    m, v = (torch.zeros(count, dtype=torch.bfloat16, device=GPU) for _ in range(2))
    rule = ([1], [n], [n - last], [], [], True)
    end = ops.live_starts(last, bits, 1, n, n - last, True)
    few = int(end[-1])
    alone = [[p[-last:].cpu()], [g[-last:].cpu()], [m[-few:].cpu()], [v[-few:].cpu()], [],
             [torch.tensor(0.0)], [bits], [end], *rule]  # fmt: skip
    whole = [[p], [g], [m], [v], [], [torch.tensor(0.0)], [bits.to(GPU)], [starts.to(GPU)], [1],
             [n], [0], [], [], True]  # fmt: skip
    torch.ops.safeopt.masked_adamw_(*whole, **options)
    torch.ops.safeopt.masked_adamw_(*alone, **options)
    for actual, expected in ((p[-last:], alone[0]), (m[-few:], alone[2]), (v[-few:], alone[3])):
        torch.testing.assert_close(actual.cpu(), expected[0], rtol=1e-2, atol=1e-6)
