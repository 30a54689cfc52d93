"""Weights of torchvision, timm and our own runs: equal logits, a report, and no trust in files."""

import hashlib
import json
import os
import pickle
import re
import zipfile
from functools import partial

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import linen as nn
from flax.traverse_util import flatten_dict
from small_hub import COMMITS, Hub, serve

from flaxcls import models, ops, pretrained
from flaxcls.errors import InputError
from flaxcls.pretrained.heads import NAMES, head_of

torch = pytest.importorskip("torch", reason="the reference is PyTorch, which is not installed")

import torchvision_twins as twins  # noqa: E402

CLASSES, WIDTH, SIZE = 5, 32, 64
VGG = {"pool_size": 7, "head_width": WIDTH}
NETWORKS = {
    "vgg16_bn": ("vgg16", VGG, partial(twins.VGG, convs=(2, 2, 3, 3, 3), batch_norm=True)),
    "vgg13": (
        "vgg13",
        {**VGG, "batch_norm": False},
        partial(twins.VGG, convs=(2, 2, 2, 2, 2), batch_norm=False),
    ),
    "timm's vgg16_bn": (
        "vgg16",
        VGG,
        partial(twins.TimmVGG, convs=(2, 2, 3, 3, 3), batch_norm=True),
    ),
    "resnet18": ("resnet18", {}, partial(twins.ResNet, blocks=(2, 2, 2, 2), bottleneck=False)),
    "resnet34": ("resnet34", {}, partial(twins.ResNet, blocks=(3, 4, 6, 3), bottleneck=False)),
    "resnet50": ("resnet50", {}, partial(twins.ResNet, blocks=(3, 4, 6, 3), bottleneck=True)),
    "googlenet": ("googlenet", {"variant": "torchvision"}, twins.GoogLeNet),
}
# As a part of others alone.
OTHERS = {
    "vgg11": (
        "vgg11",
        {**VGG, "batch_norm": False},
        partial(twins.VGG, convs=(1, 1, 2, 2, 2), batch_norm=False),
    ),
    "vgg11_bn": ("vgg11", VGG, partial(twins.VGG, convs=(1, 1, 2, 2, 2), batch_norm=True)),
}
# A tensor of the last layers before the head, and where it is in our trunk.
LAST = {
    "resnet18": ("layer4.1.conv2.weight", ("stage4_block2", "conv2")),
    "googlenet": ("inception5b.branch3.1.conv.weight", ("inception5b", "five", "conv")),
    "vgg11": ("features.18.weight", ("conv5_2",)),
}


def network(name, num_classes=CLASSES):
    """A twin with statistics that differ from those of a new one."""
    torch.manual_seed(0)
    make = (NETWORKS | OTHERS)[name][2]
    twin = make(num_classes, **({"width": WIDTH} if "vgg" in name else {}))
    for module in twin.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    return twin.eval()


def model_and_variables(name, num_classes=CLASSES, **options):
    model = models.create_model(name, num_classes, **options)
    shapes = jax.eval_shape(
        partial(model.init, train=False),
        jax.random.key(0),
        jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), np.float32),
    )
    return model, jax.tree.map(lambda leaf: np.full(leaf.shape, 0.25, leaf.dtype), shapes)


def state(twin):
    return {k: v.detach().numpy() for k, v in twin.state_dict().items()}


def write(twin, path):
    if path.suffix == ".safetensors":
        safetensors.numpy.save_file(state(twin), path)
    else:
        torch.save(twin.state_dict(), path)
    return path


