"""Fashion-MNIST with fashion_net0, whose results and data are in configs/fashion_net0.py's head.

Published: 91.37 % test accuracy. Ours: 91.46 %.

    python -m flaxcls.main --config=fashion/fashion_net0 --config.data.path=DIR
"""

from functools import partial

from flaxcls.configs import fashion_net0

get_config = partial(fashion_net0.get_config, "fashion_mnist")
