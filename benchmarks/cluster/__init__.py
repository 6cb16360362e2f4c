"""Placement and routing over many replicas, in simulation."""
