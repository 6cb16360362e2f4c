"""How many replicas: the controller's number, which replicas pass on to Serve's autoscaler."""

from __future__ import annotations

import math


def required(context) -> tuple[int, dict]:
    """An autoscaling policy of Ray Serve. Before any replica has said a number, as many as there are to be now."""
    said = (context.aggregated_metrics or {}).get("required", {})
    wanted = max((math.ceil(count) for count in said.values()), default=0)
    return max(wanted, 1) if wanted else context.target_num_replicas, {}
