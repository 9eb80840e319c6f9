"""The shortcut that local batch norm leaves open in contrastive learning (SimCLR, MoCo), measured on handwritten digits.

Both views of an image are on one device. With local statistics every device leaves its own mark on its embeddings, so that the
network finds the partner by the device, and not by what is on the image. Eight devices with four images each are mapped in one
process by `jax.vmap`; `axis_name` is the only difference between the two runs.

    python examples/contrastive.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from syncbn.functional import sync_batch_norm

DEVICES, IMAGES, WIDTH, TEMPERATURE = 8, 4, 128, 0.2


def network(parameters, x, axis_name):
    """[N, 64] pixels to (representation [N, WIDTH], embedding [N, WIDTH] of length 1)."""
    *hidden, last = parameters
    for weight in hidden:
        x = jax.nn.relu(sync_batch_norm(x @ weight, jnp.ones(WIDTH), jnp.zeros(WIDTH), axis_name=axis_name)[0])
    z = x @ last
    return x, z / jnp.linalg.norm(z, axis=-1, keepdims=True)


def views(key, x):
    """Two views of each image: moved by up to one pixel, then three of ten pixels dropped. [N, 64] to [2·N, 64]."""

    def view(key, image):
        move, drop = jax.random.split(key)
        moved = jnp.roll(image.reshape(8, 8), jax.random.randint(move, (2,), -1, 2), (0, 1)).reshape(64)
        return moved * jax.random.bernoulli(drop, 0.7, (64,))

    return jax.vmap(view)(jax.random.split(key, 2 * len(x)), jnp.concatenate([x, x]))


def pretext(parameters, key, x, axis_name):
    """On one device: (loss, share of images whose partner is the nearest of all devices' images, share with a wrong nearest that is here)."""
    z = network(parameters, views(key, x), axis_name)[1]
    mine, partners = z[:IMAGES], jax.lax.all_gather(z[IMAGES:], "device").reshape(-1, WIDTH)
    similarity = mine @ partners.T / TEMPERATURE
    here = jax.lax.axis_index("device") * IMAGES + jnp.arange(IMAGES)
    loss = optax.softmax_cross_entropy_with_integer_labels(similarity, here).mean()
    wrong = jnp.argmax(similarity.at[jnp.arange(IMAGES), here].set(-jnp.inf), 1)
    return loss, ((similarity.argmax(1) == here).mean(), (wrong // IMAGES == jax.lax.axis_index("device")).mean())


def train(axis_name, images, steps, seed=0):
    """The trained parameters, and the two shares of the last 100 steps."""
    keys = jax.random.split(jax.random.key(seed), 4)
    sizes = [(64, WIDTH), (WIDTH, WIDTH), (WIDTH, WIDTH)]
    parameters = [jax.random.normal(k, size) * (2 / size[0]) ** 0.5 for k, size in zip(keys, sizes, strict=False)]
    optimizer = optax.adam(1e-3)

    def step(carried, key):
        parameters, slots = carried
        draw, change = jax.random.split(key)
        rows = jax.random.choice(draw, len(images), (DEVICES, IMAGES), replace=False)

        def loss_of(parameters):
            on_device = jax.vmap(lambda key, x: pretext(parameters, key, x, axis_name), axis_name="device")
            loss, shares = on_device(jax.random.split(change, DEVICES), images[rows])
            return loss.mean(), jax.tree.map(jnp.mean, shares)

        gradients, shares = jax.grad(loss_of, has_aux=True)(parameters)
        updates, slots = optimizer.update(gradients, slots)
        return (optax.apply_updates(parameters, updates), slots), shares

    carried, shares = jax.jit(lambda c, k: jax.lax.scan(step, c, k))((parameters, optimizer.init(parameters)), jax.random.split(keys[3], steps))
    return carried[0], [float(share[-100:].mean()) for share in shares]


def compare(steps=2000, seed=0):
    """{"local" or "synchronised": (partner found, wrong nearest on the same device, accuracy of 5 nearest neighbours)}."""
    pixels, labels = load_digits(return_X_y=True)
    images, found = jnp.asarray(pixels / 16, jnp.float32), {}
    for name, axis_name in (("local", None), ("synchronised", "device")):
        parameters, shares = train(axis_name, images[:1400], steps, seed)
        features = np.asarray(network(parameters, images, None)[0])
        neighbours = KNeighborsClassifier(5).fit(features[:1400], labels[:1400])
        found[name] = *shares, float(neighbours.score(features[1400:], labels[1400:]))
    return found


if __name__ == "__main__":
    for name, (partner, same, accuracy) in compare().items():
        print(f"{name:12} partner found {partner:.0%}, nearest stranger on the same device {same:.0%}, digits told apart {accuracy:.1%}")
