"""QuickDraw, 200 classes: experiments 5 to 8, like_vgg with four losses and optimizers.

The text after the colon is adam, focal, rmsprop or adamw.

Published validation accuracy: 62.30, 60.79, 61.63, 62.67 %. Ours: not measured yet; on
Fashion-MNIST see fashion/like_vgg. Data and stopping as in quickdraw/lenet. The focal loss is the
published one, summed over classes and examples.

    python -m flaxcls.main --config=quickdraw/like_vgg:adamw --config.data.path=DIR
"""

from ml_collections import ConfigDict

from flaxcls import config
from flaxcls.configs.quickdraw import lenet

EXPERIMENTS = {name: name for name in ("adam", "focal", "rmsprop", "adamw")}


def get_config(experiment: str = "adamw") -> ConfigDict:
    return as_in(lenet.get_config(), experiment)


def as_in(c: ConfigDict, experiment: str) -> ConfigDict:
    """Sets model, loss and optimizer of one of the four experiments."""
    experiment = config.choose(experiment, EXPERIMENTS)
    c.model.name = "like_vgg"
    c.optimizer.name = "adam" if experiment == "focal" else experiment
    c.optimizer.momentum = None
    c.optimizer.learning_rate = 1e-3
    if experiment == "focal":
        c.loss.name = "focal"
        c.loss.form = "sigmoid"
        c.loss.alpha = (0.25,)
        c.loss.gamma = 2.0
        c.loss.reduction = "sum"
    if experiment == "adamw":
        c.optimizer.weight_decay = 1e-2
    return c
