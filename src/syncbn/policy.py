"""The former names of `groups` and `validation`, until every module uses the new ones."""

from __future__ import annotations

from typing import Any

from syncbn.groups import LOCAL as ALONE
from syncbn.groups import Activation, Axes, Group, Sharded
from syncbn.groups import Local as Alone
from syncbn.validation import RECORD_MOMENTS, check_no_axis_name, check_renorm_not_recomputed, mask_omits_channels
from syncbn.validation import check_float_dtype as floating
from syncbn.validation import check_group_size as group_size
from syncbn.validation import check_renorm_clipping as clipping
from syncbn.validation import number_of_groups as groups

__all__ = ["ALONE", "RECORD_MOMENTS", "Activation", "Alone", "Axes", "Group", "Sharded"]
__all__ += ["clipping", "floating", "group_size", "groups", "mask_omits_channels"]


def _raised(check: Any, *arguments: Any) -> Exception:
    try:
        check(*arguments)
    except Exception as error:
        return error
    raise AssertionError


def axis_name_elsewhere(*arguments: Any) -> Exception:
    return _raised(check_no_axis_name, *arguments)


def recomputed_renorm(*arguments: Any) -> Exception:
    return _raised(check_renorm_not_recomputed, True, *arguments)


def cross_replica() -> RuntimeError:
    return RuntimeError(
        "SyncBatchNormalization must train inside a replica. Received: a call with training=True in cross-replica context of a "
        "tf.distribute strategy. Call the model inside strategy.run(...), or use model.fit."
    )


def parameter_server() -> RuntimeError:
    return RuntimeError(
        "SyncBatchNormalization must run under a strategy whose replicas train in step. Received: ParameterServerStrategy, "
        "whose workers do not wait for each other. Use MirroredStrategy, MultiWorkerMirroredStrategy or "
        "keras.layers.BatchNormalization."
    )
