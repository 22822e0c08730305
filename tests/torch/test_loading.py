"""What a state_dict says of its masks, and what layers say of other libraries' weights: keys, records, errors, the warning."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.torch.nets import LAYERS
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from deformconv.torch import DeformConv1d, DeformConv2d, DeformRoIPool
from deformconv.torch.loading import RECORD, noted

NOTHING_SAYS = r"Nothing in this state_dict says what the masks of "


class Block(nn.Module):
    """A block of a backbone, whose second convolution is deformable."""

    def __init__(self, rank: int = 2, **how: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 1)
        self.conv2 = LAYERS[rank](4, 4, 3, padding=1, **how)


class Pools(nn.Module):
    """A pool for each of two levels."""

    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.pools = nn.ModuleList(DeformRoIPool(2, 2, hidden=3, **how) for _ in range(2))


def net(rank: int = 2, blocks: int = 2, **how: Any) -> nn.Sequential:
    return nn.Sequential(*(Block(rank, **how) for _ in range(blocks)))


def trained(model: nn.Module) -> nn.Module:
    """The model with random numbers everywhere, predictors among them."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def metadata(state: Any) -> Any:
    return state._metadata


def scales(state: Any) -> dict[str, float]:
    return {name: entry[RECORD] for name, entry in metadata(state).items() if RECORD in entry}


def renamed(state: Any, pattern: str, replacement: str, *, keep_metadata: bool = False) -> Any:
    result: Any = OrderedDict((re.sub(pattern, replacement, name), tensor) for name, tensor in state.items())
    if keep_metadata:
        result._metadata = copy.deepcopy(state._metadata)
    return result


def by_hand(model: nn.Module) -> Any:
    """The weights of a model as other libraries' are when their keys have been renamed."""
    return OrderedDict((name, tensor.clone()) for name, tensor in model.state_dict().items())


