"""Training chosen entries of a model's weights through any torch optimizer.

``weight``: one weight and its values. ``saved``: what is saved of it. ``given``: choices made by hand. ``seat``: its
place in a module. ``observe``: what optimizers do. ``settings``: what may be asked for. ``replicas``: several processes
under DDP. ``training``: all of them together. Which entries are chosen is the business of a method.
"""

from fullrank.sparse.replicas import IGNORED, names_of
from fullrank.sparse.weight import is_values

__all__ = ["IGNORED", "is_values", "names_of"]
