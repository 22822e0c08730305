"""Pictures in every form that people have, and the sentences about those that are none."""

import io
import struct
import zlib

import numpy as np
import pytest

from deformconv.errors import ShapeError
from deformconv.plots.images import model_input, picture

pil = pytest.importorskip("PIL.Image")
torch = pytest.importorskip("torch")
nn = torch.nn

GREY = np.linspace(0, 1, 30).reshape(6, 5)
COLOUR = np.linspace(0, 1, 90).reshape(6, 5, 3)
EIGHT = np.rint(COLOUR * 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (GREY, GREY),
        (GREY[None], GREY),
        (GREY[..., None], GREY),
        (GREY[None, None], GREY),
        (GREY.tolist(), GREY),
        (COLOUR, COLOUR),
        (COLOUR.transpose(2, 0, 1), COLOUR),
        (COLOUR[None], COLOUR),
        (COLOUR.transpose(2, 0, 1)[None], COLOUR),
        (COLOUR.astype(np.float16), COLOUR.astype(np.float16)),
        (EIGHT, EIGHT / 255),
        (EIGHT.astype(np.int64), EIGHT / 255),
        (EIGHT.astype(np.float32), EIGHT / 255),
        (EIGHT.astype(np.uint16) * 257, EIGHT / 255),
        (EIGHT.astype(np.int32) * 257, EIGHT / 255),
        (GREY > 0.5, GREY > 0.5),
        ((GREY > 0.5).astype(float), GREY > 0.5),
        (GREY * 7 - 3, GREY),  # normalised
        (COLOUR * 7 - 3, COLOUR),
        (COLOUR * 1000.5, COLOUR),
        (EIGHT.astype(np.int64) - 100, EIGHT / 255),
        (np.full((2, 3), -4.5), np.zeros((2, 3))),
    ],
)
def test_arrays_of_every_form_and_scale(image, expected):
    found = picture(image)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    assert (picture(found) == found).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_tensors_of_every_dtype(dtype):
    tensor = torch.tensor(COLOUR.transpose(2, 0, 1), dtype=dtype, requires_grad=True)
    for one in (tensor, tensor[None], tensor.permute(1, 2, 0)):
        np.testing.assert_array_equal(picture(one), tensor.detach().double().numpy().transpose(1, 2, 0))
    np.testing.assert_array_equal(picture(torch.tensor(EIGHT)), EIGHT / 255)
    np.testing.assert_array_equal(picture(torch.tensor(GREY).to_sparse()), GREY)


def test_where_both_axes_could_be_channels_arrays_have_them_last_and_tensors_first():
    square = np.random.default_rng(0).random((3, 7, 3))
    np.testing.assert_array_equal(picture(square), square)
    np.testing.assert_array_equal(picture(torch.tensor(square)), square.transpose(1, 2, 0))
    np.testing.assert_array_equal(picture(square[None]), square.transpose(1, 2, 0))  # a batch goes as tensors do


def test_what_is_transparent_shows_white():
    clear = np.dstack([COLOUR, np.full((6, 5), 0.25)])
    np.testing.assert_allclose(picture(clear), 0.75 + 0.25 * COLOUR)
    np.testing.assert_allclose(picture(torch.tensor(clear).permute(2, 0, 1)), 0.75 + 0.25 * COLOUR)
    eight = np.dstack([EIGHT, np.full((6, 5), 51, np.uint8)])
    np.testing.assert_allclose(picture(eight), 0.8 + 0.2 * EIGHT / 255)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "RGBX", "F", "I", "I;16", "I;16B"])
def test_pillow_images_of_every_mode(mode):
    """Half of the picture is black, and half is the mode's white."""
    white = {"I": 65535, "I;16": 65535, "I;16B": 65535, "F": 1.0}
    if mode in white:
        image = pil.new(mode, (4, 2))
        for y in range(2):
            image.putpixel((3, y), white[mode])
            image.putpixel((2, y), white[mode])
    else:
        image = pil.fromarray(np.repeat([[[0] * 3, [0] * 3, [255] * 3, [255] * 3]], 2, axis=0).astype(np.uint8)).convert(mode)
    expected = np.repeat([[0.0, 0, 1, 1]], 2, axis=0)
    found = picture(image)
    assert found.shape == ((2, 4) if mode in ("1", "L", *white) else (2, 4, 3))
    np.testing.assert_allclose(found, expected if found.ndim == 2 else np.stack([expected] * 3, axis=2))


