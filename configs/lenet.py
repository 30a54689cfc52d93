"""LeNet of the QuickDraw experiments, on the digits that need no download.

python -m flaxcls.main --config=configs/lenet.py
python -m flaxcls.main --config=configs/lenet.py:quickdraw --config.data.path=DIR
"""

from ml_collections import ConfigDict

from flaxcls import config


def get_config(dataset: str = "digits") -> ConfigDict:
    c = config.for_dataset(dataset, min_size=28)
    c.model.name = "lenet"

    c.train.batch_size = 64
    c.train.epochs = 30
    c.optimizer.name = "adam"
    c.optimizer.learning_rate = 1e-3
    c.schedule.name = "cosine"
    return c
