"""PyTorch DDP: convert the model, train it on handwritten digits with 2 images per rank, evaluate it on rank 0.

    torchrun --nproc-per-node 2 examples/torch_ddp.py

Needs scikit-learn, for the images. It runs on GPUs with NCCL, or on the CPU with gloo.
"""

import os

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import syncbn


def main(epochs=2):
    """Trains, and prints the accuracy on images that were not trained on."""
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    torch.manual_seed(0)

    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    data = TensorDataset(images, torch.tensor(labels))
    training = torch.utils.data.Subset(data, range(1400))
    # The sampler pads the last batch, so that all ranks have as many steps.
    sampler = DistributedSampler(training)
    loader = DataLoader(training, batch_size=2, sampler=sampler)

    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    syncbn.convert(model)  # the one line: before DDP
    model = DistributedDataParallel(model.to(device))
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x.to(device)), y.to(device)).backward()
            optimizer.step()

    if dist.get_rank() == 0:
        # In eval mode the layers exchange nothing: one rank may run alone, on the module that DDP wraps.
        model.eval()
        x, y = data[1400:]
        with torch.no_grad():
            right = (model.module(x.to(device)).argmax(1).cpu() == y).float().mean()
        print(f"test accuracy {right:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