def mmcv_mask(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """What ModulatedDeformConv2dPack computes."""
    parts = nn.functional.conv2d(x, layer.offset_conv.weight, layer.offset_conv.bias, padding=1).chunk(3, 1)
    return parts[2].sigmoid()


def error_of(model: nn.Module, state: Any, *, strict: bool) -> str:
    """The last line of the error, which is ours: PyTorch puts its own first."""
    with pytest.raises(RuntimeError) as raised:
        model.load_state_dict(state, strict=strict)
    lines = str(raised.value).splitlines()
    assert len(lines) == (4 if strict else 2)  # a head, and where it is strict, what is missing and what nobody expects
    return lines[-1].strip()


# The layouts: how a layer's keys look, by a pattern of ours, and what the error calls.
LAYOUTS = {
    "mmcv": (r"offset_conv\.", "conv_offset.", "0.conv2.conv_offset.weight", "mmcv"),
    "paddle": (
        r"conv2\.(offset_conv|weight)",
        lambda found: "conv2.conv_dcn.weight" if found[1] == "weight" else "conv2.conv_offset",
        "0.conv2.conv_dcn.weight",
        "paddle",
    ),
    "dcnv2": (r"offset_conv\.", "conv_offset_mask.", "0.conv2.conv_offset_mask.weight", "dcnv2"),
    "detectron2": (r"\.offset_conv\.", "_offset.", "0.conv2_offset.weight", "detectron2"),
    "gluon": (
        r"conv2\.(offset_conv\.)?",
        lambda found: "conv2.offset_" if found[1] else "conv2.deformable_conv_",
        "0.conv2.offset_weight",
        "mxnet",
    ),
    "symbol": (
        r"conv2\.(offset_conv\.)?",
        lambda found: "conv2_offset_" if found[1] else "conv2_",
        "0.conv2_offset_weight",
        "mxnet",
    ),
    "symbol without points": (
        r"(\d)\.conv2\.(offset_conv\.)?",
        lambda found: f"{found[1]}_conv2_offset_" if found[2] else f"{found[1]}_conv2_",
        "0_conv2_offset_weight",
        "mxnet",
    ),
    "torchvision": (r"conv2\.(weight|bias)", r"conv2.deform_conv.\1", "0.conv2.deform_conv.weight", "torchvision"),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_keys_of_another_library_name_the_call_once(layout: str, rank: int, strict: bool) -> None:
    pattern, replacement, key, source = LAYOUTS[layout]
    state = renamed(net(rank, blocks=3).state_dict(), pattern, replacement)  # type: ignore[arg-type]
    text = error_of(net(rank, blocks=3), state, strict=strict)
    assert text.startswith(f'"{key}" is of a deformable layer of ')
    assert f'convert_state_dict(state, source="{source}", model=model), of deformconv.convert' in text
    assert text.endswith("So it is with 2 more layers.")


@pytest.mark.parametrize(
    ("name", "libraries"),
    [
        ("mmcv", 'mmcv, mmdetection from version 2, or BasicSR (there source="basicsr")'),
        ("paddle", "PaddleDetection"),
        ("dcnv2", "CharlesShang's DCNv2 or CenterNet"),
        ("detectron2", 'detectron2, or of mmdetection 1 (there source="mmdet1")'),
        ("gluon", "MXNet's Gluon"),
        ("symbol", "MXNet"),
        ("torchvision", "torchvision, as `to_torchvision` makes it"),
    ],
)
def test_the_error_names_the_library_and_one_layer_has_no_others(name: str, libraries: str) -> None:
    pattern, replacement, *_ = LAYOUTS[name]
    text = error_of(net(blocks=1), renamed(net(blocks=1).state_dict(), pattern, replacement), strict=False)  # type: ignore[arg-type]
    assert f" is of a deformable layer of {libraries}; expected " in text
    assert text.endswith("accounts for the masks.")


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("how", [{"modulated": False}, {"mask_scale": 1.0}], ids=str)
def test_layers_whose_masks_are_no_matter_name_foreign_keys_as_well(how: dict[str, Any], blocks: int) -> None:
    state = renamed(net(blocks=blocks, **how).state_dict(), r"offset_conv\.", "conv_offset.")
    text = error_of(net(blocks=blocks, **how), state, strict=False)
    assert text.endswith("So it is with 1 more layer." if blocks == 2 else "accounts for the masks.")


@pytest.mark.parametrize(
    ("pattern", "replacement", "key"),
    [
        (r"^offset_conv\.", "conv_offset.", "conv_offset.weight"),
        (r"^(offset_conv\.)?", lambda found: "offset_" if found[1] else "deformable_conv_", "offset_weight"),
    ],
)
def test_a_layer_that_is_the_whole_model(pattern: str, replacement: Any, key: str) -> None:
    layer = DeformConv2d(4, 4, 3)
    assert error_of(layer, renamed(layer.state_dict(), pattern, replacement), strict=False).startswith(f'"{key}" is of ')


def test_what_to_torchvision_makes() -> None:
    pytest.importorskip("torchvision")
    from deformconv.convert import to_torchvision

    text = error_of(net(), to_torchvision(net()).state_dict(), strict=False)
    assert text.startswith('"0.conv2.deform_conv.weight" is of ') and 'source="torchvision"' in text


def test_foreign_keys_in_a_compiled_model_and_in_one_that_is_wrapped() -> None:
    state = renamed(net().state_dict(), r"offset_conv\.", "conv_offset.")
    for model, prefix in ((torch.compile(net()), "_orig_mod."), (nn.DataParallel(net()), "module.")):
        prefixed = {f"{prefix}{name}": tensor for name, tensor in state.items()}
        assert error_of(model, prefixed, strict=False).startswith(f'"{prefix}0.conv2.conv_offset.weight" is of ')  # type: ignore[arg-type]


def test_two_libraries_in_one_state_dict_have_a_sentence_each() -> None:
    state = renamed(net().state_dict(), r"0\.conv2\.offset_conv\.", "0.conv2.conv_offset.")
    state = renamed(state, r"1\.conv2\.offset_conv\.", "1.conv2_offset.")
    with pytest.raises(RuntimeError, match=r'source="mmcv".*the masks\.\n.*source="detectron2".*the masks\.$'):
        net().load_state_dict(state, strict=False)


def test_a_plain_convolution_loads_and_nothing_is_said() -> None:
    state = DeformConv2d(4, 4, 3, predict_offsets=False).state_dict()
    layer = trained(DeformConv2d(4, 4, 3))
    assert layer.load_state_dict(state, strict=False).missing_keys == ["offset_conv.weight", "offset_conv.bias"]
    assert torch.equal(layer.weight, state["weight"])  # type: ignore[arg-type]
    layer.load_state_dict(dict(state), strict=False)


def test_a_block_s_own_module_beside_a_layer_is_its_own() -> None:
    class Beside(Block):
        def __init__(self, **how: Any) -> None:
            super().__init__(**how)
            self.conv2_offset = nn.Conv2d(4, 27, 3)

    for how in ({}, {"predict_offsets": False}):
        Beside(**how).load_state_dict(Beside(**how).state_dict())
    with_predictor, without = Beside(), Beside(predict_offsets=False)
    with_predictor.load_state_dict(without.state_dict(), strict=False)  # the layer's own predictor stays at zero
    both = Beside().state_dict()
    assert Block().load_state_dict(both, strict=False).unexpected_keys == ["conv2_offset.weight", "conv2_offset.bias"]


def test_a_layer_without_a_predictor_has_none_to_miss() -> None:
    layer, state = Block(predict_offsets=False), renamed(Block().state_dict(), r"\.offset_conv\.", "_offset.")
    assert layer.load_state_dict(state, strict=False).unexpected_keys == ["conv2_offset.weight", "conv2_offset.bias"]


def test_a_hook_that_renames_the_keys_comes_first() -> None:
    class Renaming(DeformConv2d):
        def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
            for part in ("weight", "bias"):
                state_dict[f"{prefix}offset_conv.{part}"] = state_dict.pop(f"{prefix}conv_offset.{part}")
            super()._load_from_state_dict(state_dict, prefix, *others)

    theirs, ours = trained(DeformConv2d(4, 4, 3)), Renaming(4, 4, 3, mask_scale=1.0)
    ours.load_state_dict(renamed(theirs.state_dict(), r"offset_conv\.", "conv_offset."))
    assert torch.equal(ours.offset_conv.weight, theirs.offset_conv.weight)  # type: ignore[union-attr]


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_state_dict_notes_the_scale_and_has_no_new_keys(rank: int) -> None:
    layer = LAYERS[rank]
    model = nn.Sequential(
        layer(2, 3, 3),
        layer(2, 3, 3, mask_scale=1),
        layer(2, 3, 3, modulated=False),
        layer(2, 3, 3, predict_offsets=False),
        DeformRoIPool(2, 2, hidden=3),
        DeformRoIPool(2, 2, hidden=3, trunk="separate", mask_scale=1.0),
        DeformRoIPool(2, 2, hidden=3, modulated=False),
    )
    state = model.state_dict()
    assert scales(state) == {"0": 2.0, "1": 1.0, "4": 2.0, "5": 1.0}
    assert [name for name in state if name.startswith("0.")] == [
        "0.weight", "0.bias", "0.offset_conv.weight", "0.offset_conv.bias",
    ]  # fmt: skip
    assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())
    assert not model.load_state_dict(state).missing_keys


def test_a_dict_that_is_passed_is_filled_and_has_no_record() -> None:
    layer, given = DeformConv2d(2, 3, 3), {}  # type: ignore[var-annotated]
    assert layer.state_dict(destination=given) is given
    assert list(given) == list(layer.state_dict())
    bare: Any = OrderedDict()
    bare._metadata = OrderedDict()
    layer._save_to_state_dict(bare, "", False)  # as some programs ask one module
    assert list(bare) == ["weight", "bias"]
    assert not bare._metadata


def through_a_file(state: Any, folder: Path) -> Any:
    torch.save({"epoch": 3, "state": state}, folder / "net.pt")
    return torch.load(folder / "net.pt", weights_only=True)["state"]


@pytest.mark.parametrize(
    "sent",
    [
        through_a_file,
        lambda state, _: copy.deepcopy(state),
        lambda state, _: pickle.loads(pickle.dumps(state)),
        lambda state, _: copy.copy(state),
    ],
    ids=["torch.save", "deepcopy", "pickle", "copy"],
)
@pytest.mark.parametrize("assign", [False, True])
def test_the_record_survives(sent: Any, assign: bool, tmp_path: Path) -> None:
    model, other = trained(net()), net()
    state = sent(model.state_dict(), tmp_path)
    assert scales(state) == {"0.conv2": 2.0, "1.conv2": 2.0}
    other.load_state_dict(state, assign=assign)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_the_record_survives_a_prefix_that_is_stripped() -> None:
    state = nn.DataParallel(trained(net())).state_dict()
    assert scales(state) == {"module.0.conv2": 2.0, "module.1.conv2": 2.0}
    consume_prefix_in_state_dict_if_present(state, "module.")
    assert scales(state) == {"0.conv2": 2.0, "1.conv2": 2.0}
    net().load_state_dict(state)


def test_the_record_of_models_that_are_wrapped_copied_or_parametrized() -> None:
    compiled, copied = torch.compile(net()), copy.deepcopy(net())
    assert scales(compiled.state_dict()) == {"_orig_mod.0.conv2": 2.0, "_orig_mod.1.conv2": 2.0}  # type: ignore[attr-defined]
    compiled.load_state_dict(torch.compile(net()).state_dict())  # type: ignore[attr-defined]
    copied.load_state_dict(pickle.loads(pickle.dumps(net())).state_dict())
    computed = [torch.nn.utils.parametrizations.weight_norm(DeformConv2d(2, 3, 3)) for _ in range(2)]
    assert scales(computed[0].state_dict()) == {"": 2.0}
    computed[1].load_state_dict(computed[0].state_dict())
    with pytest.raises(RuntimeError, match=r"are 2\.0\*sigmoid in this state_dict, and 1\.0\*sigmoid in the model"):
        torch.nn.utils.parametrizations.weight_norm(DeformConv2d(2, 3, 3, mask_scale=1.0)).load_state_dict(
            computed[0].state_dict()
        )


@pytest.mark.parametrize("strict", [True, False])
def test_another_scale_is_an_error(strict: bool) -> None:
    state = net(mask_scale=1.0).state_dict()
    with pytest.raises(RuntimeError) as raised:
        net().load_state_dict(state, strict=strict)
    assert str(raised.value).splitlines()[1:] == [
        "\tThe masks of layer '0.conv2' are 1.0*sigmoid in this state_dict, and 2.0*sigmoid in the model: build the layer with "
        "mask_scale=1.0, or set its `mask_scale` before loading. So it is with 1 more layer."
    ]
    net(mask_scale=1.0).load_state_dict(state)
    other = net()
    for block in other:
        block.conv2.mask_scale = 1.0  # type: ignore[union-attr]
    other.load_state_dict(state)
    net(mask_scale=1.0, modulated=False).load_state_dict(net(modulated=False).state_dict())


@pytest.mark.parametrize("trunk", ["shared", "separate"])
def test_another_scale_of_a_pool_is_an_error(trunk: str) -> None:
    with pytest.raises(RuntimeError, match=r"The masks of layer 'pools\.0' are 1\.0\*sigmoid.*with 1 more layer\.$"):
        Pools(trunk=trunk).load_state_dict(Pools(trunk=trunk, mask_scale=1).state_dict())


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_no_record_is_a_warning_and_the_weights_are_loaded(rank: int) -> None:
    model, other = trained(net(rank)), net(rank)
    with pytest.warns(UserWarning, match=NOTHING_SAYS + r"layer '0\.conv2' are") as said:
        other.load_state_dict(by_hand(model))
    text = str(said[0].message)
    assert "its masks are sigmoid and here 2.0*sigmoid, 2 times as large" in text
    assert 'convert_state_dict(state, source="mmcv", model=model)' in text and "mask_scale=1.0" in text
    assert 'convert_state_dict(state, source="deformconv", model=model), which notes it' in text
    assert Path(said[0].filename) == Path(__file__)  # the line that loads
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_file_of_an_older_version_warns() -> None:
    """Such a file has metadata, with the version 1 of every module, and no record."""
    state = net().state_dict()
    for entry in metadata(state).values():
        entry.pop(RECORD, None)
    with pytest.warns(UserWarning, match=NOTHING_SAYS):
        net().load_state_dict(state)


@pytest.mark.parametrize("trunk", ["shared", "separate"])
def test_a_pool_s_weights_of_others_need_no_renaming_and_warn(trunk: str) -> None:
    """mmcv's pool calls its layers as `trunk="separate"` does, and CharlesShang's as "shared"."""
    with pytest.warns(UserWarning, match=NOTHING_SAYS + r"layer 'pools\.0' are"):
        Pools(trunk=trunk).load_state_dict(by_hand(Pools(trunk=trunk)))
    Pools(trunk=trunk, mask_scale=1).load_state_dict(by_hand(Pools(trunk=trunk)))
    Pools(trunk=trunk, modulated=False).load_state_dict(by_hand(Pools(trunk=trunk, modulated=False)))


@pytest.mark.parametrize("prefix", ["", "pools.0."])
@pytest.mark.parametrize(
    ("trunk", "other", "key"), [("shared", "separate", "mask_fc"), ("separate", "shared", "offset_mask_fc")]
)
def test_a_pool_with_the_other_trunk(trunk: str, other: str, key: str, prefix: str) -> None:
    pools = [model if prefix else model.pools[0] for model in (Pools(trunk=trunk), Pools(trunk=other))]
    text = error_of(pools[0], pools[1].state_dict(), strict=False)  # type: ignore[arg-type]
    assert text.startswith(
        f'"{prefix}{key}.0.weight" is of a predictor with trunk="{other}", and this layer has trunk="{trunk}"; '
    )
    assert f'build the layer with trunk="{other}".' in text
    v1 = DeformRoIPool(2, 2, hidden=3, trunk=trunk, modulated=False)
    v1.load_state_dict(DeformRoIPool(2, 2, hidden=3, trunk=other, modulated=False).state_dict())


def test_the_warning_is_said_once_in_a_process() -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for model in (net(), net(), net(1), DeformConv2d(2, 3, 3), Pools()):
            model.load_state_dict(by_hand(model))
    assert len(said) == 1


@pytest.mark.parametrize("how", [{"mask_scale": 1.0}, {"modulated": False}, {"predict_offsets": False}], ids=str)
def test_no_record_is_no_matter_where_masks_are_the_same(how: dict[str, Any]) -> None:
    net(**how).load_state_dict(by_hand(net(**how)))


def test_zeros_are_as_ambiguous_as_other_weights() -> None:
    with pytest.warns(UserWarning, match=NOTHING_SAYS):
        DeformConv1d(2, 3, 3).load_state_dict(by_hand(DeformConv1d(2, 3, 3)))


def of_mmcv(model: nn.Module) -> Any:
    """The state_dict of a model of mmcv's layers, which note their version, with the keys that they have."""
    state = renamed(model.state_dict(), r"offset_conv\.", "conv_offset.", keep_metadata=True)
    for entry in state._metadata.values():
        if entry.pop(RECORD, None) is not None:
            entry["version"] = 2
    return state


def test_mmcv_s_masks_with_renamed_keys_are_twice_as_large_and_here_it_is_said() -> None:
    """The numbers that this is about: masks of mean 1.3 where mmcv computes 0.66."""
    torch.manual_seed(0)
    theirs = trained(DeformConv2d(4, 4, 3, padding=1))
    nn.init.constant_(theirs.offset_conv.bias, 0.7)  # type: ignore[union-attr,arg-type]
    x, found = torch.rand(2, 4, 8, 8), of_mmcv(theirs)
    expected = mmcv_mask(theirs, x)
    with pytest.raises(RuntimeError, match=r'"conv_offset\.weight".*source="mmcv"'):
        DeformConv2d(4, 4, 3, padding=1).load_state_dict(found, strict=False)
    with_metadata = renamed(found, r"conv_offset\.", "offset_conv.", keep_metadata=True)
    with pytest.raises(RuntimeError, match=r"mmcv wrote the weights of this layer, whose keys were renamed"):
        DeformConv2d(4, 4, 3, padding=1).load_state_dict(with_metadata)
    ours, right = DeformConv2d(4, 4, 3, padding=1), DeformConv2d(4, 4, 3, padding=1, mask_scale=1.0)
    with pytest.warns(UserWarning, match="its masks are sigmoid and here"):
        ours.load_state_dict(renamed(found, r"conv_offset\.", "offset_conv."))
    wrong = ours.offsets_and_mask(x)[1]
    assert wrong is not None and torch.allclose(wrong.mean() / expected.mean(), torch.tensor(2.0))
    right.load_state_dict(with_metadata)
    assert torch.allclose(right.offsets_and_mask(x)[1], expected, atol=1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("strict", [True, False])
def test_mmcv_s_record_with_renamed_keys_is_an_error(strict: bool) -> None:
    state = renamed(of_mmcv(net()), r"conv_offset\.", "offset_conv.", keep_metadata=True)
    with pytest.raises(RuntimeError) as raised:
        net().load_state_dict(state, strict=strict)
    assert str(raised.value).splitlines()[1:] == [
        "\tmmcv wrote the weights of layer '0.conv2', whose keys were renamed. Its masks are sigmoid and those of the model "
        '2.0*sigmoid: load convert_state_dict(state, source="mmcv", model=model), of deformconv.convert, with the state as it '
        "was saved, or build the layer with mask_scale=1.0. So it is with 1 more layer."
    ]
    net(mask_scale=1.0).load_state_dict(state)
    net(modulated=False, mask_scale=1.0).load_state_dict(net(modulated=False).state_dict())


def test_a_subclass_with_a_version_of_its_own() -> None:
    """Its version 2 is not mmcv's."""

    class Second(DeformConv2d):
        _version = 2

    state = Second(2, 3, 3).state_dict()
    assert metadata(state)[""] == {"version": 2, RECORD: 2.0}
    Second(2, 3, 3).load_state_dict(state)
    del metadata(state)[""][RECORD]
    with pytest.warns(UserWarning, match=NOTHING_SAYS):
        Second(2, 3, 3).load_state_dict(state)


def test_noted_keeps_the_rest_and_changes_nothing_that_it_was_given() -> None:
    model = nn.Sequential(DeformConv2d(2, 3, 3), nn.BatchNorm2d(3), DeformConv2d(3, 3, 3, modulated=False))
    found = of_mmcv(model)
    before = copy.deepcopy(found._metadata)
    result: Any = noted(renamed(found, r"conv_offset\.", "offset_conv.", keep_metadata=True), model)
    assert metadata(result)["0"] == {"version": 1, RECORD: 2.0}
    assert metadata(result)["1"] == {"version": 2}  # batch norm's own
    assert scales(result) == {"0": 2.0}
    assert noted(found, model) is not found
    assert found._metadata == before
    assert all(result[name] is tensor for name, tensor in renamed(found, r"conv_offset\.", "offset_conv.").items())
    model.load_state_dict(result)


def test_noted_names_a_layer_by_all_its_names_and_takes_a_plain_dict() -> None:
    layer = DeformConv2d(2, 2, 3, mask_scale=1.5)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    result = noted(by_hand(model), model)
    assert scales(result) == {"0": 1.5, "2": 1.5}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(result)


def test_the_net_that_the_package_ships_loads_without_a_warning() -> None:
    pytest.importorskip("matplotlib")
    from deformconv.plots.example import example_net

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        example_net()
