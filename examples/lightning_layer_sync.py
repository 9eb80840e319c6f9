"""Lightning: every batch norm of a model is synchronised while `fit` runs, on two processes.

python examples/lightning_layer_sync.py
"""

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import LayerSync
from torch.utils.data import DataLoader

import syncbn


class SynchronisedBatchNorm(LayerSync):
    """Give it to the Trainer as a plugin, in place of `sync_batchnorm=True`."""

    def apply(self, model):
        """Before the model is wrapped in DistributedDataParallel."""
        return syncbn.convert(model)

    def revert(self, model):
        """After training: the classes that were there."""
        return syncbn.revert(model)


class Regression(LightningModule):
    """A network with a batch norm of torch's."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 1))

    def training_step(self, batch, index):
        """The loss of one batch."""
        self.trained_as = type(self.net[1]).__name__
        x, y = batch
        return torch.nn.functional.mse_loss(self.net(x), y)

    def on_train_end(self):
        """What this process has: the same numbers in all of them."""
        print(f"rank {self.global_rank}: {self.trained_as} {self.net[1].running_mean.tolist()}", flush=True)

    def configure_optimizers(self):
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), 0.1)


def main():
    """Trains, then shows the class of the layer."""
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    model, data = Regression(), DataLoader(list(zip(x, x.sum(1, keepdim=True), strict=True)), batch_size=8)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    plugins = [SynchronisedBatchNorm()]
    Trainer(accelerator="cpu", devices=2, strategy="ddp_fork", max_epochs=1, plugins=plugins, **quiet).fit(model, data)
    print(f"after: {type(model.net[1]).__name__}", flush=True)


if __name__ == "__main__":
    main()
