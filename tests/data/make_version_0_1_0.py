"""Writes `tests/data/version_0_1_0/` with version 0.1.0, before its modules moved. Run once for each framework:

    git worktree add ../before c512ca4
    PYTHONPATH=../before/src:tests python tests/data/make_version_0_1_0.py torch
    PYTHONPATH=../before/src:tests python tests/data/make_version_0_1_0.py keras

Tests load these files with the present version and compare its outputs with the saved ones. Do not write them again with a later version.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "version_0_1_0"


def torch_files():
    import torch
    from architectures import timm
    from torch import nn

    import syncbn

    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, 5) * 2 + 1
    models = {
        "layers": nn.Sequential(
            syncbn.SyncBatchNorm(3, momentum=0.2),
            syncbn.SyncBatchNorm(3, activation="leaky_relu"),
            syncbn.SyncBatchNorm(3, renorm=True, renorm_clipping={"rmin": 0.5, "rmax": 2.0, "dmax": 1.0}, group_size=1),
            syncbn.SyncBatchNorm(3, affine=False),
        ),
        "converted": syncbn.convert(
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))
        ),
        "converted_timm": syncbn.convert(nn.Sequential(nn.Conv2d(3, 4, 3), timm.layers.BatchNormAct2d(4, act_layer=nn.SiLU))),
    }
    arrays = {"x": x.numpy()}
    for name, model in models.items():
        for parameter in model.parameters():
            nn.init.normal_(parameter, 0.5, 0.3)
        model(x).square().mean().backward()
        model.zero_grad(set_to_none=True)
        arrays[name] = model.eval()(x).detach().numpy()
        torch.save(model, FOLDER / f"torch_{name}.pt")
        # What a training step that follows gives. The file holds the model as it was before it.
        arrays[f"{name}_training"] = model.train()(x).detach().numpy()
        arrays[f"{name}_running_mean"] = next(v for key, v in model.state_dict().items() if key.endswith("running_mean")).numpy()
    torch.save(models["layers"].state_dict(), FOLDER / "torch_layers_state_dict.pt")
    arrays["layers_state_dict"] = models["layers"].eval()(x).detach().numpy()
    np.savez_compressed(FOLDER / "torch.npz", **arrays)


def keras_files():
    import keras
    from keras import layers

    import syncbn

    keras.utils.set_random_seed(0)
    random = np.random.default_rng(0)
    x = (random.normal(size=(4, 5, 5, 3)) * 2 + 1).astype("float32")
    sync = keras.Sequential(
        [
            keras.Input((5, 5, 3)),
            syncbn.SyncBatchNormalization(axis=[1, 3], name="several_axes"),
            syncbn.SyncBatchNormalization(
                renorm=True, renorm_clipping={"rmin": 0.5, "rmax": 2.0, "dmax": 1.0}, activation="relu", name="renorm"
            ),
            syncbn.SyncBatchNormalization(axis=[-1], activation="tanh", scale=False, name="axis_list"),
        ]
    )
    converted = syncbn.convert(
        keras.Sequential(
            [keras.Input((5, 5, 3)), layers.Conv2D(4, 3), layers.BatchNormalization(), layers.ReLU(), layers.Conv2D(2, 1)]
        )
    )
    arrays = {"x": x}
    for name, model in {"layers": sync, "converted": converted}.items():
        for variable in model.trainable_variables:
            variable.assign(random.normal(0.5, 0.3, variable.shape))
        model(x, training=True)
        arrays[name] = np.asarray(model(x, training=False))
        model.save(FOLDER / f"keras_{name}.keras")
        arrays[f"{name}_training"] = np.asarray(model(x, training=True))
        arrays[f"{name}_after_training"] = np.asarray(model(x, training=False))
    # The weights after the training step.
    converted.save_weights(FOLDER / "keras_converted.weights.h5")
    np.savez_compressed(FOLDER / "keras.npz", **arrays)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    {"torch": torch_files, "keras": keras_files}[sys.argv[1]]()
