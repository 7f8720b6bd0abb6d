"""Views (visual priors): one file per image operation, with the prompts that name its prior.

To add one, add a file that registers a `View` subclass with `@VIEWS.register("name")`.
"""

from collections.abc import Mapping
from typing import Any

from tmkd_ray.registry import import_submodules
from tmkd_ray.views.base import VIEWS, ImageBatch, View, ViewConfig

__all__ = ["VIEWS", "ImageBatch", "View", "ViewConfig", "build_view"]


def build_view(name: str, config: ViewConfig | Mapping[str, Any]) -> View:
    """Return the view registered as `name`.

    Args:
        config: an instance of the view's `Config`, or the fields for one; fields left out take its defaults.

    Raises:
        UnknownNameError: no view has this name.
        pydantic.ValidationError: the config is not one for this view.
    """
    view = VIEWS.get(name)
    return view(view.Config.model_validate(config))


import_submodules(__name__, __path__)
