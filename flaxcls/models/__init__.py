"""The models, by name. A model's file enters itself in the registry when it is imported here."""

from flaxcls.models import (
    attention_cnn,
    baseline_cnn,
    expanding_cnn,
    fashion_net,
    googlenet,
    hierarchical,
    lenet,
    local_attention_cnn,
    lstm_cnn,
    quickdraw,
    residual_cam,
    resnet,
    vgg,
)
from flaxcls.models.hierarchical import HierarchicalLogits
from flaxcls.models.registry import (
    create_model,
    list_models,
    model_options,
    register,
    registry,
    trunk_options,
)

__all__ = [
    "HierarchicalLogits",
    "attention_cnn",
    "baseline_cnn",
    "create_model",
    "expanding_cnn",
    "fashion_net",
    "googlenet",
    "hierarchical",
    "lenet",
    "list_models",
    "local_attention_cnn",
    "lstm_cnn",
    "model_options",
    "quickdraw",
    "register",
    "registry",
    "residual_cam",
    "resnet",
    "trunk_options",
    "vgg",
]
