"""Product photos: the experiment of shopee/baseline_cnn with an LSTM over patches.

Published: 63.56 % test accuracy. Ours, and the data: see there.

The LSTM takes 6,272 steps a photo, one after the other: expect it to be the slowest of the four.

    python -m flaxcls.main --config=shopee/lstm_cnn --config.data.path=DIR
"""

from ml_collections import ConfigDict

from flaxcls.configs.shopee import baseline_cnn


def get_config() -> ConfigDict:
    c = baseline_cnn.get_config()
    c.model.name = "lstm_cnn"
    return c
