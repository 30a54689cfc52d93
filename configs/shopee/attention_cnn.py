"""Product photos: the experiment of shopee/baseline_cnn with attention to earlier feature maps.

Published: 64.44 % test accuracy. Ours, and the data: see there.

    python -m flaxcls.main --config=shopee/attention_cnn --config.data.path=DIR
"""

from ml_collections import ConfigDict

from flaxcls.configs.shopee import baseline_cnn


def get_config() -> ConfigDict:
    c = baseline_cnn.get_config()
    c.model.name = "attention_cnn"
    return c
