"""Several devices, each in a process that XLA is told to have two."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
from functools import partial
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_disable_most_optimizations", True)
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from tests.jax.arrays import SMALL, assert_same, call_of
call = call_of(SMALL.but(batch=4))
assert len(jax.devices()) == 2
mesh = Mesh(np.array(jax.devices()), ("images",))
specs = [P("images") if name in ("input", "offset", "mask") else P() for name in call.names]

def loss(*arrays):
    return (call.ours(*arrays) ** 2).sum()

ALL = (0, 1, 2, 3, 4)
expected = call.ours(*call.arrays), jax.jit(jax.grad(loss, ALL))(*call.arrays)

# shard_map: the weight's and the bias' gradients are summed over the devices.
for check_vma in (True, False):
    shard_map = partial(jax.shard_map, mesh=mesh, in_specs=tuple(specs), check_vma=check_vma)
    mapped = shard_map(call.ours, out_specs=P("images"))
    sharded = jax.jit(mapped)(*call.arrays)
    np.testing.assert_array_equal(sharded, expected[0])
    assert_same(jax.jit(jax.grad(lambda *a: (mapped(*a) ** 2).sum(), ALL))(*call.arrays), expected[1])

    def gradients(*arrays):
        found = jax.grad(loss, ALL)(*arrays)
        if check_vma:  # JAX knows what is the same on all devices, and has summed it
            return found
        return tuple(g if spec == P("images") else jax.lax.psum(g, "images") for g, spec in zip(found, specs))

    inside = shard_map(gradients, out_specs=tuple(specs))
    assert_same(jax.jit(inside)(*call.arrays), expected[1])
    print("shard_map", check_vma)

# pmap: each device a half of the images.
axes = tuple(0 if spec == P("images") else None for spec in specs)
halves = [a.reshape(2, 2, *a.shape[1:]) if axis == 0 else a for a, axis in zip(call.arrays, axes)]
output = jax.pmap(call.ours, in_axes=axes)(*halves)
np.testing.assert_array_equal(output.reshape(expected[0].shape), expected[0])
pmapped = jax.pmap(lambda *a: jax.lax.psum(jax.grad(loss, ALL)(*a)[2], "i"), axis_name="i", in_axes=axes)
assert_same(pmapped(*halves)[0], expected[1][2])
print("pmap")

# jit over sharded arrays is right, too; XLA gathers them.
placed = [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(call.arrays, specs)]
np.testing.assert_array_equal(jax.jit(call.ours)(*placed), expected[0])
np.testing.assert_array_equal(call.ours(*placed), expected[0])
assert_same(jax.jit(jax.grad(loss, ALL))(*placed), expected[1])
second = [jax.device_put(a, jax.devices()[1]) for a in call.arrays]
for function in (call.ours, jax.jit(call.ours)):
    output = function(*second)
    assert output.devices() == {jax.devices()[1]}
    np.testing.assert_array_equal(output, expected[0])
print("jit")

# Where arrays' types say how they are spread, so does the output's.
if hasattr(jax.sharding, "auto_axes"):
    explicit = Mesh(np.array(jax.devices()), ("images",), axis_types=(jax.sharding.AxisType.Explicit,))
    typed = [jax.device_put(a, NamedSharding(explicit, spec)) for a, spec in zip(call.arrays, specs)]
    for function in (call.ours, jax.jit(call.ours)):
        output = function(*typed)
        assert jax.typeof(output).sharding.spec[0] == "images"
        np.testing.assert_array_equal(output, expected[0])
    assert_same(jax.jit(jax.grad(loss, ALL))(*typed), expected[1])
print("explicit")
"""


def test_two_devices():
    root = Path(__file__).parents[2]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    paths = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False, timeout=500
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == ["shard_map True", "shard_map False", "pmap", "jit", "explicit", ""]
