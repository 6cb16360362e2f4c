"""Prometheus metrics per adapter, on SGLang's own `GET /metrics` (`--enable-metrics`).

SGLang's metrics are files that each of its processes maps (prometheus_client's multi-process mode); a label in them can never be taken
away again, so adapters that come and go would fill them. Ours are read when they are asked for: requests are counted in the launcher,
where they end, and the numbers of the pool come from rank 0 of each engine, in one small file each beside SGLang's.
"""
