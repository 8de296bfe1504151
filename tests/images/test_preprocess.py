"""Preprocessing against transformers' PIL processors (installed) and timm's transform (recorded)."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images

from tests.helpers.paths import ORACLES
from vitdeploy.config import Preprocess
from vitdeploy.errors import CheckpointError, ConfigError, ImageError
from vitdeploy.images.decode import load_image
from vitdeploy.images.preprocess import (
    apply,
    apply_uint8,
    at_size,
    channel_notes,
    for_channels,
    from_huggingface,
    from_timm,
    from_torchvision,
    published,
)

RECORDED = ORACLES / "timm_preprocess.npz"

# Class and what is set beside its defaults.
HUGGINGFACE: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTImageProcessor", {}),
    "vit_384": ("ViTImageProcessor", {"size": {"height": 384, "width": 384}, "resample": 3}),
    "vit_not_square": ("ViTImageProcessor", {"size": {"height": 160, "width": 224}}),
    "vit_number": ("ViTImageProcessor", {"size": 96}),
    "vit_crop_only": ("ViTImageProcessor", {"do_resize": False, "do_center_crop": True, "crop_size": 225}),
    "vit_raw": ("ViTImageProcessor", {"do_rescale": False, "do_normalize": False}),
    "vit_not_normalised": ("ViTImageProcessor", {"do_normalize": False}),
    "vit_not_rescaled": ("ViTImageProcessor", {"do_rescale": False, "image_mean": [100.5, 99.0, 98.0]}),
    "vit_imagenet": (
        "ViTImageProcessor",
        {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "rescale_factor": 0.0039},
    ),
    "deit": ("DeiTImageProcessor", {}),
    "deit_odd_crop": ("DeiTImageProcessor", {"crop_size": {"height": 223, "width": 197}}),
    "deit_crop_beyond": ("DeiTImageProcessor", {"size": 120, "crop_size": {"height": 151, "width": 100}}),
    "deit_lanczos": ("DeiTImageProcessor", {"resample": 1}),
    "deit_nearest": ("DeiTImageProcessor", {"resample": 0}),
    "deit_box": ("DeiTImageProcessor", {"resample": 4}),
    "deit_hamming": ("DeiTImageProcessor", {"resample": 5}),
    "dinov2": (
        "BitImageProcessor",
        {
            "size": {"shortest_edge": 256},
            "crop_size": {"height": 224, "width": 224},
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
        },
    ),
    "bit_number": ("BitImageProcessor", {"size": 131, "crop_size": 100}),
    "bit_crop_beyond": ("BitImageProcessor", {"size": {"shortest_edge": 90}, "crop_size": 133}),
    "clip": ("CLIPImageProcessor", {}),
    "clip_old": ("CLIPImageProcessor", {"size": 224, "crop_size": 224, "resample": 3}),
    "siglip": ("SiglipImageProcessor", {}),
    "beit": ("BeitImageProcessor", {}),
    "blip": ("BlipImageProcessor", {}),
    "beit_cropped": ("BeitImageProcessor", {"size": 256, "do_center_crop": True}),
}


def theirs(name: str) -> tuple[Any, dict[str, Any]]:
    """transformers' own processor, and the configuration that it saves."""
    import transformers

    kind, options = HUGGINGFACE[name]
    processor = getattr(transformers, kind + "Pil")(**options)
    return processor, json.loads(processor.to_json_string())


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    """Two photographs of 640x427, and wide, tall and small parts of them."""
    china, flower = (Image.fromarray(pixels) for pixels in load_sample_images().images)
    parts = [
        china.crop((10, 20, 470, 133)),
        china.crop((300, 0, 411, 427)),
        flower.crop((200, 100, 249, 163)),
    ]
    return [china, flower, flower.transpose(Image.Transpose.ROTATE_90), *parts]


