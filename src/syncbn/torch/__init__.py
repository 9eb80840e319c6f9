"""Synchronised batch normalization for PyTorch."""

from syncbn.torch.checkpoint import checkpoint_contexts
from syncbn.torch.desync import debug
from syncbn.torch.join import EmptySteps
from syncbn.torch.lazy import LazySyncBatchNorm
from syncbn.torch.local import local_statistics
from syncbn.torch.module import SyncBatchNorm

__all__ = ["EmptySteps", "LazySyncBatchNorm", "SyncBatchNorm", "checkpoint_contexts", "debug", "local_statistics"]
