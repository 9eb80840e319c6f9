"""The shortcut that local batch norm leaves open in contrastive learning, measured on handwritten digits.

A contrastive loss asks which image, of those on all devices, shows the same thing as a given one. Both views of an image are on
one device, so it is enough to find the device. Here the partners are *unrelated* images on the same device. Nothing on an image
says where it was: what a network finds above chance, it finds by the device's own statistics. Synchronised statistics are the
same on all devices, and there is nothing to find.

Eight devices are mapped in one process by `jax.vmap`. The two runs differ in `axis_name` alone.

    python examples/contrastive.py

Needs optax and scikit-learn.
"""

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

from syncbn.functional import sync_batch_norm

DEVICES, IMAGES, WIDTH, TEMPERATURE = 8, 4, 128, 0.2


def normalized(z):
    """[N, WIDTH], each row of length 1."""
    return z / jnp.linalg.norm(z, axis=-1, keepdims=True)


def find_device(weights, x, axis_name):
    """On one device, x: [2 · IMAGES, 64]. (loss, share of images whose nearest among all devices' partners is on this device)."""
    *hidden, projection, predictor = weights
    for weight in hidden:
        y, *_ = sync_batch_norm(x @ weight, jnp.ones(WIDTH), jnp.zeros(WIDTH), axis_name=axis_name)
        x = jax.nn.relu(y)
    z = x @ projection
    # The images go through a predictor, as in BYOL and SimSiam; their partners do not.
    images, partners = normalized(z[:IMAGES] @ predictor), jax.lax.all_gather(normalized(z[IMAGES:]), "device")
    similarity = jnp.einsum("nc,dmc->ndm", images, partners) / TEMPERATURE
    here = jax.lax.axis_index("device")
    loss = jax.nn.logsumexp(similarity, (1, 2)) - jax.nn.logsumexp(similarity[:, here], 1)
    return loss.mean(), (similarity.max(2).argmax(1) == here).mean()


def train(axis_name, steps=1000, seed=0):
    """The share of images whose device is found, over the last tenth of the steps. Chance is 1 / DEVICES."""
    pixels = jnp.asarray(load_digits().data / 16, jnp.float32)
    draws, *keys = jax.random.split(jax.random.key(seed), 5)
    optimizer = optax.adam(1e-3)

    def step(carried, key):
        weights, slots = carried
        x = pixels[jax.random.choice(key, len(pixels), (DEVICES, 2 * IMAGES), replace=False)]

        def loss_of(weights):
            loss, found = jax.vmap(lambda x: find_device(weights, x, axis_name), axis_name="device")(x)
            return loss.mean(), found.mean()

        gradients, found = jax.grad(loss_of, has_aux=True)(weights)
        updates, slots = optimizer.update(gradients, slots)
        return (optax.apply_updates(weights, updates), slots), found

    weights = [0.1 * jax.random.normal(key, (size, WIDTH)) for key, size in zip(keys, (64, WIDTH, WIDTH, WIDTH), strict=True)]
    _, found = jax.lax.scan(step, (weights, optimizer.init(weights)), jax.random.split(draws, steps))
    return float(found[-steps // 10 :].mean())


if __name__ == "__main__":
    print(f"The device is found by chance: {1 / DEVICES:.1%}")
    print(f"with local statistics:         {train(None):.1%}")
    print(f"with synchronised statistics:  {train('device'):.1%}")
