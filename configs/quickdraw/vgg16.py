"""QuickDraw, 200 classes: experiment 2, VGG-16 with its convolutions frozen.

Published: 54.61 % validation accuracy. Ours: not measured yet. Data and stopping as in
quickdraw/lenet. The accuracy depends on ImageNet weights, which are fetched from the Hugging Face
hub once; --config.model.pretrained=FILE takes a file.

    python -m flaxcls.main --config=quickdraw/vgg16 --config.data.path=DIR

From scratch, all of it trained: not measured yet; the same command with
--config.model.pretrained= --config.model.frozen='()'.
"""

from ml_collections import ConfigDict

from flaxcls.configs.quickdraw import lenet


def get_config() -> ConfigDict:
    c = lenet.get_config()
    c.data.image_size = 32
    c.data.channels = 3
    c.model.name = "vgg16"
    c.model.pool_size = 7
    c.model.dropout = 0.5
    c.model.pretrained = "hf-hub:timm/vgg16_bn.tv_in1k"
    c.model.frozen = ("trunk/*",)
    c.optimizer.name = "adam"
    c.optimizer.momentum = None
    c.optimizer.learning_rate = 1e-3
    return c
