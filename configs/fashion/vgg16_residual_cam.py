"""Fashion-MNIST with VGG-16 times a global average pool, for class activation maps.

Published: 94.39 % test accuracy (364 minutes on a GTX 1080 Ti). Ours: not measured yet. All else,
the ImageNet weights that it depends on too, as in fashion/vgg16.

    python -m flaxcls.main --config=fashion/vgg16_residual_cam --config.data.path=DIR

From scratch: not measured yet; the same command with --config.model.pretrained=.
"""

from ml_collections import ConfigDict

from flaxcls.configs.fashion import vgg16


def get_config() -> ConfigDict:
    c = vgg16.get_config()
    c.model.name = "vgg16_residual_cam"
    return c
