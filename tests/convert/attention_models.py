"""The models of transformers with multi-scale deformable attention, from configurations, small and with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

__all__ = ["MAKERS", "gradients", "inputs_of", "make", "outputs_of"]

SIZE = (64, 96)
DETR = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 16, "num_queries": 5}
ENCODER = {"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
RT_DETR = {
    **DETR, **ENCODER, "encoder_hidden_dim": 32, "encoder_in_channels": [8, 12, 16], "decoder_in_channels": [32, 32, 32],
    "num_denoising": 0, "num_labels": 3, "hidden_expansion": 0.5,
}  # fmt: skip
DINO = {**DETR, **ENCODER, "encoder_layers": 2, "max_text_len": 8, "text_config": None}


def resnet(stages: int = 3) -> Any:
    """A backbone of 8, 12 and 16 channels, with 4 before them for four stages."""
    return transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8, 12, 16], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=[f"stage{stage}" for stage in range(5 - stages, 5)],
    )  # fmt: skip


def bert() -> Any:
    return transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )


def detr(name: str, **keywords: Any) -> nn.Module:
    """A detector by the beginning of its classes' names."""
    config = getattr(transformers, f"{name}Config")(**keywords)
    found: nn.Module = getattr(transformers, f"{name}ForObjectDetection")(config)
    return found


def grounded(name: str, **keywords: Any) -> nn.Module:
    return detr(name, **{**DINO, "text_config": bert(), "backbone_config": resnet(), "num_feature_levels": 4, **keywords})


def lw_detr() -> nn.Module:
    backbone = transformers.LwDetrViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=64, pretrain_image_size=64,
        patch_size=8, num_windows=4, window_block_indices=[0], out_indices=[1, 2],
    )  # fmt: skip
    return detr(
        "LwDetr", backbone_config=backbone, projector_scale_factors=[2.0, 0.5], d_model=32, decoder_layers=2, num_queries=5,
        decoder_ffn_dim=16, decoder_self_attention_heads=2, decoder_cross_attention_heads=2, group_detr=2, c2f_num_blocks=1,
    )  # fmt: skip


def rf_detr() -> nn.Module:
    backbone = transformers.RfDetrDinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=64, patch_size=8, num_windows=2,
        out_indices=[1, 2],
    )  # fmt: skip
    return detr(
        "RfDetr", backbone_config=backbone, d_model=32, decoder_layers=2, decoder_ffn_dim=16, decoder_self_attention_heads=2,
        decoder_cross_attention_heads=2, num_queries=5, group_detr=2, c2f_num_blocks=1,
    )  # fmt: skip


def omdet_turbo() -> nn.Module:
    text = transformers.CLIPTextConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, projection_dim=16,
        max_position_embeddings=8, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return detr(
        "OmDetTurbo", backbone_config=resnet(), text_config=text, image_size=64, apply_layernorm_after_vision_backbone=False,
        text_projection_in_dim=16, text_projection_out_dim=16, task_encoder_hidden_dim=16, class_embed_dim=16, num_queries=5,
        encoder_hidden_dim=32, vision_features_channels=[32, 32, 32], encoder_in_channels=[8, 12, 16],
        encoder_attention_heads=2, encoder_dim_feedforward=16, decoder_hidden_dim=32, decoder_num_heads=2, decoder_num_layers=2,
        decoder_dim_feedforward=16,
    )  # fmt: skip


def doclayout(version: int, **keywords: Any) -> nn.Module:
    backbone = resnet(4 if version == 3 else 3)
    return detr(f"PPDocLayoutV{version}", **{**RT_DETR, "backbone_config": backbone, "global_pointer_head_size": 8, **keywords})


def doclayout_v2() -> nn.Module:
    order = {
        "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 1, "rel_pos_bins": 4,
        "max_rel_pos": 8, "rel_2d_pos_bins": 4, "max_rel_2d_pos": 8, "max_position_embeddings": 16, "coordinate_size": 3,
        "shape_size": 2, "num_classes": 3, "relation_bias_embed_dim": 4, "global_pointer_head_size": 8,
    }  # fmt: skip
    found = doclayout(2, reading_order_config=order, class_thresholds=[0.0] * 3, class_order=[0, 1, 2])
    return found


