"""Deformable convolution for Keras 3: layers that stand where Keras' own convolutions stood, on every backend of Keras."""

try:
    import keras as _keras  # noqa: F401
except ModuleNotFoundError as error:
    if error.name == "keras":
        from deformconv.installation import command as _command

        raise ModuleNotFoundError(
            f"deformconv.keras needs Keras, which is not installed: {_command('keras', 'keras')}", name="keras"
        ) from None
    if error.name in ("tensorflow", "jax", "torch", "openvino"):
        raise ModuleNotFoundError(
            f"Keras computes by {error.name} here, which is not installed: install it, or set the environment variable "
            "KERAS_BACKEND to one that is, before Keras is imported: tensorflow, jax, torch, openvino or numpy.",
            name=error.name,
        ) from None
    raise

from deformconv.keras.layers import DeformConv1D, DeformConv2D, DeformConv3D

__all__ = ["DeformConv1D", "DeformConv2D", "DeformConv3D"]
