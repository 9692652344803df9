"""How variants of one base model are made and kept: base models, recipes, training, and the shelf.

Importing this loads neither torch nor transformers; training and conversion import them when they start.
"""

from .adapters.adapter_check import check_adapter, check_variant
from .adapters.adapter_files import AdapterFacts
from .recipes.produce import produce
from .recipes.recipe import ProgramData, Recipe, TrafficData, load_recipe
from .shelf.base_model import base_fingerprint, cache_folder, check_base, check_weights, find_base
from .shelf.shelf import Shelf
from .shelf.variant import AskSpec, EngineSpec, Variant
from .training.loop import Progress, TrainingSettings

__all__ = [
    "AdapterFacts",
    "AskSpec",
    "EngineSpec",
    "ProgramData",
    "Progress",
    "Recipe",
    "Shelf",
    "TrafficData",
    "TrainingSettings",
    "Variant",
    "base_fingerprint",
    "cache_folder",
    "check_adapter",
    "check_base",
    "check_variant",
    "check_weights",
    "find_base",
    "load_recipe",
    "produce",
]
