"""Train a small net with deformable layers on handwritten digits in Flax, save its state and load it again.

Run: python examples/flax_digits.py
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from deformconv.flax import DeformConv
from deformconv.jax import offset_labels
from deformconv.studies.digits import load, split


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.stem = nnx.Conv(1, 16, (3, 3), strides=2, rngs=rngs)
        self.first = DeformConv(16, 32, (3, 3), strides=2, max_offset=3, rngs=rngs)
        self.second = DeformConv(32, 32, (3, 3), max_offset=3, rngs=rngs)
        self.head = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, images):
        """The ten logits of every image, (N, 28, 28, 1)."""
        features = nnx.relu(self.stem(images))
        features = nnx.relu(self.second(nnx.relu(self.first(features))))
        return self.head(features.mean((1, 2)))


@nnx.jit
def step(net, optimizer, images, labels):
    def loss_of(net):
        return optax.softmax_cross_entropy_with_integer_labels(net(images), labels).mean()

    loss, slopes = nnx.value_and_grad(loss_of)(net)
    optimizer.update(net, slopes)
    return loss


training, held_out = split(load())
net = Net(nnx.Rngs(0))
# The predictors of offsets take steps of a third of the others'.
scales = {"offset": optax.scale(0.3), "rest": optax.identity()}
rule = optax.chain(optax.adam(0.01), optax.multi_transform(scales, offset_labels))
optimizer = nnx.Optimizer(net, rule, wrt=nnx.Param)

random = np.random.default_rng(0)
for epoch in range(3):
    losses = []
    for chosen in random.permutation(len(training.labels)).reshape(-1, 50):
        batch = training.take(chosen)
        losses.append(step(net, optimizer, batch.images[..., None], batch.labels))
    print(f"epoch {epoch + 1}: loss {jnp.stack(losses).mean():.3f}")
logits = nnx.jit(lambda net, images: net(images))(net, held_out.images[..., None])
accuracy = (logits.argmax(1) == held_out.labels).mean()
print(f"accuracy on {len(held_out.labels)} digits held out: {accuracy:.3f}")

offset, mask = net.first.offsets_and_mask(nnx.relu(net.stem(held_out.images[:1, ..., None])))
print(f"offsets learned: up to {jnp.abs(offset).max():.2f} pixels; masks {mask.min():.2f} to {mask.max():.2f}")

graph, state = nnx.split(net)
leaves, tree = jax.tree.flatten(state)
with tempfile.TemporaryDirectory() as folder:
    np.savez(Path(folder, "digits.npz"), *leaves)
    with np.load(Path(folder, "digits.npz")) as file:
        again = nnx.merge(graph, jax.tree.unflatten(tree, [jnp.asarray(file[name]) for name in file.files]))
image = held_out.images[:1, ..., None]
print("the same from its file:", bool(jnp.array_equal(again(image), net(image))))
