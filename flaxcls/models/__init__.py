"""The models, by name. A model's file enters itself in the registry when it is imported here."""

from flaxcls.models import fashion_net, lenet, vgg
from flaxcls.models.registry import create_model, list_models, model_options, register, registry

__all__ = [
    "create_model",
    "fashion_net",
    "lenet",
    "list_models",
    "model_options",
    "register",
    "registry",
    "vgg",
]
