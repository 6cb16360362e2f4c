"""Many replicas: which adapter lives where, who answers a request, and a simulation of both.

Everything but `serving`, which runs them on Ray, is pure code: importing it imports neither torch, sglang nor ray.
"""
