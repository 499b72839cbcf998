"""Freeze or project weights inside the model, with torch.nn.utils.parametrize.

`freeze` keeps critical slices at their value under any optimizer, `project` keeps updates inside
the alignment subspace, `remove` bakes the result in. `model.state_dict()`, and with it
`save_pretrained`, holds the plain names and the assembled weights all the while.
"""

from safeopt.parametrize.register import freeze, project, remove

__all__ = ["freeze", "project", "remove"]
