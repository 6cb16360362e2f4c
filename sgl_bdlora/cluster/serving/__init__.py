"""The cluster on Ray Serve: front, replicas, controller and router. Needs the extra `cluster` (ray[serve])."""