def test_pillow_images_with_alpha():
    for mode, value in (("RGBA", (255, 0, 0, 51)), ("LA", (0, 51)), ("RGBa", (51, 0, 0, 51)), ("La", (0, 51))):
        found = picture(pil.new(mode, (3, 2), value))
        np.testing.assert_allclose(found[0, 0], [1, 0.8, 0.8] if "R" in mode else 0.8)
    palette = pil.new("P", (3, 2), 1)
    palette.putpalette([0, 0, 0, 0, 0, 255])
    np.testing.assert_allclose(picture(palette)[1, 2], [0, 0, 1])
    palette.info["transparency"] = 1
    np.testing.assert_allclose(picture(palette), 1)
    np.testing.assert_allclose(picture(palette.convert("PA")), 1)


def test_files_are_read_and_turned_upright(tmp_path):
    image = pil.fromarray(EIGHT)
    image.save(tmp_path / "plain.png")
    for path in (tmp_path / "plain.png", str(tmp_path / "plain.png")):
        np.testing.assert_array_equal(picture(path), EIGHT / 255)
    exif = pil.Exif()
    exif[0x0112] = 6  # the camera was held upright: a viewer turns by 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(picture(tmp_path / "turned.png"), np.rot90(EIGHT, -1) / 255)
    pil.fromarray(EIGHT[..., 0].astype(np.uint16) * 200).save(tmp_path / "sixteen.png")
    np.testing.assert_allclose(picture(tmp_path / "sixteen.png"), EIGHT[..., 0] * 200.0 / 65535)
    frames = [pil.new("L", (5, 4), value) for value in (255, 0)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    np.testing.assert_allclose(picture(tmp_path / "moving.gif"), 1)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((2, 3, 8, 8)), r"shape \(2, 3, 8, 8\): 2 pictures; expected one, .*\. Of a batch pass one, as `image\[0\]`"),
        (np.zeros((2, 8, 8)), r"shape \(2, 8, 8\): neither its first axis nor its last can be channels, .* 1 \(grey\), 3"),
        (np.zeros((8, 8, 2)), "neither its first axis nor its last"),
        (np.zeros((8, 9, 5)), "neither its first axis nor its last"),
        (torch.zeros(1, 5, 8, 8), r"shape \(1, 5, 8, 8\): neither"),
        (np.zeros(8), r"has 1 axes, shape \(8,\); expected \(H, W\), \(H, W, 3\)"),
        (np.float64(3), r"has 0 axes, shape \(\)"),
        (np.zeros((1, 1, 1, 8, 8)), r"has 5 axes, shape \(1, 1, 1, 8, 8\)"),
        (np.zeros((0, 8, 3)), r"shape \(0, 8, 3\), and so no pixels"),
        (torch.zeros(3, 8, 0), r"shape \(3, 8, 0\), and so no pixels"),
        (pil.new("L", (0, 8)), "no pixels"),
        ([[1, 2], [3]], "is of type list and becomes no array"),
    ],
)
def test_wrong_shapes_are_explained(image, message):
    with pytest.raises(ShapeError, match=message):
        picture(image)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 8), complex), "is of type ndarray, as an array of dtype complex128; expected real numbers"),
        (torch.zeros(8, 8, dtype=torch.complex64), "dtype complex64"),
        (torch.zeros(8, 8, device="meta"), "on the device 'meta'"),
        (None, "is of type NoneType, as an array of dtype object; expected real numbers .* the path of a file"),
        ([["a", "b"]], "is of type list, as an array of dtype <U1"),
        (b"\x89PNG", "is of type bytes"),
    ],
)
def test_what_has_no_real_numbers_is_explained(image, message):
    with pytest.raises(TypeError, match=message):
        picture(image)


def test_numbers_that_are_not_finite_are_counted():
    image = np.ones((6, 5, 3))
    image[0, 0, 0], image[1, 1] = np.nan, np.inf
    with pytest.raises(ValueError, match="has 4 NaN or infinite numbers among its 90"):
        picture(image)
    with pytest.raises(ValueError, match="has 4 NaN or infinite"):
        picture(torch.tensor(image))


def test_an_alpha_channel_out_of_its_range_is_explained():
    with pytest.raises(ValueError, match=r"alpha channel from -1\.5 to -1\.5; expected 0 \(clear\) to 1 \(opaque\)"):
        picture(np.dstack([COLOUR, np.full((6, 5), -1.5)]))


