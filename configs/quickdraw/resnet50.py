"""QuickDraw, 200 classes: experiment 3, ResNet-50 of which the last layer is trained.

Published: 47.19 % validation accuracy. Ours: not measured yet. Data and stopping as in
quickdraw/lenet. The accuracy depends on ImageNet weights, which are fetched from the Hugging Face
hub once; --config.model.pretrained=FILE takes a file.

    python -m flaxcls.main --config=quickdraw/resnet50 --config.data.path=DIR

From scratch, all of it trained: not measured yet; the same command with
--config.model.pretrained= --config.model.trainable='()'.
"""

from ml_collections import ConfigDict

from flaxcls.configs.quickdraw import lenet


def get_config() -> ConfigDict:
    c = lenet.get_config()
    c.data.image_size = 32
    c.data.channels = 3
    c.model.name = "resnet50"
    c.model.pretrained = "hf-hub:timm/resnet50.tv_in1k"
    c.model.trainable = ("head/*",)
    c.optimizer.name = "adam"
    c.optimizer.momentum = None
    c.optimizer.learning_rate = 1e-3
    return c
