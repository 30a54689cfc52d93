"""QuickDraw, 200 classes: experiment 9, the CNN with a global average pool.

Published: 61.00 % validation accuracy. Ours: not measured yet. Data and stopping as in
quickdraw/lenet.

    python -m flaxcls.main --config=quickdraw/ai_inno_cnn --config.data.path=DIR
"""

from ml_collections import ConfigDict

from flaxcls.configs.quickdraw import lenet


def get_config() -> ConfigDict:
    c = lenet.get_config()
    c.model.name = "ai_inno_cnn"
    c.optimizer.name = "adam"
    c.optimizer.momentum = None
    c.optimizer.learning_rate = 1e-3
    return c
