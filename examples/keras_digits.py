"""Train a small net with deformable layers on handwritten digits, save it and load it again, with Keras on any backend.

Run: KERAS_BACKEND=jax python examples/keras_digits.py    (or tensorflow, or torch)
"""

import tempfile
from pathlib import Path

import keras
import numpy as np
from keras import layers

from deformconv.keras import DeformConv2D
from deformconv.studies.digits import load, split

keras.utils.set_random_seed(0)
training, held_out = split(load())
model = keras.Sequential([
    keras.Input((28, 28, 1)),
    layers.Conv2D(16, 3, strides=2, padding="same", activation="relu"),
    DeformConv2D(32, 3, strides=2, padding="same", activation="relu", max_offset=3, name="first"),
    DeformConv2D(32, 3, padding="same", activation="relu", max_offset=3, name="second"),
    layers.GlobalAveragePooling2D(),
    layers.Dense(10),
])  # fmt: skip
model.compile(
    keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"]
)  # fmt: skip
print(f"Keras {keras.__version__} on {keras.backend.backend()}")
for epoch in range(3):
    history = model.fit(training.images[..., None], training.labels, batch_size=64, verbose=0).history
    print(f"epoch {epoch + 1}: loss {history['loss'][0]:.3f}, accuracy {history['accuracy'][0]:.3f}")
_, accuracy = model.evaluate(held_out.images[..., None], held_out.labels, verbose=0)
print(f"accuracy on {len(held_out.labels)} digits held out: {accuracy:.3f}")

images = held_out.images[:8, ..., None]
offset, mask = model.get_layer("first").offsets_and_mask(model.layers[0](images))
offset, mask = keras.ops.convert_to_numpy(offset), keras.ops.convert_to_numpy(mask)
print(f"offsets learned: up to {np.abs(offset).max():.2f} pixels; masks {mask.min():.2f} to {mask.max():.2f}")

with tempfile.TemporaryDirectory() as folder:
    model.save(Path(folder, "digits.keras"))
    again = keras.models.load_model(Path(folder, "digits.keras"))
same = np.allclose(again.predict(images, verbose=0), model.predict(images, verbose=0), atol=1e-5)
print("the same from its file:", same)
