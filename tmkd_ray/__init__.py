"""Distributed knowledge distillation on Ray, with text-guided multi-view teachers."""

__version__ = "0.1.0"