def random_image(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.slow
@pytest.mark.parametrize("name", HUGGINGFACE)
def test_pixels_are_those_of_transformers(name: str, photographs: list[Image.Image]) -> None:
    processor, config = theirs(name)
    spec = from_huggingface(config)
    for image in photographs:
        expected = processor(image, return_tensors="np")["pixel_values"][0]
        ours = apply(image, spec)
        assert ours.shape == expected.shape
        assert np.array_equal(ours, expected.astype(np.float32))


@pytest.mark.slow
@pytest.mark.parametrize("name", HUGGINGFACE)
@given(width=st.integers(1, 300), height=st.integers(1, 300), seed=st.integers(0, 99))
@settings(max_examples=12, deadline=None)
def test_pixels_are_those_of_transformers_at_any_size(name: str, width: int, height: int, seed: int) -> None:
    processor, config = theirs(name)
    image = random_image(width, height, seed)
    # Images as narrow as 1x300 would be resized to 150 megapixels in between.
    if max(width, height) > 20 * min(width, height):
        image = image.crop((0, 0, min(width, 20 * height), min(height, 20 * width)))
    expected = processor(image, return_tensors="np")["pixel_values"][0]
    assert np.array_equal(apply(image, from_huggingface(config)), expected.astype(np.float32))


@pytest.mark.slow
@pytest.mark.parametrize("name", HUGGINGFACE)
def test_settings_left_out_have_the_default_of_their_class(name: str) -> None:
    kind, options = HUGGINGFACE[name]
    _, complete = theirs(name)
    assert from_huggingface({"image_processor_type": kind, **options}) == from_huggingface(complete)


@pytest.mark.parametrize(
    "suffix", ["ImageProcessor", "ImageProcessorFast", "ImageProcessorPil", "FeatureExtractor"]
)
@pytest.mark.parametrize("key", ["image_processor_type", "feature_extractor_type"])
def test_older_and_newer_names_of_a_processor(key: str, suffix: str) -> None:
    assert from_huggingface({key: "DeiT" + suffix}) == from_huggingface({}, model_type="deit")


@pytest.mark.parametrize(
    "model_type,processor",
    [
        ("vit", "ViTImageProcessor"),
        ("deit", "DeiTImageProcessor"),
        ("dinov2", "BitImageProcessor"),
        ("dinov2_with_registers", "BitImageProcessor"),
        ("beit", "BeitImageProcessor"),
        ("blip", "BlipImageProcessor"),
        ("vit_msn", "ViTImageProcessor"),
        ("vit_mae", "ViTImageProcessor"),
        ("dinov3_vit", "DINOv3ViTImageProcessor"),
    ],
)
def test_the_model_decides_where_no_processor_is_named(model_type: str, processor: str) -> None:
    assert from_huggingface({}, model_type) == from_huggingface({"image_processor_type": processor})


def test_floats_are_resized_where_the_processor_rescales_first() -> None:
    """Between pixels of one level apart there are others then; torchvision's own are in test_dinov3.py."""
    spec = from_huggingface({"size": {"height": 4, "width": 4}}, model_type="dinov3_vit")
    assert (spec.resample, spec.exif) == ("bilinear_float", True)
    assert from_huggingface({"size": 4, "resample": 3}, model_type="dinov3_vit").resample == "bicubic_float"
    with pytest.raises(CheckpointError, match="resample = 0 is none of 2, 3"):
        from_huggingface({"size": 4, "resample": 0}, model_type="dinov3_vit")
    pixels = np.arange(192, dtype=np.uint8).reshape(8, 8, 3) // 40
    floats, rounded = apply(Image.fromarray(pixels), spec), apply_uint8(Image.fromarray(pixels), spec)
    mean, std = (np.array(values)[:, None, None] for values in (spec.mean, spec.std))
    levels = (floats * std + mean) * 255
    assert np.abs(levels - rounded.transpose(2, 0, 1)).max() <= 1  # Pillow rounds behind rows and columns
    assert np.abs(levels - np.rint(levels)).max() > 0.2
    assert levels.min() >= -1e-4
    assert levels.max() <= 4 + 1e-4


def test_of_one_size_floats_are_what_pixels_are() -> None:
    image = random_image(24, 16)
    spec = Preprocess(size=(16, 24), resample="bilinear_float", mean=(0.4,) * 3, std=(0.2,) * 3)
    np.testing.assert_allclose(
        apply(image, spec), apply(image, replace(spec, resample="bilinear")), rtol=0, atol=1e-6
    )
    cropped = replace(spec, size=(10, 10), resize="none")
    ours, plain = (apply(image, replace(cropped, resample=name)) for name in ("bicubic_float", "bicubic"))
    np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-6)
    grey = replace(spec, mean=(0.4,), std=(0.2,))
    np.testing.assert_allclose(
        apply(image, grey), apply(image, replace(grey, resample="bilinear")), rtol=0, atol=1e-6
    )


