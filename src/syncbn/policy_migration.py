"""The errors and warnings of moving in and moving out: rule, what was received, mend."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

ON_UNKNOWN = ("error", "warn", "skip")


def on_unknown(value: Any) -> str:
    """What happens to a batch norm that cannot be exchanged."""
    if value not in ON_UNKNOWN:
        raise ValueError(
            f'`on_unknown` must be one of {list(ON_UNKNOWN)}. Received: on_unknown={value!r}. Give "error" to hear of each batch '
            "norm that stays."
        )
    return value


def _listed(found: Iterable[tuple[str, str]]) -> str:
    return "; ".join(f"{name or 'the model itself'} ({why})" for name, why in found)


def unknown_batch_norms(found: Sequence[tuple[str, str]]) -> str:
    """The text of an error, or a warning, that names batch norms of unknown behaviour."""
    return (
        "Only a batch norm whose whole behaviour is known can be exchanged, so a subclass that overrides nothing but `__init__`. "
        f'Received: {_listed(found)}. Leave them out with `filter` or on_unknown="skip", or make them of the framework\'s own '
        "classes."
    )


def no_batch_norm(verb: str, wanted: str, filtered: bool) -> str:
    """The text of the warning that nothing was done."""
    which = "that `filter` takes" if filtered else "at all"
    return f"{verb} expects a model that holds {wanted}. Received: a model with none {which}. It is returned as it was."


def not_a_model(verb: str, model: Any) -> TypeError:
    """Neither torch's nor Keras's."""
    cls = type(model)
    return TypeError(
        f"{verb} takes a torch.nn.Module or a Keras 3 layer or model. Received: {cls.__module__}.{cls.__qualname__}. For Flax, "
        "Equinox and Haiku call syncbn.functional.sync_batch_norm in the layer; for tf_keras save the model and give the file to "
        "syncbn.load_legacy."
    )


def torch_only(process_group: Any) -> ValueError:
    """An argument that Keras has no use for."""
    return ValueError(
        f"`process_group` is for torch modules. Received: process_group={process_group!r} with a Keras model. Use `group_size`; "
        "all replicas of the strategy meet otherwise."
    )


def keras_changed(name: str) -> RuntimeError:
    """Keras wraps `build` in another way than the versions that this was made for."""
    return RuntimeError(
        f"A layer that is not built changes its class only where Keras wraps its `build` as versions 3.14 and 3.15 do. Received: "
        f"{name}, wrapped in another way. Build the model first, for example by calling it on some data."
    )


# What a torch model may be wrapped in, and what to do first.
TORCH_STATES = {
    "compiled": "Take the model that was given to torch.compile, and compile the result",
    "scripted": "Take the Python model that was scripted, and export the result",
    "quantised": "Take the model from before quantisation, and quantise the result",
    "wrapped": "Take the bare model (`model.module`), and wrap the result",
    "sharded": "Build the model again, and shard the result with fully_shard",
}


def wrong_state(verb: str, name: str, cls: str, state: str) -> ValueError:
    """A torch model whose modules cannot be exchanged any more."""
    where = f"the submodule {name!r}, a {cls}" if name else f"a {cls}"
    return ValueError(f"{verb} takes a plain model. Received: {where}, which is {state}. {TORCH_STATES[state]}.")


def unknown_origin(found: Iterable[tuple[str, str]]) -> ValueError:
    """Layers made as ours: torch has three classes to choose from."""
    return ValueError(
        "A SyncBatchNorm that no conversion made becomes BatchNorm1d, 2d or 3d by the rank of its inputs, which must be known. "
        f"Received: {_listed(found)}. Give an input of the model that reaches them all: syncbn.revert(model, example=x)."
    )


def no_place(found: Iterable[tuple[str, str]], target: str) -> ValueError:
    """Layers that do what the framework's own cannot."""
    return ValueError(
        f"Only what {target} can do can be reverted. Received: {_listed(found)}. Make it a layer of its own, or "
        "leave the layer out with `filter`."
    )


def renorm_without_statistics(found: Iterable[tuple[str, str]]) -> ValueError:
    """Nothing to start renorm from."""
    return ValueError(
        "renorm=True starts from the moving statistics, so they must be kept. Received: "
        f"{_listed(found)}. Leave these layers out with `filter`, or convert with renorm=False."
    )


# ----------------------------------------------------------------------------------------------------------------- fold


def fold_in_training() -> ValueError:
    """Statistics that would still move."""
    return ValueError(
        "syncbn.fold takes a model in eval mode, because in training statistics are the batch's. Received: a model in training "
        "mode. Call model.eval() first."
    )


def folded_rank(rank: int, shape: Sequence[int]) -> ValueError:
    """An input whose dim 1 is not what the layer before the batch norm has as channels."""
    return ValueError(
        f"A batch norm that was folded into the layer before it takes that layer's output with the channels on dim 1, so of rank "
        f"{rank}. Received: shape {tuple(shape)}. Reshape the input of that layer, or run the model that was not folded."
    )


def fold_subclassed(name: str, cls: str) -> ValueError:
    """A model whose graph is not known."""
    return ValueError(
        f"syncbn.fold takes a Sequential or functional Keras model, whose graph it reads. Received: {name}, a {cls}. Fold the "
        "Sequential or functional models in it."
    )
