"""Hugging Face Accelerate: convert the model before `prepare`.

    accelerate launch --num_processes 2 examples/torch_accelerate.py          # or torchrun --nproc-per-node 2

Needs accelerate. The file must not be called accelerate.py: Python would import it in place of the package.
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import syncbn


def main(epochs=5):
    """Trains a small network, and prints how far the processes' statistics are apart."""
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True).sin()), batch_size=4, shuffle=True)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))
    syncbn.convert(model)  # the one line: before prepare, which wraps the model in DDP
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1), loader)
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
    means = accelerator.gather(accelerator.unwrap_model(model)[1].running_mean[None])
    accelerator.print(f"{accelerator.num_processes} processes, running means {float((means - means[0]).abs().max()):.1g} apart")
    accelerator.end_training()


if __name__ == "__main__":
    main()