def test_a_null_setting_is_one_left_out() -> None:
    assert from_huggingface({"size": None, "image_mean": None, "do_pad": None}) == from_huggingface({})


@pytest.mark.parametrize(
    "config,key",
    [
        ({"image_processor_type": "ConvNextImageProcessor"}, "image_processor_type"),
        ({"image_processor_type": "VitImageProcesor"}, "did you mean 'ViTImageProcessor'"),
        ({"do_pad": True}, "do_pad"),
        ({"rescale_offset": True}, "rescale_offset"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order"),
        ({"do_grayscale": True}, "do_grayscale"),
        ({"size": {"shortest_edge": 224}}, "size"),
        ({"size": {"shortest_edge": 224, "longest_edge": 300}}, "size"),
        ({"size": {"longest_edge": 224}}, "size"),
        ({"size": {"height": 224}}, "size"),
        ({"size": {"height": 224, "width": "224"}}, "size"),
        ({"size": 0}, "size"),
        ({"size": -3}, "size"),
        ({"size": True}, "size"),
        ({"size": 224.5}, "size"),
        ({"size": [1, 2, 3]}, "size"),
        ({"size": "224"}, "size"),
        ({"do_resize": False}, "do_resize"),
        ({"do_center_crop": True, "crop_size": {"shortest_edge": 5}}, "crop_size"),
        ({"resample": 6}, "resample"),
        ({"resample": "bicubic"}, "resample"),
        ({"resample": True}, "resample"),
        ({"resample": [3]}, "resample"),
        ({"rescale_factor": 0}, "rescale_factor"),
        ({"rescale_factor": "1/255"}, "rescale_factor"),
        ({"rescale_factor": float("nan")}, "rescale_factor"),
        ({"image_mean": [0.5, 0.5]}, "image_mean"),
        ({"image_mean": ["0.5"] * 3}, "image_mean"),
        ({"image_std": [0.5, 0.5, float("inf")]}, "image_std"),
        ({"image_std": [0.5, 0.5, 0.0]}, "std"),
        ({"image_std": "0.5"}, "image_std"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(config: dict[str, Any], key: str) -> None:
    with pytest.raises(CheckpointError, match=key) as caught:
        from_huggingface(config)
    assert "\n" not in caught.value.message


def test_the_processor_that_wraps_timms_transforms() -> None:
    """timm's transform, behind a load_image of transformers that turns photographs."""
    given = {"input_size": [3, 64, 64], "crop_pct": 0.9, "mean": [0.5] * 3, "interpolation": "bicubic"}
    wrapped = {"image_processor_type": "TimmWrapperImageProcessor", "pretrained_cfg": given}
    assert from_huggingface(wrapped) == replace(from_timm(given), exif=True)
    with pytest.raises(CheckpointError, match="pretrained_cfg = None is no object"):
        from_huggingface({"image_processor_type": "TimmWrapperImageProcessor"})


def test_a_model_without_known_processor_is_refused() -> None:
    with pytest.raises(CheckpointError, match="swin2sr"):
        from_huggingface({}, model_type="swin2sr")


def recorded_cases() -> list[str]:
    with np.load(RECORDED) as arrays:
        return list(json.loads(str(arrays["cases"])))


@pytest.mark.parametrize("case", recorded_cases())
def test_pixels_are_those_of_timm(case: str) -> None:
    with np.load(RECORDED) as arrays:
        what = json.loads(str(arrays["cases"]))[case]
        image, expected = arrays[f"image.{what['image']}"], arrays[f"output.{case}"]
    ours = apply(Image.fromarray(image), from_timm(what["config"]))
    assert ours.dtype == expected.dtype
    assert np.array_equal(ours, expected)


@pytest.mark.parametrize("case", ["resnet50_v1", "resnet50_v2", "swag", "inception"])
@pytest.mark.parametrize("image", ["wide", "tall", "smaller"])
def test_pixels_are_those_of_torchvision(case: str, image: str) -> None:
    with np.load(ORACLES / "torchvision_preprocess.npz") as arrays:
        settings = json.loads(str(arrays["cases"]))[case]
        pixels, expected = arrays[f"image.{image}"], arrays[f"output.{case}.{image}"]
    ours = apply(Image.fromarray(pixels), from_torchvision(settings))
    assert ours.dtype == expected.dtype
    np.testing.assert_allclose(ours, expected, rtol=0, atol=5e-7)  # it divides by 255, which rounds otherwise


def test_torchvision_settings_that_are_not_known_are_named() -> None:
    good = {
        "crop_size": [24],
        "resize_size": [27],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bilinear",
    }
    for key, value in (
        ("crop_size", None),
        ("resize_size", [1, 2]),
        ("interpolation", "cubic"),
        ("mean", [0.1]),
    ):
        with pytest.raises(CheckpointError, match=key):
            from_torchvision({**good, key: value})


def test_timm_defaults() -> None:
    spec = from_timm({})
    assert spec == from_timm(
        {
            "input_size": [3, 224, 224],
            "crop_pct": 0.875,
            "crop_mode": "center",
            "interpolation": "bicubic",
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
        }
    )
    assert (spec.size, spec.resize_edge, spec.resample) == ((224, 224), 256, "bicubic")


@pytest.mark.parametrize(
    "config,key",
    [
        ({"input_size": [224, 224]}, "input_size"),
        ({"input_size": 224}, "input_size"),
        ({"input_size": [3, 224, 0]}, "input_size"),
        ({"crop_pct": -1}, "crop_pct"),
        ({"crop_pct": "0.9"}, "crop_pct"),
        ({"crop_pct": 1e9}, "preprocessing"),
        ({"crop_mode": "middle"}, "crop_mode"),
        ({"interpolation": "random"}, "interpolation"),
        ({"interpolation": 3}, "interpolation"),
        ({"mean": [0.5]}, "mean"),
        ({"mean": [0.5] * 3, "input_size": [1, 28, 28], "std": [0.5]}, "they have 3 and 1"),
        ({"mean": [0.5] * 2, "input_size": [4, 28, 28]}, "is not 4 numbers, as the model has 4 channels"),
        ({"std": [0.5, 0.5, 0]}, "std"),
    ],
)
def test_what_timm_could_not_do_is_refused_by_name(config: dict[str, Any], key: str) -> None:
    with pytest.raises(CheckpointError, match=key):
        from_timm(config)


SPECS = [
    Preprocess(),
    Preprocess(
        (48, 64), "shortest_edge", resize_edge=70, resample="bicubic", mean=(0.1, 0.2, 0.3), exif=True
    ),
    Preprocess((33, 20), "cover", resize_to=(35, 25), crop_rounding="round", std=(0.229, 0.224, 0.225)),
    Preprocess((33, 50), "contain", resize_to=(33, 50), pad=(124, 116, 104)),
    Preprocess((300, 20), "none", rescale=1.0, mean=(127.5, 127.5, 127.5)),
]


@pytest.mark.parametrize("spec", SPECS)
def test_uint8_pixels_normalised_in_float64_are_the_float_pixels(
    spec: Preprocess, photographs: list[Image.Image]
) -> None:
    for image in photographs:
        pixels, values = apply_uint8(image, spec), apply(image, spec)
        assert pixels.shape == (*spec.size, 3)
        assert pixels.dtype == np.uint8
        assert values.shape == (3, *spec.size)
        assert values.dtype == np.float32
        assert values.flags.c_contiguous
        exact = (pixels.astype(np.float64) * spec.rescale - spec.mean) / spec.std
        scale = (255 * spec.rescale + np.abs(spec.mean).max()) / min(spec.std)
        assert np.abs(values.transpose(1, 2, 0) - exact).max() <= 4 * np.finfo(np.float32).eps * scale


def test_contain_shows_the_whole_image_on_the_padding() -> None:
    spec = Preprocess((40, 40), "contain", resize_to=(40, 40), pad=(1, 2, 3), crop_rounding="round")
    pixels = apply_uint8(Image.new("RGB", (80, 21), (200, 100, 50)), spec)
    assert (pixels[:15] == (1, 2, 3)).all()
    assert (pixels[15:25] == (200, 100, 50)).all()
    assert (pixels[25:] == (1, 2, 3)).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (9, 1), (2, 2)])
@pytest.mark.parametrize("spec", SPECS)
def test_tiny_images(spec: Preprocess, size: tuple[int, int]) -> None:
    values = apply(random_image(*size), spec)
    assert values.shape == (3, *spec.size)
    assert np.isfinite(values).all()


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_an_image_that_was_not_loaded_by_us_is_converted(mode: str) -> None:
    image = random_image(30, 20).convert(mode)
    assert np.array_equal(apply(image, Preprocess()), apply(load_image(image), Preprocess()))


def test_an_elongated_image_does_not_exhaust_memory() -> None:
    spec = Preprocess((224, 224), "shortest_edge", resize_edge=256)
    with pytest.raises(ImageError, match=r"1x20000 pixels is too elongated.*256x5120000"):
        apply(Image.new("RGB", (1, 20000)), spec)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied_only_where_asked(kind: str, orientation: int, tmp_path: Path) -> None:
    def square(x: int, y: int) -> tuple[int, int, int, int]:
        return (x, y, x + 16, y + 16)

    image = Image.new("RGB", (64, 32), "black")
    image.paste((255, 0, 0), square(0, 0))
    image.paste((0, 255, 0), square(48, 0))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "turned", kind, exif=exif, lossless=True, quality=100)
    loaded = load_image(tmp_path / "turned")
    # Where the stored image's top left and top right corner belong, by the EXIF standard (tag 274).
    corners = {1: "LT RT", 2: "RT LT", 3: "RB LB", 4: "LB RB", 5: "LT LB", 6: "RT RB", 7: "RB RT", 8: "LB LT"}
    size = (32, 64) if orientation < 5 else (64, 32)
    for spec, place in (
        (Preprocess(size, "none"), "LT RT"),
        (Preprocess(size, "none", exif=True), corners[orientation]),
    ):
        target = size if spec.exif else (32, 64)
        pixels = apply_uint8(loaded, Preprocess(target, "none", exif=spec.exif)).astype(int)
        rows, columns = {"T": 4, "B": target[0] - 4}, {"L": 4, "R": target[1] - 4}
        for (column, row), channel in zip(place.split(), (0, 1), strict=True):
            found = pixels[rows[row], columns[column]]
            assert found[channel] > 200, (place, found)
            assert found[1 - channel] < 60, (place, found)


def test_exif_orientation_of_16_bit_grey(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    image = Image.fromarray(np.array([[0, 65535]], dtype=np.uint16))
    image.save(tmp_path / "turned.png", exif=exif)
    pixels = apply_uint8(load_image(tmp_path / "turned.png"), Preprocess((1, 2), "none", exif=True))
    assert pixels[0, :, 0].tolist() == [255, 0]


def test_unreadable_exif_data_is_no_orientation() -> None:
    image = random_image(20, 10)
    image.info["exif"] = b"Exif\x00\x00II*\x00\xff\xff\xff\xff"
    spec = Preprocess((10, 20), "none", exif=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(apply_uint8(image, spec), np.asarray(image))


def test_at_size_keeps_the_share_of_the_crop() -> None:
    exact = at_size(from_huggingface({}), (384, 256))
    assert (exact.size, exact.resize_to) == ((384, 256), None)
    deit = at_size(from_huggingface({}, "deit"), (448, 448))
    assert (deit.size, deit.resize_to) == ((448, 448), (512, 512))
    dinov2 = at_size(from_huggingface({}, "dinov2"), (518, 518))
    assert (dinov2.size, dinov2.resize_edge) == ((518, 518), 518)
    timm = at_size(from_timm({}), (112, 112))
    assert (timm.size, timm.resize, timm.resize_edge) == ((112, 112), "shortest_edge", 128)
    assert timm == from_timm({"input_size": (3, 112, 112)})
    wide = at_size(from_timm({}), (112, 224))
    assert wide == from_timm({"input_size": (3, 112, 224)})
    assert at_size(wide, (224, 448)) == from_timm({"input_size": (3, 224, 448)})
    crop = at_size(Preprocess(resize="none"), (8, 9))
    assert (crop.size, crop.resize) == ((8, 9), "none")


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": (0, 4)},
        {"resize": "shortest_edge"},
        {"resize_edge": 5},
        {"resize": "shortest_edge", "resize_edge": 0},
        {"resize": "none", "resize_to": (4, 4)},
        {"resize": "cover"},
        {"resize": "contain"},
        {"resize_to": (4, -1)},
        {"std": (1.0, 0.0, 1.0)},
        {"mean": (1.0,)},
        {"pad": (0, 256, 0)},
        {"pad": (0, 0)},
    ],
)
def test_contradictory_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Preprocess(**wrong)


@pytest.mark.slow
def test_preprocessing_needs_no_framework() -> None:
    heavy = {"torch", "onnx", "onnxruntime", "transformers", "torchvision"}
    code = (
        f"import sys, vitdeploy.images.preprocess, vitdeploy.bundle.golden; print({heavy} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("model_type", ["deit", "dinov2", "dinov2_with_registers"])
def test_published_models_of_facebook_take_imagenet(model_type: str) -> None:
    spec = published(model_type)
    assert (spec.mean, spec.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (spec.size, spec.resample) == ((224, 224), "bicubic")
    assert spec.resize_edge == (None if model_type == "deit" else 256)
    assert published("vit").mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("model_type", ["vit_msn", "vit_mae"])
def test_published_msn_and_mae_take_imagenet(model_type: str) -> None:
    spec = published(model_type)
    assert (spec.mean, spec.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (spec.size, spec.resample, spec.resize) == ((224, 224), "bilinear", "exact")


# --- models of other channels than three -------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "vit_384", "deit_crop_beyond", "deit_nearest", "bit_number", "clip"])
def test_grey_pixels_are_those_of_transformers(name: str, photographs: list[Image.Image]) -> None:
    """Its processors take grey images as they are; Pillow makes them grey, as a user does before."""
    import transformers

    kind, options = HUGGINGFACE[name]
    options = options | {"image_mean": [0.45], "image_std": [0.27], "do_convert_rgb": False}
    processor = getattr(transformers, kind + "Pil")(**options)
    spec = from_huggingface(json.loads(processor.to_json_string()), channels=1)
    for image in photographs:
        expected = processor(image.convert("L"), return_tensors="np")["pixel_values"][0]
        ours = apply(image, spec)
        assert ours.shape == expected.shape == (1, *spec.size)
        assert np.array_equal(ours, expected.astype(np.float32))


GREY = Preprocess((20, 30), "none", rescale=1.0, mean=(0.0,), std=(1.0,))


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "P", "RGBA", "CMYK", "1"])
def test_grey_is_pillow_s_whatever_the_mode(mode: str, tmp_path: Path) -> None:
    image = random_image(30, 20).convert(mode)
    image.save(tmp_path / "saved.tif")
    expected = np.asarray(Image.open(tmp_path / "saved.tif").convert("L"))
    assert np.array_equal(apply_uint8(load_image(tmp_path / "saved.tif"), GREY)[..., 0], expected)
    assert np.array_equal(apply(image, GREY)[0], expected.astype(np.float32))


def test_every_level_of_grey_survives() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    spec = Preprocess((16, 16), mean=(0.0,), std=(1.0,))
    assert np.array_equal(apply_uint8(Image.fromarray(levels), spec)[..., 0], levels)
    deep = Image.fromarray(levels.astype(np.uint16) * 257)  # 16 bits
    assert np.array_equal(apply_uint8(deep, spec)[..., 0], levels)


def test_padding_becomes_grey_too() -> None:
    spec = Preprocess((4, 4), "none", pad=(10, 200, 30), mean=(0.0,), std=(1.0,))
    pixels = apply_uint8(Image.new("RGB", (2, 2), "white"), spec)[..., 0]
    luma = (299 * 10 + 587 * 200 + 114 * 30) / 1000  # ITU-R BT.601
    assert np.array_equal(pixels[1:3, 1:3], np.full((2, 2), 255))
    assert abs(pixels[0, 0] - luma) <= 0.5


@pytest.mark.parametrize("channels", [2, 4])
def test_an_image_has_no_other_channels(channels: int) -> None:
    spec = Preprocess(mean=(0.5,) * channels, std=(0.5,) * channels)
    assert not spec.takes_images
    with pytest.raises(ImageError, match=f"cannot become a tensor of {channels} channels"):
        apply(random_image(9, 9), spec)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_a_processor_states_a_number_for_each_channel(channels: int) -> None:
    wanted = tuple(0.1 + 0.1 * index for index in range(channels))
    config = {"image_mean": list(wanted), "image_std": list(wanted)}
    spec = from_huggingface(config, channels=channels)
    assert (spec.mean, spec.std) == (wanted, wanted)
    assert from_huggingface({"image_mean": 0.2}, channels=channels).mean == (0.2,) * channels
    assert from_huggingface({}, channels=channels).mean == (0.5,) * channels
    raw = from_huggingface({**config, "do_normalize": False}, channels=channels)
    assert (raw.mean, raw.std) == ((0.0,) * channels, (1.0,) * channels)
    for key in ("image_mean", "image_std"):
        with pytest.raises(CheckpointError, match=rf"{key} = \[0.5, 0.5, 0.5\] is not .* as the model has"):
            from_huggingface({**config, key: [0.5] * 3}, channels=channels)


def test_many_numbers_do_not_fill_the_screen() -> None:
    with pytest.raises(CheckpointError, match="is not 200 numbers, as the model has 200 channels") as caught:
        from_huggingface({"image_mean": [0.123456] * 199}, channels=200)
    assert len(caught.value.message) < 250
    with pytest.raises(CheckpointError, match="they have 200 and 3") as caught:
        from_timm({"mean": [0.1] * 200, "std": [0.1] * 3, "input_size": [200, 8, 8]})
    assert len(caught.value.message) < 250


@pytest.mark.parametrize("channels", [1, 4])
def test_rgb_means_are_averaged_as_timm_s_loader_does(channels: int) -> None:
    """timm.data.loader.adapt_to_chs: ``np.mean`` of what is stated, for every channel."""
    stated = from_timm({"input_size": [channels, 224, 224]})
    assert stated.channels == 3
    spec = for_channels(stated, channels)
    assert spec.mean == pytest.approx((np.mean([0.485, 0.456, 0.406]),) * channels, rel=1e-15)
    assert spec.std == pytest.approx((np.mean([0.229, 0.224, 0.225]),) * channels, rel=1e-15)
    assert any("average" in note for note in channel_notes(stated, channels))
    own = from_timm({"mean": [0.3] * channels, "std": [0.2] * channels, "input_size": [channels, 8, 8]})
    assert for_channels(own, channels) == own
    assert not any("average" in note for note in channel_notes(own, channels))
    assert for_channels(Preprocess(), channels).mean == (0.5,) * channels
    assert not any("average" in note for note in channel_notes(Preprocess(), channels))
    assert channel_notes(Preprocess(), 3) == ()