def segmenter(name: str, **keywords: Any) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(
        backbone_config=resnet(4), hidden_dim=32, encoder_feedforward_dim=16, dim_feedforward=16, encoder_layers=2,
        decoder_layers=2, num_attention_heads=2, num_queries=5, **keywords,
    )  # fmt: skip
    found: nn.Module = getattr(transformers, f"{name}ForUniversalSegmentation")(config)
    return found


def one_former() -> nn.Module:
    return segmenter(
        "OneFormer", conv_dim=32, mask_dim=32, text_encoder_width=16, text_encoder_num_layers=1, task_seq_len=8,
        query_dec_layers=1,
    )  # fmt: skip


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "deformable_detr": lambda: detr("DeformableDetr", **DETR, **ENCODER, backbone_config=resnet(), num_feature_levels=4),
    "lw_detr": lw_detr,
    "rf_detr": rf_detr,
    "rt_detr": lambda: detr("RTDetr", **RT_DETR, backbone_config=resnet()),
    "rt_detr_v2": lambda: detr("RTDetrV2", **RT_DETR, backbone_config=resnet()),
    "d_fine": lambda: detr("DFine", **RT_DETR, backbone_config=resnet(), decoder_n_points=[3, 6, 3]),
    "deimv2": lambda: detr("Deimv2", **RT_DETR, backbone_config=resnet()),
    "pp_doclayout_v2": doclayout_v2,
    "pp_doclayout_v3": lambda: doclayout(3, mask_feature_channels=[8, 8], x4_feat_dim=4, num_prototypes=8),
    "pp_doclayout_v4": lambda: doclayout(4),
    "grounding_dino": lambda: grounded("GroundingDino"),
    "mm_grounding_dino": lambda: grounded("MMGroundingDino"),
    "omdet_turbo": omdet_turbo,
    "mask2former": lambda: segmenter("Mask2Former", feature_size=32, mask_feature_size=32),
    "oneformer": one_former,
}


def make(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """A model whose weights hand on what a layer reads at about its size, so that every result depends on the attention.

    In a new model of some kinds the attention's part of a sum is too small for that, and offsets are the same for all
    queries. Normalisations have the statistics of a batch.
    """
    torch.manual_seed(seed)
    model = MAKERS[name]()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.ones_(norm.weight)
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(**inputs_of(name, torch.float32))
    for norm in norms:
        norm.momentum = 0.1
    return model.to(dtype).eval()


def inputs_of(name: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Two pictures, and what a model asks for beside them."""
    generator = torch.Generator().manual_seed(1)
    size = (64, 64) if name in ("lw_detr", "rf_detr", "omdet_turbo") else SIZE
    pictures = torch.randn(2, 3, *size, generator=generator, dtype=torch.float64).to(dtype)
    words = torch.tensor([[2, 7, 8, 9, 3]] * 2)
    others: dict[str, Tensor] = {}
    if name.endswith("grounding_dino"):
        others = {"input_ids": words, "token_type_ids": torch.zeros_like(words), "attention_mask": torch.ones_like(words)}
    elif name == "omdet_turbo":
        words = torch.tensor([[1, 7, 8, 2]] * 4)
        others = {
            "classes_input_ids": words, "classes_attention_mask": torch.ones_like(words),
            "tasks_input_ids": words[:2], "tasks_attention_mask": torch.ones_like(words[:2]),
            "classes_structure": torch.tensor([2, 2]),
        }  # fmt: skip
    elif name == "oneformer":
        others = {"task_inputs": torch.randint(0, 40, (2, 8), generator=generator)}
    return {"pixel_values": pictures, **others}


def outputs_of(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The numbers that a call gives, by name."""
    for words in (
        "language_cache_class",
        "language_cache_prompt",
    ):  # OmDet-Turbo keeps what it computed of words, for later calls
        if hasattr(model, words):
            getattr(model, words).cache.clear()
    torch.manual_seed(0)  # dropout
    found = model(**inputs).items()
    return {key: value for key, value in found if isinstance(value, Tensor) and value.is_floating_point()}


def gradients(model: nn.Module, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradient of a random sum of all outputs for each parameter, by name; not of what is masked out by a huge number."""
    generator = torch.Generator().manual_seed(2)
    terms = []
    for output in outputs.values():
        weights = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
        terms.append((output.masked_fill(output.detach().abs() > 1e3, 0) * weights).sum())
    model.zero_grad()
    torch.stack(terms).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
