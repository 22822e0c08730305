"""Train a small net with deformable layers on handwritten digits in Equinox, save it and load it again.

Run: python examples/equinox_digits.py
"""

import tempfile
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from deformconv.equinox import DeformConv2d
from deformconv.jax import offset_labels
from deformconv.studies.digits import load, split


class Net(eqx.Module):
    stem: eqx.nn.Conv2d
    first: DeformConv2d
    second: DeformConv2d
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.stem = eqx.nn.Conv2d(1, 16, 3, stride=2, padding=1, key=keys[0])
        self.first = DeformConv2d(16, 32, 3, stride=2, padding=1, max_offset=3, key=keys[1])
        self.second = DeformConv2d(32, 32, 3, padding=1, max_offset=3, key=keys[2])
        self.head = eqx.nn.Linear(32, 10, key=keys[3])

    def __call__(self, image):
        """The ten logits of one image (1, 28, 28)."""
        features = jax.nn.relu(self.stem(image))
        features = jax.nn.relu(self.second(jax.nn.relu(self.first(features))))
        return self.head(features.mean((1, 2)))


def loss_of(net, images, labels):
    return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(net)(images), labels).mean()


training, held_out = split(load())
net = Net(jax.random.key(0))
# The predictors of offsets take steps of a third of the others'.
scales = {"offset": optax.scale(0.3), "rest": optax.identity()}
optimizer = optax.chain(optax.adam(0.01), optax.multi_transform(scales, offset_labels))
memory = optimizer.init(eqx.filter(net, eqx.is_inexact_array))


@eqx.filter_jit
def step(net, memory, images, labels):
    loss, slopes = eqx.filter_value_and_grad(loss_of)(net, images, labels)
    updates, memory = optimizer.update(slopes, memory)
    return eqx.apply_updates(net, updates), memory, loss


random = np.random.default_rng(0)
for epoch in range(3):
    losses = []
    for chosen in random.permutation(len(training.labels)).reshape(-1, 50):
        batch = training.take(chosen)
        net, memory, loss = step(net, memory, batch.images[:, None], batch.labels)
        losses.append(loss)
    print(f"epoch {epoch + 1}: loss {jnp.stack(losses).mean():.3f}")
logits = eqx.filter_jit(lambda net, images: jax.vmap(net)(images))(net, held_out.images[:, None])
accuracy = (logits.argmax(1) == held_out.labels).mean()
print(f"accuracy on {len(held_out.labels)} digits held out: {accuracy:.3f}")

offset, mask = net.first.offsets_and_mask(jax.nn.relu(net.stem(held_out.images[:1])))
print(f"offsets learned: up to {jnp.abs(offset).max():.2f} pixels; masks {mask.min():.2f} to {mask.max():.2f}")

with tempfile.TemporaryDirectory() as folder:
    eqx.tree_serialise_leaves(Path(folder, "digits.eqx"), net)
    again = eqx.tree_deserialise_leaves(Path(folder, "digits.eqx"), Net(jax.random.key(1)))
same = jnp.array_equal(again(held_out.images[:1]), net(held_out.images[:1]))
print("the same from its file:", bool(same))
