"""Detection with torchvision under DDP: RetinaNet with every batch norm synchronised, and a rank whose image has no boxes.

    torchrun --nproc-per-node 2 examples/torch_detection.py

Needs torchvision. The images are drawn: bright squares on noise. It runs on GPUs with NCCL, or on the CPU with gloo.
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

import syncbn


def draw(boxes, device):
    """An image with a square in each box, and what torchvision's detectors train on."""
    image = 0.3 * torch.rand(3, 64, 64)
    for left, top, right, bottom in boxes:
        image[:, top:bottom, left:right] += 0.7
    target = {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4).to(device),
        "labels": torch.ones(len(boxes), dtype=torch.int64, device=device),
    }
    return image.to(device), target


def main(steps=4):
    """Trains, and prints the losses and how far the ranks' statistics are apart."""
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, device = dist.get_rank(), torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    torch.manual_seed(0)
    # torchvision freezes batch norm by default, because a detector has so few images: norm_layer and trainable_layers undo it.
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5)
    model = syncbn.convert(RetinaNet(backbone, num_classes=2, min_size=64, max_size=64))
    model = DistributedDataParallel(model.to(device))
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    for step in range(steps):
        # Rank 0 never has a box. It takes part in every exchange all the same.
        boxes = [(8 * i, 8, 8 * i + 16, 24) for i in range(rank)]
        image, target = draw(boxes, device)
        losses = model([image], [target])
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}, rank {rank}, {len(boxes)} boxes: loss {loss.item():.3f}", flush=True)

    mean = model.module.backbone.body.bn1.running_mean
    both = [torch.empty_like(mean) for _ in range(dist.get_world_size())]
    dist.all_gather(both, mean)
    if rank == 0:
        print(f"running means are {float((both[0] - both[-1]).abs().max()):.1g} apart")
        detected = model.module.eval()([draw([(8, 8, 24, 24)], device)[0]])[0]
        print(f"{len(detected['boxes'])} boxes found by rank 0 alone, in eval mode")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
