"""The table of a model's layers counts what there is."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from flaxcls import models, ops
from flaxcls.analysis.summary import model_summary


def rows_of(text):
    """Layer name -> its cells, as the table prints them."""
    return {line.split()[0]: line.split() for line in text.splitlines() if line.split()}


def test_layers_shapes_parameters_and_flops_of_lenet():
    text = model_summary(models.create_model("lenet", 200), (28, 28, 1))
    assert text.startswith("LeNet, input 28x28x1: 119,764 parameters and 0 running statistics")
    rows = rows_of(text)
    # Multiplications and additions, then the bias: 2 * 24*24 * 25 * 6 + 24*24*6.
    assert rows["trunk/conv1"][1:] == ["Conv", "24x24x6", "156", "0.176"]
    assert rows["trunk/conv2"][1:] == ["Conv", "8x8x16", "2,416", "0.308"]
    assert rows["dense1"][1:] == ["Dense", "256", "65,792", "0.131"]
    assert rows["head"][1:] == ["Dense", "200", "51,400", "0.103"]
    assert rows["total"][1] == "119,764"
    names = list(rows)
    order = ["trunk/conv1", "trunk/conv2", "dense1", "head"]
    assert [name for name in names if name in order] == order


def test_convolutions_count_padding_as_other_tools_do():
    rows = rows_of(model_summary(models.create_model("vgg13", 10), (32, 32, 3)))
    conv = next(row for name, row in rows.items() if name.endswith("conv5_1"))
    # 2x2 maps of 512 channels: 2 * 2*2 * 512 * 512*9, then the bias.
    assert conv[2:] == ["2x2x512", "2,359,808", f"{(2 * 4 * 512 * 512 * 9 + 4 * 512) / 1e6:.3f}"]


@pytest.mark.parametrize("name", ["vgg16c", "fashion_net0"])
def test_the_table_fits_100_columns_and_adds_up(name):
    text = model_summary(models.create_model(name, 1000), (1, 224, 224, 3))
    assert max(map(len, text.splitlines())) <= 100
    body = [line.split() for line in text.splitlines() if len(line.split()) == 5][1:]
    total = rows_of(text)["total"]
    params = [int(row[3].replace(",", "")) for row in body]
    flops = [float(row[4].replace(",", "")) for row in body]
    assert sum(params) == int(total[1].replace(",", ""))
    # Activations and pools that no BatchNorm was asked for are in the total only.
    rounding = 0.0005 * (len(flops) + 1)
    assert sum(flops) - rounding <= float(total[2].replace(",", "")) <= 1.02 * sum(flops)


def test_total_is_that_of_flax_tabulate_and_the_backend_is_left_alone():
    model = models.create_model("lenet", 3)
    text = model_summary(model, (28, 28, 1))
    with ops.use_backend("flax"):
        table = nn.tabulate(
            model, jax.random.key(0), compute_flops=True, console_kwargs={"width": 200}
        )(jnp.zeros((1, 28, 28, 1)), train=False)
    flops = float(rows_of(text)["total"][2])
    assert any(
        f"{flops:.3f}" == f"{int(cell) / 1e6:.3f}" for cell in table.split() if cell.isdigit()
    )
    assert ops.backend() == "auto"
