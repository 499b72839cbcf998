"""The search for something better: `scenarios.py` with the arms of `search_arms.py` and
`search_inputs.py` beside.

    python benchmarks/search.py poison-10 --data DATA --out OUT --seeds 0 \
        --arms adamw linear-only task-space:0.01 task-trim:0.01 kron-block:0.01

The options are those of scenarios.py, but for --workers, whose processes know no arms from here.
"""

from __future__ import annotations

import scenarios
from search_arms import SEARCH_ARMS
from search_inputs import INPUT_ARMS

from safeopt.compare import ARMS

if __name__ == "__main__":
    ARMS.update({**SEARCH_ARMS, **INPUT_ARMS})
    scenarios.main()
