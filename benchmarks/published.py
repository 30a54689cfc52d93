"""What the authors of the recipes for Caltech-101 report, by part and model."""

# Validation accuracy at the last epoch. GoogLeNet's is not known.
CALTECH: dict[str, dict[str, float | None]] = {
    "expanding": {
        "1-add13": 0.95789,
        "2-add13": 0.98797,
        "3-add13": 0.98496,
        "4-add13": 0.99398,
        "1-double": 0.90376,
        "2-double": 0.98647,
        "3-double": 0.98496,
        "4-double": 0.99398,
        "1-triple": 0.93233,
        "2-triple": 0.99098,
        "3-triple": 0.98496,
        "4-triple": 0.99699,
    },
    "vgg": {
        "vgg11": 0.99398,
        "vgg13": 0.99549,
        "vgg16c": 0.99098,
        "vgg16": 0.98647,
        "vgg19": 0.98496,
    },
    "googlenet": {"googlenet": None},
}