def png(width: int, height: int) -> bytes:
    """A PNG file of a few bytes that says that it is as large as this."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def test_files_that_are_no_pictures_are_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`image` is 'phto\.jpg', and there is no such file\.$"):
        picture("phto.jpg")
    with pytest.raises(FileNotFoundError, match=r"there is no such file\. Download it first\."):
        picture("https://example.org/photo.jpg")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        picture("photo\0.jpg")
    with pytest.raises(IsADirectoryError, match="which is a folder; expected the path of one picture"):
        picture(tmp_path)
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(ValueError, match=r"notes\.txt', and this file is no picture that Pillow can read"):
        picture(tmp_path / "notes.txt")
    (tmp_path / "empty.png").touch()
    with pytest.raises(ValueError, match=r"empty\.png', and this file is no picture"):
        picture(tmp_path / "empty.png")


def test_broken_and_huge_files_are_explained(tmp_path):
    file = io.BytesIO()
    pil.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60, 3), np.uint8)).save(file, "jpeg")
    (tmp_path / "half.jpg").write_bytes(file.getvalue()[:2000])
    with pytest.raises(ValueError, match=r"half\.jpg', and Pillow cannot read it: .*truncated"):
        picture(tmp_path / "half.jpg")
    with (
        pil.open(tmp_path / "half.jpg") as opened,
        pytest.raises(ValueError, match=r"a PIL image that Pillow cannot read: .*truncated"),
    ):
        picture(opened)
    for size in (10_000, 60_000):  # Pillow warns of the first, and refuses the second
        (tmp_path / "bomb.png").write_bytes(png(size, size))
        with pytest.raises(ValueError, match=r"has too many pixels: Pillow takes at most 89,478,485 .* may be an attack"):
            picture(tmp_path / "bomb.png")


def net(channels: int, **more) -> nn.Module:
    return nn.Sequential(nn.Sequential(nn.Conv2d(channels, 4, 3, **more)), nn.Conv2d(4, 2, 3))


def test_a_model_gets_the_channels_that_its_first_convolution_takes():
    red = np.zeros((6, 5, 3), np.uint8)
    red[..., 0] = 255
    one, three = model_input(red, net(1)), model_input(red, net(3))
    assert one.shape == (1, 1, 6, 5) and three.shape == (1, 3, 6, 5)
    np.testing.assert_allclose(one.numpy(), 0.299, rtol=1e-6)
    assert three[0, :, 0, 0].tolist() == [1, 0, 0]
    grey = model_input(GREY, net(3))
    assert grey.shape == (1, 3, 6, 5) and (grey == grey[:, :1]).all()
    np.testing.assert_allclose(grey[0, 0], GREY, rtol=1e-6)
    assert model_input(COLOUR, nn.Linear(2, 2)).shape == (1, 3, 6, 5)
    assert model_input(COLOUR, nn.LazyConv2d(2, 3)).shape == (1, 3, 6, 5)
    assert model_input(np.dstack([COLOUR, GREY]), net(3)).shape == (1, 3, 6, 5)


def test_a_model_gets_its_own_dtype_and_a_tensor_keeps_its_numbers():
    batch = torch.zeros(2, 7, 6, 5)
    assert model_input(batch, net(3)) is batch
    assert model_input(EIGHT, net(3).double()).dtype == torch.float64
    assert model_input(EIGHT, net(3).half()).dtype == torch.float16
    normal = torch.tensor(COLOUR.transpose(2, 0, 1) * 5 - 2)
    assert torch.equal(model_input(normal, net(3)), normal[None].float())
    np.testing.assert_allclose(model_input(normal[:1], net(3))[0, 2], normal[0], rtol=1e-6)
    np.testing.assert_allclose(model_input(normal[0], net(1))[0, 0], normal[0], rtol=1e-6)
    four = torch.randn(4, 6, 5)
    assert torch.equal(model_input(four, net(4)), four[None])
    np.testing.assert_allclose(model_input(torch.tensor(EIGHT), net(3))[0].permute(1, 2, 0), EIGHT / 255, rtol=1e-6)


def test_the_deformable_layers_of_others_are_first_convolutions():
    ops = pytest.importorskip("torchvision.ops")
    assert model_input(GREY, ops.DeformConv2d(3, 4, 3)).shape == (1, 3, 6, 5)
    from deformconv.torch import DeformConv2d

    assert model_input(COLOUR, nn.Sequential(DeformConv2d(1, 4, 3))).shape == (1, 1, 6, 5)


def test_models_that_take_no_picture_are_explained():
    with pytest.raises(
        ShapeError, match=r"first convolution, '0\.0', takes 4 channels, and a picture has 1 or 3: pass a tensor"
    ):
        model_input(COLOUR, net(4))
    with pytest.raises(ShapeError, match="first convolution, '0', is 3-D; a picture is for 2-D models"):
        model_input(COLOUR, nn.Sequential(nn.Conv3d(3, 4, 3)))
    with pytest.raises(TypeError, match=r"`model` is of type builtin_function_or_method; expected a torch\.nn\.Module"):
        model_input(COLOUR, len)


def test_a_file_without_pillow_tells_how_to_get_it(monkeypatch, tmp_path):
    import sys

    (tmp_path / "photo.png").write_bytes(png(4, 4))
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ModuleNotFoundError, match="file needs Pillow, which is not installed: pip install"):
        picture(tmp_path / "photo.png")