def assert_same_logits(model, variables, twin):
    images = np.random.default_rng(0).normal(size=(2, SIZE, SIZE, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = twin(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    run = jax.jit(partial(model.apply, train=False), compiler_options=ops.compiler_options())
    ours = run(variables, images)
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


@pytest.mark.parametrize("name", NETWORKS)
def test_imported_weights_give_the_same_logits(tmp_path, name):
    twin, (ours, options, _) = network(name), NETWORKS[name]
    model, variables = model_and_variables(ours, **options)
    loaded, report = pretrained.load(write(twin, tmp_path / "w.safetensors"), model, variables)
    assert_same_logits(model, loaded, twin)
    assert len(report.loaded) == len(flatten_dict(variables))
    assert report.initialised == {}
    assert all(tensor.startswith("aux") for tensor in report.unused)
    assert bool(report.unused) == (name == "googlenet")
    expected = 0.5 if name == "googlenet" else 0.485
    assert report.normalization[0][0] == expected


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrapped", [None, "state_dict"])
def test_pth_files_are_read_without_pytorch(tmp_path, legacy, wrapped, monkeypatch):
    twin = network("resnet18").half().float()
    content = {f"module.{k}": v for k, v in twin.state_dict().items()}
    content = {"epoch": 3, "lr": 0.1, wrapped: content} if wrapped else content
    path = tmp_path / "weights.pth"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    monkeypatch.setattr(torch, "load", None)
    loaded, _ = pretrained.load(path, *model_and_variables("resnet18"))
    direct, _ = pretrained.load(
        write(twin, tmp_path / "w.safetensors"), *model_and_variables("resnet18")
    )
    jax.tree.map(np.testing.assert_array_equal, loaded, direct)


def test_a_view_and_a_half_tensor_of_a_pth_file_keep_their_values(tmp_path):
    twin = network("resnet18")
    tensors = twin.state_dict()
    fc = tensors["fc.weight"]
    tensors["fc.weight"] = torch.nn.Parameter(fc.T.contiguous().T)  # strides of its own
    tensors["fc.bias"] = torch.cat([torch.zeros(3), tensors["fc.bias"]])[3:].bfloat16()  # an offset
    torch.save(tensors, tmp_path / "w.pt")
    loaded, _ = pretrained.load(tmp_path / "w.pt", *model_and_variables("resnet18"))
    np.testing.assert_array_equal(loaded["params"]["head"]["kernel"], fc.T)
    expected = tensors["fc.bias"].float()
    np.testing.assert_array_equal(loaded["params"]["head"]["bias"], expected)


@pytest.mark.parametrize("name", ["vgg16_bn", "vgg13", "resnet50", "googlenet"])
def test_torchvisions_layout_round_trips(tmp_path, name):
    twin, (ours, options, _) = network(name), NETWORKS[name]
    model, variables = model_and_variables(ours, **options)
    loaded, _ = pretrained.load(write(twin, tmp_path / "in.safetensors"), model, variables)
    pretrained.save(tmp_path / "out.safetensors", model, loaded)
    again = safetensors.numpy.load_file(tmp_path / "out.safetensors")
    expected = {
        k: v
        for k, v in state(twin).items()
        if not k.startswith("aux") and not k.endswith("num_batches_tracked")
    }
    assert again.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(again[key], value)


def test_our_own_layout_round_trips_and_a_head_of_another_size_stays(tmp_path):
    path = tmp_path / "own.safetensors"
    model, variables = model_and_variables("fashion_net1")
    drawn = jax.tree.map(
        lambda leaf: np.random.default_rng(leaf.size).normal(size=leaf.shape).astype(leaf.dtype),
        variables,
    )
    about = {"model": "fashion_net1", "mean": [0.1], "std": [0.3]}
    pretrained.save(path, model, drawn, about=about)
    loaded, report = pretrained.load(path, model, variables)
    jax.tree.map(np.testing.assert_array_equal, loaded, drawn)
    assert report.normalization == ((0.1,), (0.3,))

    other, others = model_and_variables("fashion_net1", 7)
    loaded, report = pretrained.load(path, other, others)
    assert set(report.initialised) == {"params/head/kernel", "params/head/bias"}
    assert "left at initialisation: params/head/" in str(report)
    np.testing.assert_array_equal(loaded["params"]["head"]["bias"], np.full(7, 0.25))
    np.testing.assert_array_equal(
        loaded["params"]["dense1"]["kernel"], drawn["params"]["dense1"]["kernel"]
    )


def test_a_head_of_another_size_stays_and_is_reported(tmp_path):
    path = write(network("resnet18", num_classes=1000), tmp_path / "w.safetensors")
    loaded, report = pretrained.load(path, *model_and_variables("resnet18"))
    assert set(report.initialised) == {"params/head/kernel", "params/head/bias"}
    assert report.initialised["params/head/kernel"] == "(512, 1000) there, (512, 5) here"
    np.testing.assert_array_equal(loaded["params"]["head"]["bias"], np.full(5, 0.25))


class Own(nn.Module):
    """As a user writes it: no layer has a name."""

    num_classes: int

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.relu(nn.Conv(7, (3, 3))(images)).mean((1, 2))
        x = nn.relu(nn.Dense(5)(x))
        return nn.Dense(self.num_classes)(x)


def shapes_of(model, *image_shape):
    images = jax.ShapeDtypeStruct((1, *image_shape), np.float32)
    return jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)


def test_the_head_of_a_users_own_model_may_be_of_another_size(tmp_path):
    """Also where another layer is as wide as there are classes."""
    path, image_shape = tmp_path / "own.safetensors", (SIZE, SIZE, 3)
    model = Own(10)
    filled = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes_of(model, 8, 8, 3))
    pretrained.save(path, model, filled)
    shapes = shapes_of(Own(5), 8, 8, 3)
    _, report = pretrained.load(path, Own(5), shapes, image_shape=image_shape)
    assert set(report.initialised) == {"params/Dense_1/kernel", "params/Dense_1/bias"}
    assert report.initialised["params/Dense_1/kernel"] == "(5, 10) there, (5, 5) here"

    filled["params"]["Dense_0"] = {"kernel": np.ones((7, 6)), "bias": np.ones(6)}
    pretrained.save(path, model, filled)
    with pytest.raises(InputError, match=r"'params/Dense_0/(kernel|bias)' has shape .*6,?\)"):
        pretrained.load(path, Own(5), shapes, image_shape=image_shape)


@pytest.mark.parametrize(
    ("name", "options"), [("fashion_net2", {}), ("hierarchical", {"trunk": "lenet"})]
)
def test_the_heads_of_our_models_have_their_names(name, options):
    model = models.create_model(name, 4, **options)
    shapes = flatten_dict(shapes_of(model, 28, 28, 1))
    named = {path for path in shapes if path[-2] in NAMES}
    # Its input is the parents' logits, its output is as wide whatever their number.
    named -= {("params", "from_parent", "bias")}
    assert head_of(model, shapes, (28, 28, 1)) == named


def kernel_at(params, path):
    for part in path:
        params = params[part]
    return params["kernel"]


@pytest.mark.parametrize("name", LAST)
def test_a_hierarchical_model_takes_the_trunk(tmp_path, name):
    """Of the network that its options make of it, as the weights are of that one."""
    twin, (trunk, options, _) = network(name, num_classes=1000), (NETWORKS | OTHERS)[name]
    path = write(twin, tmp_path / "w.safetensors")
    model, variables = model_and_variables("hierarchical", trunk=trunk, **options)
    loaded, report = pretrained.load(path, model, variables)
    theirs, ours = LAST[name]
    kernel = kernel_at(loaded["params"]["trunk"]["trunk"], ours)
    np.testing.assert_array_equal(kernel, state(twin)[theirs].transpose(2, 3, 1, 0))
    head = "classifier.6." if trunk == "vgg11" else "fc."
    assert all(tensor.startswith((head, "aux")) for tensor in report.unused)
    assert {tensor for tensor in report.unused if tensor.startswith(head)} == {
        *(f"{head}weight", f"{head}bias")
    }
    assert {name.split("/")[1] for name in report.initialised} == {
        *("head", "own", "parent_head", "from_parent")
    }


@pytest.mark.parametrize("name", ["vgg16_bn", "vgg11"])
def test_the_residual_cam_model_takes_all_of_vgg(tmp_path, name):
    path, (trunk, options, _) = tmp_path / "w.safetensors", (NETWORKS | OTHERS)[name]
    write(network(name), path)
    model, variables = model_and_variables("residual_cam", trunk=trunk, **options)
    _, report = pretrained.load(path, model, variables)
    assert set(report.initialised) == {"params/cam_head/kernel", "params/cam_head/bias"}
    assert report.unused == ()


@pytest.mark.parametrize("name", ["resnet18", "googlenet"])
def test_the_residual_cam_model_takes_another_trunk(tmp_path, name):
    twin, (trunk, options, _) = network(name), NETWORKS[name]
    path = write(twin, tmp_path / "w.safetensors")
    model, variables = model_and_variables("residual_cam", trunk=trunk, head_width=8, **options)
    loaded, report = pretrained.load(path, model, variables)
    theirs, ours = LAST[name]
    kernel = kernel_at(loaded["params"]["trunk"], ours)
    np.testing.assert_array_equal(kernel, state(twin)[theirs].transpose(2, 3, 1, 0))
    assert {name.split("/")[1] for name in report.initialised} == {"cam_head", "classifier"}
    pretrained.save(path, model, loaded)
    jax.tree.map(np.testing.assert_array_equal, pretrained.load(path, model, variables)[0], loaded)


def test_names_of_the_hub_come_from_its_cache(tmp_path, monkeypatch):
    """The cache as huggingface_hub lays it out; timm's config says the normalisation."""
    commit = COMMITS[0]
    snapshot = tmp_path / "models--timm--resnet18.tv_in1k" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (tmp_path / "models--timm--resnet18.tv_in1k" / "refs").mkdir()
    (tmp_path / "models--timm--resnet18.tv_in1k" / "refs" / "main").write_text(commit)
    twin = network("resnet18")
    write(twin, snapshot / "model.safetensors")
    config = {"architecture": "resnet18", "pretrained_cfg": {"mean": [0.4] * 3, "std": [0.2] * 3}}
    (snapshot / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model, variables = model_and_variables("resnet18")
    loaded, report = pretrained.load("hf-hub:timm/resnet18.tv_in1k", model, variables)
    assert_same_logits(model, loaded, twin)
    assert report.normalization == ((0.4,) * 3, (0.2,) * 3)
    assert report.origin == pretrained.Origin("hf-hub:timm/resnet18.tv_in1k", commit=commit)
    assert f"arrays from hf-hub:timm/resnet18.tv_in1k (commit {commit[:12]})" in str(report)
    with pytest.raises(InputError, match=r"resnet50.tv_in1k is not in the cache and cannot be"):
        pretrained.load("hf-hub:timm/resnet50.tv_in1k", model, variables)
    with pytest.raises(InputError, match="is no name of the hub; write hf-hub:OWNER/NAME"):
        pretrained.load("hf-hub:a b/c/d", model, variables)


def test_both_files_of_the_hub_are_of_one_commit_though_it_moves(tmp_path, monkeypatch):
    """The hub's `main` moves after each file that is fetched."""
    model, variables = model_and_variables("fashion_net1")
    commits = {}
    for number, commit in enumerate(COMMITS):
        drawn = jax.tree.map(lambda leaf, value=number: np.full_like(leaf, value), variables)
        pretrained.save(tmp_path / "w.safetensors", model, drawn)
        config = json.dumps({"mean": [number / 10], "std": [0.3]}).encode()
        content = (tmp_path / "w.safetensors").read_bytes()
        commits[commit] = {"model.safetensors": content, "config.json": config}
    hub, name = Hub(commits), "hf-hub:owner/name"
    with serve(hub, monkeypatch, tmp_path / "cache"):
        loaded, report = pretrained.load(name, model, variables)
        assert report.origin.commit == COMMITS[0] != hub.main
        assert loaded["params"]["head"]["bias"][0] == 0
        assert report.normalization == ((0.0,), (0.3,))

        hub.asked.clear()
        _, again = pretrained.load(name, model, variables, expected=report.origin)
        assert again == report
        assert hub.asked == []

        loaded, newer = pretrained.load(name, model, variables)
        assert newer.origin.commit == COMMITS[1]
        assert loaded["params"]["head"]["bias"][0] == 1
        assert newer.normalization == ((0.1,), (0.3,))

        gone = pretrained.Origin(name, commit="c" * 40)
        with pytest.raises(InputError, match=f"@{gone.commit}'; start anew in another --workdir"):
            pretrained.load(name, model, variables, expected=gone)
        with pytest.raises(InputError, match="under 'hf-hub:owner/name@v9'; correct the name"):
            pretrained.load(f"{name}@v9", model, variables)


def test_without_a_config_of_the_hub_the_weights_say_their_normalisation(tmp_path, monkeypatch):
    """The first commit has no config.json, the second one without mean and std, the third both."""
    model, variables = model_and_variables("fashion_net1")
    pretrained.save(tmp_path / "w", model, variables, about={"mean": [0.1], "std": [0.3]})
    weights = {"model.safetensors": (tmp_path / "w").read_bytes()}
    names, configs = [*COMMITS, "c" * 40], [{"mean": [0.7]}, {"mean": [0.5], "std": [0.2]}]
    files = [{"config.json": json.dumps(config).encode()} for config in configs]
    commits = dict(zip(names, [weights, weights | files[0], weights | files[1]], strict=True))
    commits["d" * 40] = files[0]
    hub, name = Hub(commits), "hf-hub:owner/name"
    with serve(hub, monkeypatch, tmp_path / "cache"):
        _, report = pretrained.load(name, model, variables)
        assert report.origin.commit == names[0]
        assert report.normalization == ((0.1,), (0.3,))
        hub.asked.clear()
        assert pretrained.load(name, model, variables, expected=report.origin)[1] == report
        assert hub.asked == []
        found = [pretrained.load(f"{name}@{n}", model, variables)[1] for n in names[1:]]
        assert [r.normalization for r in found] == [((0.1,), (0.3,)), ((0.5,), (0.2,))]
        with pytest.raises(InputError, match=r"no 'model\.safetensors' under .*correct the name"):
            pretrained.load(f"{name}@{'d' * 40}", model, variables)


@pytest.mark.parametrize("file", ["w.safetensors", "w.pth"])
def test_a_file_is_known_by_its_hash_and_another_is_not_what_was_expected(tmp_path, file):
    path, arguments = tmp_path / file, model_and_variables("resnet18")
    write(network("resnet18"), path)
    _, report = pretrained.load(path, *arguments)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert report.origin == pretrained.Origin(str(path), sha256=digest)
    assert f"arrays from '{path}' (SHA-256 {digest[:12]})" in str(report)
    assert pretrained.load(path, *arguments, expected=report.origin)[1] == report

    write(network("resnet18", num_classes=7), path)
    with pytest.raises(InputError, match=f"the run began with SHA-256 {digest[:12]}; restore"):
        pretrained.load(path, *arguments, expected=report.origin)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_a_malicious_pickle_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for legacy in (False, True):
        path = tmp_path / f"legacy_{legacy}.pth"
        content = {"a": torch.zeros(2), "b": Malicious()}
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(InputError, match=r"asks for posix\.mkdir.*might run code; save only"):
            pretrained.load(path, *model_and_variables("resnet18"))
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(InputError, match=r"asks for posix\.mkdir"):
        pretrained.load(tmp_path / "plain.pt", *model_and_variables("resnet18"))
    assert not (tmp_path / "pwned").exists()


def damage(kind, path):
    twin = network("resnet18")
    if kind == "wrong shape":
        twin.layer1[0].conv1 = torch.nn.Conv2d(64, 64, 5, bias=False)
    write(twin, path)
    if kind == "missing tensor":
        tensors = safetensors.numpy.load_file(path)
        del tensors["layer2.1.bn1.running_var"]
        safetensors.numpy.save_file(tensors, path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    if kind == "empty":
        path.write_bytes(b"")
    if kind == "absent":
        path.unlink()


@pytest.mark.parametrize(
    ("kind", "file", "message"),
    [
        ("wrong shape", "w.safetensors", r"'layer1.0.conv1.weight' has shape \(64, 64, 5, 5\)"),
        ("wrong shape", "w.pth", r"'layer1.0.conv1.weight' has shape \(64, 64, 5, 5\)"),
        ("missing tensor", "w.safetensors", "no tensor 'layer2.1.bn1.running_var'"),
        ("truncated", "w.safetensors", "no .safetensors file, or a damaged one"),
        ("truncated", "w.pth", "no weights file of PyTorch, or a damaged one"),
        ("empty", "w.safetensors", "no .safetensors file, or a damaged one"),
        ("empty", "w.pth", "no weights file of PyTorch, or a damaged one"),
        ("absent", "w.safetensors", "there is no file"),
        ("absent", "w.pth", "there is no file"),
        (None, "w.onnx", "ends in none of .safetensors, .pth, .pt and .bin"),
    ],
)
def test_a_file_that_does_not_fit_is_named(tmp_path, kind, file, message):
    path = tmp_path / file
    if kind is not None:
        damage(kind, path)
    with pytest.raises(InputError, match=message) as caught:
        pretrained.load(path, *model_and_variables("resnet18"))
    assert "\n" not in str(caught.value)


def test_a_truncated_legacy_file_is_named(tmp_path):
    path = tmp_path / "w.pth"
    torch.save(network("resnet18").state_dict(), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match="no weights file of PyTorch, or a damaged one"):
        pretrained.load(path, *model_and_variables("resnet18"))


def test_a_tensor_beyond_its_storage_is_refused(tmp_path):
    good, bad = tmp_path / "good.pth", tmp_path / "bad.pth"
    torch.save({"fc.bias": torch.zeros(8)}, good)
    with zipfile.ZipFile(good) as archive, zipfile.ZipFile(bad, "w") as changed:
        for name in archive.namelist():
            content = archive.read(name)
            changed.writestr(name, content[:4] if "/data/" in name else content)
    with pytest.raises(InputError, match="no weights file of PyTorch, or a damaged one"):
        pretrained.load(bad, *model_and_variables("resnet18"))


@pytest.mark.parametrize(
    ("weights", "name", "options", "setting"),
    [
        ("googlenet", "googlenet", {}, "model.variant=torchvision"),
        ("googlenet", "hierarchical", {"trunk": "googlenet"}, "model.variant=torchvision"),
        ("vgg11", "vgg11", VGG, "model.batch_norm=False"),
        (
            "vgg11",
            "residual_cam",
            {"trunk": "vgg11", "head_width": WIDTH},
            "model.batch_norm=False",
        ),
        ("vgg11_bn", "vgg11", {**VGG, "batch_norm": False}, "model.batch_norm=True"),
        ("vgg11_bn", "vgg11", {"head_width": WIDTH}, "model.pool_size=7"),
        ("vgg11_bn", "vgg11", {}, "model.pool_size=7 and model.head_width=32"),
        ("vgg11_bn", "vgg11", {"pool_size": 7}, "model.head_width=32"),
        ("vgg11_bn", "vgg13", VGG, "give weights of this very model"),
        ("resnet18", "resnet34", {}, "give weights of this very model"),
        ("resnet18", "googlenet", {}, "give weights that flaxcls has saved"),
    ],
)
def test_an_option_that_makes_the_weights_fit_is_named(tmp_path, weights, name, options, setting):
    path = write(network(weights), tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=f"; {re.escape('set ' * (setting[0] == 'm') + setting)}$"):
        pretrained.load(path, *model_and_variables(name, **options))


def test_weights_of_another_network_are_refused(tmp_path):
    path = write(network("resnet18"), tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"no tensor 'features\.0\.weight'.*it holds "):
        pretrained.load(path, *model_and_variables("vgg16", pool_size=7, head_width=WIDTH))
    with pytest.raises(InputError, match="torchvision and timm have no network like this LeNet"):
        pretrained.load(path, *model_and_variables("lenet"))
    with pytest.raises(InputError, match="torchvision has no network like this LeNet"):
        pretrained.save(path, *model_and_variables("lenet"), layout="torchvision")
