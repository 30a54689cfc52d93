"""Loads weights into a model's variables and says what became of each; saves them."""

import dataclasses
import hashlib
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import safetensors
import safetensors.numpy
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from flaxcls.atomic_files import write_atomically
from flaxcls.errors import InputError
from flaxcls.pretrained import torch_files
from flaxcls.pretrained.heads import head_of
from flaxcls.pretrained.layouts import Entry, layout_of, remedy, sizes, to_ours, to_theirs

FORMAT_VERSION = 1
HUB = "hf-hub:"
Normalization = tuple[tuple[float, ...], tuple[float, ...]]


@dataclasses.dataclass(frozen=True)
class Origin:
    """Which weights were loaded, to the bit.

    Attributes:
      source: the file or name, as it was given.
      commit: of the hub's repository, 40 hexadecimal digits; None for a file.
      sha256: of the file, 64 hexadecimal digits; None for a name of the hub.
    """

    source: str
    commit: str | None = None
    sha256: str | None = None

    def __str__(self) -> str:
        return f"'{self.source}'" if self.commit is None else self.source

    @property
    def version(self) -> str:
        """The commit or the hash, in words and in short."""
        if self.commit is not None:
            return f"commit {self.commit[:12]}"
        return f"SHA-256 {(self.sha256 or '')[:12]}"


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of the arrays of a model and of a file.

    Attributes:
      origin: the file or name, and its version.
      loaded: our arrays that came from the file, as `params/head/kernel`.
      initialised: our arrays that stayed as they were, each with the reason.
      unused: tensors of the file that the model has no place for.
      normalization: mean and standard deviation of pixels in [0, 1] that the weights expect, a
        number a channel each; None where nothing says so.
    """

    origin: Origin
    loaded: tuple[str, ...]
    initialised: dict[str, str]
    unused: tuple[str, ...]
    normalization: Normalization | None

    def __str__(self) -> str:
        text = f"weights: {len(self.loaded)} arrays from {self.origin} ({self.origin.version})"
        if self.initialised:
            reasons = [f"{name} ({reason})" for name, reason in self.initialised.items()]
            text += f"; left at initialisation: {_shortened(reasons)}"
        if self.unused:
            text += f"; not used: {_shortened(list(self.unused))}"
        return text


def load(
    path_or_name: str | os.PathLike[str],
    model: nn.Module,
    variables: Any,
    *,
    expected: Origin | None = None,
    image_shape: tuple[int, int, int] | None = None,
) -> tuple[dict[str, Any], Report]:
    """Returns the variables with all that a file holds of them.

    Args:
      path_or_name: a `.safetensors` file, of ours or of torchvision's or timm's layout; a `.pth`,
        `.pt` or `.bin` file of PyTorch (nothing in it is run); or `hf-hub:OWNER/NAME` of the
        Hugging Face hub, which is fetched once and cached, all of it from one commit: the newest
        of the revision, or where the hub is out of reach, the last that was fetched.
      model: the module that the variables are of.
      variables: {"params", "batch_stats"}, arrays; what the file lacks stays as it is here.
      expected: what was loaded before and is to be loaded again: of the hub, that commit.
      image_shape: (H, W, C) of the images that the variables were made for. It tells the head of
        any model; without it, a head is a layer that has the name of one in our models.

    Returns:
      Variables of the same shapes and dtypes, NumPy where they were loaded, and a report.

    Raises:
      InputError: the file cannot be read, lacks a tensor, or has one of another shape; but a head
        may be absent, or of another number of classes. Or the weights are not the expected ones.
    """
    tensors, about, source = _read(str(path_or_name), expected)
    digests = (source.commit, source.sha256)
    if expected is not None and digests != (expected.commit, expected.sha256):
        raise InputError(
            f"{source} has {source.version}, and the run began with {expected.version}; restore "
            "those weights, or start anew in another --workdir"
        )
    ours = flatten_dict(dict(variables))
    native = any(name.startswith("params/") for name in tensors)
    layout = None if native else layout_of(model)
    if native:
        entries = [Entry(path, ("/".join(path),), "same") for path in ours]
    elif layout is not None:
        entries = list(layout.entries)
    else:
        raise InputError(
            f"{source}: torchvision and timm have no network like this {type(model).__name__}, so "
            "that their weights do not fit; "
            + _advice(remedy(model, tensors), "give weights that flaxcls has saved")
        )
    loaded, initialised, used = {}, {}, set()
    head = cache(lambda: head_of(model, ours, image_shape))  # traced where something is amiss
    for entry in entries:
        name = next((n for n in entry.names if n in tensors), None)
        if name is None:
            if entry.path not in head():
                setting = None if native else remedy(model, tensors)
                raise InputError(_missing(source, entry, tensors, setting))
            initialised["/".join(entry.path)] = "the file has none"
            continue
        used.add(name)
        array = tensors[name] if native else to_ours(entry.kind, tensors[name])
        wanted = ours[entry.path]
        if array.shape == tuple(wanted.shape):
            loaded[entry.path] = np.asarray(array).astype(wanted.dtype)
        elif entry.path in head() and array.ndim == len(wanted.shape):
            initialised["/".join(entry.path)] = f"{array.shape} there, {tuple(wanted.shape)} here"
        elif array.ndim == 4 and array.shape[2] == 3 and wanted.shape[2] == 1:
            raise InputError(
                f"{source}: the weights are for images of 3 channels and these have 1; set "
                "data.channels=3, which repeats grey images"
            )
        else:
            raise InputError(
                f"{source}: tensor '{name}' has shape {tensors[name].shape}, which does not fit "
                f"{'/'.join(entry.path)} {tuple(wanted.shape)}; "
                + _advice(
                    sizes(entry, array.shape, tuple(wanted.shape)),
                    "give weights of this very model and, where its parameters depend on it, image "
                    "size",
                )
            )
    for path in ours:
        if path not in loaded:
            initialised.setdefault("/".join(path), "not a part of those weights")
    if not loaded:
        raise InputError(f"{source}: nothing in it fits the model; give weights of this model")
    ignored = [n for n in tensors if n not in used and not n.endswith("num_batches_tracked")]
    report = Report(
        source,
        tuple("/".join(path) for path in loaded),
        initialised,
        tuple(ignored),
        _normalization(about) or (layout.normalization if layout else None),
    )
    return {**variables, **unflatten_dict(ours | loaded)}, report


def save(
    path: str | os.PathLike[str],
    model: nn.Module,
    variables: Any,
    *,
    layout: str = "auto",
    about: dict[str, Any] | None = None,
) -> None:
    """Writes variables as `.safetensors`, atomically; the same variables give the same bytes.

    Args:
      path: of the file.
      model: the module that the variables are of.
      variables: {"params": ..., "batch_stats": ...}, arrays on the host.
      layout: `torchvision`, names and forms that `load_state_dict` takes; `flaxcls`, our own, as in
        `params/trunk/conv1_1/kernel`; `auto`, torchvision's where it has the whole network.
      about: what the file's metadata say besides the format's version, under `flaxcls`, as JSON.

    Raises:
      InputError: torchvision has no such network.
    """
    ours = flatten_dict(dict(variables))
    known = None if layout == "flaxcls" else layout_of(model)
    if known is not None and not set(ours) <= {entry.path for entry in known.entries}:
        known = None  # heads that torchvision's network does not have must not be lost
    if known is None and layout == "torchvision":
        raise InputError(
            f"torchvision has no network like this {type(model).__name__}; save it with "
            "layout='flaxcls'"
        )
    if known is None:
        tensors = {"/".join(name): value for name, value in ours.items()}
    else:
        tensors = {
            entry.names[0]: to_theirs(entry.kind, np.asarray(ours[entry.path]))
            for entry in known.entries
        }
    tensors = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    # One entry, since safetensors writes several in an order that changes from run to run.
    metadata = {"flaxcls": json.dumps({"format_version": FORMAT_VERSION, **(about or {})})}
    write_atomically(path, safetensors.numpy.save(tensors, metadata))


def _read(
    path_or_name: str, expected: Origin | None
) -> tuple[dict[str, np.ndarray], dict[str, Any], Origin]:
    """Returns tensors by name, what is said about them, and where they are from."""
    if path_or_name.startswith(HUB):
        weights, config, commit = _fetch_both(path_or_name, expected.commit if expected else None)
        tensors, about = _read_safetensors(weights)
        published = {} if config is None else _timm_config(config)
        about = published if _normalization(published) else about
        return tensors, about, Origin(path_or_name, commit)
    path = Path(path_or_name).expanduser()
    if path.suffix == ".safetensors":
        tensors, about_file = _read_safetensors(path)
        return tensors, about_file, _origin_of_file(path_or_name, path)
    if path.suffix in (".pth", ".pt", ".bin"):
        return torch_files.read(path), {}, _origin_of_file(path_or_name, path)
    raise InputError(
        f"model.pretrained: '{path}' ends in none of .safetensors, .pth, .pt and .bin; give such a "
        f"file, or a name of the hub such as {HUB}timm/resnet18.tv_in1k"
    )


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    if not path.is_file():
        raise InputError(f"model.pretrained: there is no file '{path}'; correct the path")
    try:
        with safetensors.safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = json.loads(metadata.get("flaxcls", "{}"))
    except (safetensors.SafetensorError, OSError, ValueError, TypeError) as error:
        raise InputError(
            f"'{path}' is no .safetensors file, or a damaged one ({error}); fetch it anew"
        ) from error
    if about.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
        raise InputError(
            f"'{path}' has format {about['format_version']}, and this version of flaxcls reads "
            f"format {FORMAT_VERSION}; use the version that wrote it"
        )
    return tensors, about


def _origin_of_file(name: str, path: Path) -> Origin:
    with open(path, "rb") as file:
        return Origin(name, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def _fetch_both(name: str, commit: str | None) -> tuple[Path, Path | None, str]:
    """Returns the paths of a name's weights and config.json, and the commit that both are of.

    There need not be a config.json, which is of use for the normalisation alone.
    """
    weights = _fetch(name, "model.safetensors", commit)
    if weights is None:
        raise InputError(
            f"model.pretrained: the hub has no 'model.safetensors' under {name!r}; correct the name"
        )
    # The cache holds each file as snapshots/COMMIT/FILE, whatever revision it was asked for by.
    commit = weights.parent.name
    return weights, _fetch(name, "config.json", commit, cache=weights.parents[3]), commit


def _fetch(name: str, file: str, commit: str | None, cache: Path | None = None) -> Path | None:
    """Returns the path of a file of the hub, fetched unless it is in the cache.

    None where the repository has no such file; a `cache` that knows that of the commit is believed.
    A `commit` takes the place of the name's revision.
    """
    repository, _, revision = name.removeprefix(HUB).partition("@")
    if cache is not None:
        known = huggingface_hub.try_to_load_from_cache(repository, file, cache, commit)
        if known is huggingface_hub._CACHED_NO_EXIST:
            return None
    if commit is not None:
        revision, name = commit, f"{HUB}{repository}@{commit}"
    try:
        return Path(huggingface_hub.hf_hub_download(repository, file, revision=revision or None))
    except HFValidationError as error:
        raise InputError(
            f"model.pretrained: {name!r} is no name of the hub; write {HUB}OWNER/NAME, as in "
            f"{HUB}timm/resnet18.tv_in1k"
        ) from error
    except LocalEntryNotFoundError as error:
        raise _unreachable(name, error) from error
    except EntryNotFoundError:
        return None
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        gone = commit is not None and isinstance(error, RevisionNotFoundError)
        remedy = "start anew in another --workdir" if gone else "correct the name"
        raise InputError(
            f"model.pretrained: the hub has no {file!r} under {name!r}; {remedy}"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise _unreachable(name, error) from error


def _unreachable(name: str, error: Exception) -> InputError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return InputError(
        f"model.pretrained: {name} is not in the cache and cannot be fetched ({reason}); "
        "connect to the network, or give a file"
    )


def _timm_config(path: Path) -> dict[str, Any]:
    """Mean and standard deviation from a hub repository's config.json."""
    try:
        content = json.loads(path.read_text())
        about = content.get("pretrained_cfg", content)
        return {key: tuple(about[key]) for key in ("mean", "std") if key in about}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _normalization(about: dict[str, Any]) -> Normalization | None:
    if "mean" in about and "std" in about:
        return tuple(map(float, about["mean"])), tuple(map(float, about["std"]))
    return None


def _advice(setting: str | None, otherwise: str) -> str:
    return otherwise if setting is None else f"set {setting}"


def _missing(
    source: Origin, entry: Entry, tensors: dict[str, np.ndarray], setting: str | None
) -> str:
    held = ", ".join(list(tensors)[:4])
    return (
        f"{source}: there is no tensor '{entry.names[0]}' in it, which the model needs for "
        f"{'/'.join(entry.path)} (it holds {held}, ...); "
        + _advice(setting, "give weights of this very model")
    )


def _shortened(names: list[str]) -> str:
    shown = ", ".join(names[:6])
    return shown if len(names) <= 6 else f"{shown} and {len(names) - 6} more"
