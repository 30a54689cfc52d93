"""The models, by name."""

from flaxcls.models.registry import create_model, list_models, registry

__all__ = ["create_model", "list_models", "registry"]
