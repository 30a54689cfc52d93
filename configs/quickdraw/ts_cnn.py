"""QuickDraw, 200 classes: experiment 4, the CNN with a 1x1 convolution as its head.

Published: 56.44 % validation accuracy. Ours: not measured yet. Data and stopping as in
quickdraw/lenet.

    python -m flaxcls.main --config=quickdraw/ts_cnn --config.data.path=DIR
"""

from ml_collections import ConfigDict

from flaxcls.configs.quickdraw import lenet


def get_config() -> ConfigDict:
    c = lenet.get_config()
    c.model.name = "ts_cnn"
    c.optimizer.momentum = 0.9
    c.optimizer.weight_decay = 5e-4
    c.optimizer.learning_rate = 1e-3
    return c
