"""Naive AdamW with a mask: one Python loop per element, in float64, from the paper's equations.

Independent of torch's optimizers and of safeopt: Loshchilov and Hutter 2019, arXiv 1711.05101,
algorithm 2 (AMSGrad: Reddi et al. 2018, arXiv 1904.09237, with torch's bias correction).
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def masked_adamw(
    theta: Sequence[float],
    grads: Sequence[Sequence[float]],
    live: Sequence[bool],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    amsgrad: bool = False,
    maximize: bool = False,
    anchor: Sequence[float] | None = None,
    shares: Sequence[float] | None = None,
    strength: float = 0.0,
    decoupled: bool = False,
) -> list[float]:
    """The values after one step per entry of `grads`; entries that are not live stay.

    With an `anchor` a, the penalty strength * s (theta - a)^2 acts: its gradient is added to g, or,
    decoupled, at most the whole way to a is taken off beside the decay.
    """
    theta = list(theta)
    beta1, beta2 = betas
    for i in range(len(theta)):
        if not live[i]:
            continue
        m = v = v_max = 0.0
        for t, g in enumerate(grads, start=1):
            g_t = -g[i] if maximize else g[i]
            pull = 2 * strength * (shares[i] if shares else 1.0)
            if anchor and not decoupled:
                g_t += pull * (theta[i] - anchor[i])
            theta[i] -= lr * weight_decay * theta[i]
            if anchor and decoupled:
                theta[i] -= min(1.0, lr * pull) * (theta[i] - anchor[i])
            m = beta1 * m + (1 - beta1) * g_t
            v = beta2 * v + (1 - beta2) * g_t * g_t
            v_max = max(v_max, v)
            v_hat = (v_max if amsgrad else v) / (1 - beta2**t)
            theta[i] -= lr * (m / (1 - beta1**t)) / (math.sqrt(v_hat) + eps)
    return theta
