"""Synchronised batch normalization for PyTorch."""

from syncbn import _missing

try:
    from syncbn.torch.checkpoint import checkpoint_contexts
    from syncbn.torch.desync import debug
    from syncbn.torch.join import EmptySteps
    from syncbn.torch.lazy import LazySyncBatchNorm
    from syncbn.torch.local import local_statistics
    from syncbn.torch.module import SyncBatchNorm
except ImportError as error:
    raise _missing.explained("syncbn.torch", error, "torch") from error

__all__ = ["EmptySteps", "LazySyncBatchNorm", "SyncBatchNorm", "checkpoint_contexts", "debug", "local_statistics"]
