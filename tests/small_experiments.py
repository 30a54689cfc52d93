"""Small experiments in this process: `lenet` on a part of the digits."""

from ml_collections import ConfigDict

from flaxcls import config


def lenet(**changes) -> ConfigDict:
    """A resolved config; `changes` are keys and values, `train__epochs=2` for `train.epochs`."""
    c = config.for_dataset("digits", min_size=16)
    c.model.name = "lenet"
    c.data.max_per_class = 9
    c.train.batch_size = 12
    c.train.epochs = 3
    c.log.plots = False
    c.log.tensorboard = False
    c.update_from_flattened_dict({key.replace("__", "."): v for key, v in changes.items()})
    return config.resolve(c)[0]
