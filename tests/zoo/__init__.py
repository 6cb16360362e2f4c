"""Tiny random models and adapters on disk, and the Transformers + PEFT oracle that says what they must answer."""

from .adapters import RECIPES, Recipe, write_adapter
from .models import FAMILIES, write_model
from .oracle import Oracle

__all__ = ["FAMILIES", "RECIPES", "Oracle", "Recipe", "write_adapter", "write_model"]
