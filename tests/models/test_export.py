"""What `write_model` writes opens in stock libraries, and computes what the model computes."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import open_clip
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, CLIPProcessor

import clipgraft as cg
from clipgraft.files import atomic_folder
from clipgraft.models import onnx
from clipgraft.models.clip import Clip, as_clip
from clipgraft.models.export import write_model
from tiny_models import TINY_OPENCLIP, randomise
from tiny_siglip import BIAS, SCALE

TEXTS = ["a photo of a cat", "một con mèo trên ghế 😀", "word " * 100]
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 100, 3), dtype=np.uint8)).filter(
    ImageFilter.GaussianBlur(2)
)


@pytest.fixture
def openclip_clip(tiny_config: Path) -> Clip:
    """A loaded open_clip model of random weights."""
    clip = cg.load(tiny_config, "none")
    randomise(clip.model)
    return clip


@pytest.fixture
def hf_clip(hf_folder: Path) -> Clip:
    """A loaded transformers model with a tokenizer of its own."""
    return cg.load(hf_folder)


def pixels(clip: Clip, batch: int = 2) -> Tensor:
    size = clip.family.image_size(clip.model)
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(batch))


def own_features(clip: Clip) -> tuple[Tensor, Tensor]:
    """By the library's own forward, without anything of clipgraft's."""
    ids, images = clip.tokenize(TEXTS), pixels(clip)
    with torch.no_grad():
        if clip.family.name == "open_clip":
            return clip.model.encode_image(images), clip.model.encode_text(ids)
        image = clip.model.get_image_features(pixel_values=images).pooler_output
        return image, clip.model.get_text_features(input_ids=ids).pooler_output


def assert_close(given: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(given, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("which", ["openclip_clip", "hf_clip"])
def test_a_transformers_folder_opens_without_clipgraft(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """A merged model cannot be used with from_pretrained, or gives other features there."""
    clip: Clip = request.getfixturevalue(which)
    written = write_model(clip, tmp_path / "model", "transformers")
    assert tmp_path / "model" / "model.safetensors" in written.paths
    model = CLIPModel.from_pretrained(tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    inputs = tokenizer(
        TEXTS, padding="max_length", truncation=True, max_length=clip.context_length, return_tensors="pt"
    )
    with torch.no_grad():
        image = model.get_image_features(pixel_values=pixels(clip)).pooler_output
        text = model.get_text_features(**inputs).pooler_output
    assert_close((image, text), own_features(clip))
    prepared = AutoImageProcessor.from_pretrained(tmp_path / "model")(PHOTO, return_tensors="pt")
    difference = (prepared["pixel_values"][0] - clip.require_preprocess()(PHOTO)).abs()
    assert difference.max() < 2.01 / 255 / 0.26
    both = CLIPProcessor.from_pretrained(tmp_path / "model")(
        text=TEXTS[:1], images=PHOTO, return_tensors="pt"
    )
    assert both["pixel_values"].equal(prepared["pixel_values"])
    assert cg.load(tmp_path / "model").fingerprint == clip.fingerprint


@pytest.mark.parametrize("which", ["openclip_clip", "hf_clip"])
def test_an_open_clip_folder_opens_without_clipgraft(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """A merged model cannot be used in open_clip, or gives other features there."""
    clip: Clip = request.getfixturevalue(which)
    write_model(clip, tmp_path / "model", "open_clip")
    name = f"local-dir:{tmp_path / 'model'}"
    model, _, transform = open_clip.create_model_and_transforms(name, require_pretrained=True)
    ids = open_clip.get_tokenizer(name)(TEXTS)
    assert ids.equal(clip.tokenize(TEXTS))
    with torch.no_grad():
        given = model.eval().encode_image(pixels(clip)), model.encode_text(ids)
    assert_close(given, own_features(clip))
    difference = (transform(PHOTO) - clip.require_preprocess()(PHOTO)).abs()
    assert difference.max() < 2.01 / 255 / 0.26
    again = cg.load(tmp_path / "model")
    assert again.fingerprint == clip.fingerprint
    assert again.tokenize(TEXTS).equal(clip.tokenize(TEXTS))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_checkpoint_opens_under_its_model_name(
    openclip_clip: Clip, tiny_config: Path, tmp_path: Path, suffix: str
) -> None:
    """`open_clip.create_model(name, pretrained=file)` refuses a merged checkpoint."""
    open_clip.add_model_config(tiny_config)
    file = tmp_path / f"merged{suffix}"
    for _ in range(2):  # the second replaces the first
        assert write_model(openclip_clip, file, "open_clip").paths == (file,)
    model = open_clip.create_model(tiny_config.stem, pretrained=str(file))
    assert as_clip(model).fingerprint == openclip_clip.fingerprint
    if suffix == ".pt":
        assert {"epoch", "name", "clipgraft", "state_dict"} == set(torch.load(file, weights_only=True))


def test_a_transformers_model_becomes_an_open_clip_checkpoint(hf_clip: Clip, tmp_path: Path) -> None:
    """A model from the hub could not be handed to somebody who uses open_clip."""
    write_model(hf_clip, tmp_path / "a.pt", "open_clip")
    write_model(hf_clip, tmp_path / "folder", "open_clip")
    config = json.loads((tmp_path / "folder" / "open_clip_config.json").read_text(encoding="utf-8"))
    model = open_clip.CLIP(**config["model_cfg"])
    open_clip.load_checkpoint(model, str(tmp_path / "a.pt"))
    assert as_clip(model).fingerprint == hf_clip.fingerprint


def test_models_of_open_clip_alone_keep_their_own_form(tmp_path: Path) -> None:
    """A fine-tuned SigLIP-like or scaled model could be trained here and never be saved."""
    config = copy.deepcopy(TINY_OPENCLIP)
    config["vision_cfg"]["ls_init_value"] = 0.5
    file = tmp_path / "scaled.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    clip = cg.load(file, "none")
    write_model(clip, tmp_path / "model", "open_clip")
    assert cg.load(tmp_path / "model").fingerprint == clip.fingerprint
    with pytest.raises(cg.errors.ModelError, match="cannot leave its own family"):
        write_model(clip, tmp_path / "other", "transformers")
    assert not (tmp_path / "other").exists()


def test_custom_text_models_keep_their_class(tmp_path: Path) -> None:
    """A CustomTextCLIP comes back as another class, whose weights have other names."""
    model = open_clip.CustomTextCLIP(**copy.deepcopy(TINY_OPENCLIP), init_logit_bias=-10.0).eval()
    recorded = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    model.visual.preprocess_cfg = {"size": 32, **recorded}
    write_model(as_clip(model), tmp_path / "model", "open_clip")
    again = cg.load(tmp_path / "model").model
    assert type(again) is open_clip.CustomTextCLIP
    assert all(again.state_dict()[name].equal(weight) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("which", ["openclip_clip", "hf_clip"])
def test_onnx_runtime_gives_the_same_features(
    which: str, request: pytest.FixtureRequest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A deployed model gives other embeddings or probabilities than the one evaluated, or takes one size."""
    clip: Clip = request.getfixturevalue(which)
    if which == "openclip_clip":
        clip.model.logit_scale.data.fill_(SCALE)
        clip.model.logit_bias = nn.Parameter(torch.tensor(BIAS))
    folder = tmp_path / "model"
    steps: list[tuple[int, int]] = []
    caplog.set_level("INFO", "clipgraft")
    written = write_model(clip, folder, "onnx", lambda *now: steps.append(now))
    assert steps == [(done, 4) for done in range(5)]
    assert set(written.differences) == {"text.onnx", "vision.onnx"}
    assert max(written.differences.values()) < 1e-5
    assert any("text.onnx agrees with PyTorch" in line for line in caplog.messages)
    told = json.loads((folder / "clipgraft_onnx.json").read_text(encoding="utf-8"))
    if which == "openclip_clip":
        assert (told["logit_scale"], told["logit_bias"]) == (SCALE, BIAS)
    text = onnxruntime.InferenceSession(folder / told["text"]["file"])
    vision = onnxruntime.InferenceSession(folder / told["vision"]["file"])
    for batch in (1, 3):
        images, ids = pixels(clip, batch), clip.tokenize(TEXTS[:batch])
        with torch.no_grad():
            wanted = clip.encode_image(images), clip.family.encode_text(clip.model, ids)
        (image,) = vision.run([told["vision"]["output"]], {told["vision"]["input"]: images.numpy()})
        (features,) = text.run([told["text"]["output"]], {told["text"]["input"]: ids.numpy()})
        assert_close((torch.from_numpy(image), torch.from_numpy(features)), wanted)
        assert features.shape == (batch, told["embedding_dim"])
    (cut,) = text.run(None, {"input_ids": clip.tokenize("a cat")[:, :8].numpy()})
    torch.testing.assert_close(torch.from_numpy(cut), clip.encode_text("a cat").detach(), atol=1e-5, rtol=0)
    settings = clip.require_preprocess()(Image.new("RGB", (40, 40), (255, 0, 128)))[:, 0, 0]
    scaled = (torch.tensor([1.0, 0.0, 128 / 255]) - torch.tensor(told["vision"]["mean"])) / torch.tensor(
        told["vision"]["std"]
    )
    torch.testing.assert_close(settings, scaled, atol=1e-5, rtol=0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=told["text"]["context_length"])
    (features,) = text.run(None, {"input_ids": np.array(ids["input_ids"])})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(features), clip.encode_text(TEXTS), atol=1e-5, rtol=0)


def test_bf16_and_unusual_towers_are_exported_in_fp32(tmp_path: Path) -> None:
    """A half-precision model, or one that is not CLIP's own architecture, cannot be deployed."""
    config = copy.deepcopy(TINY_OPENCLIP)
    config["vision_cfg"] |= {"ls_init_value": 0.5, "layers": 1}
    config["text_cfg"] |= {"ls_init_value": 0.5, "layers": 1}
    file = tmp_path / "scaled.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    clip = cg.load(file, "none", precision="bf16")
    write_model(clip, tmp_path / "model", "onnx")
    assert clip.dtype == torch.bfloat16
    images, ids = pixels(clip, 3), clip.tokenize(TEXTS)
    clip.model.float()
    with torch.no_grad():
        wanted = clip.model.encode_image(images), clip.model.encode_text(ids)
    given = [
        onnxruntime.InferenceSession(tmp_path / "model" / f"{name}.onnx").run(None, {key: inputs.numpy()})[0]
        for name, key, inputs in (("vision", "pixel_values", images), ("text", "input_ids", ids))
    ]
    assert_close((torch.from_numpy(given[0]), torch.from_numpy(given[1])), wanted)


def test_a_graph_that_computes_something_else_is_not_written(
    hf_clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong graph would be deployed, and found out by its users."""

    def wrong(graph: nn.Module, path: Path) -> None:
        with torch.no_grad():
            hf_clip_weights = graph.model.text_projection.weight
            hf_clip_weights.mul_(2)
            export(graph, path)
            hf_clip_weights.div_(2)

    export = onnx.export_graph
    monkeypatch.setattr(onnx, "export_graph", wrong)
    with pytest.raises(cg.errors.ModelError, match=r"text\.onnx differs from PyTorch by 1\.0e\+00"):
        write_model(hf_clip, tmp_path / "model", "onnx")
    assert list(tmp_path.iterdir()) == []


def test_missing_onnx_packages_say_what_to_install(
    hf_clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever installed clipgraft alone gets an ImportError from deep inside PyTorch."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name)
    )
    with pytest.raises(cg.errors.ModelError, match=r"needs onnxscript: pip install 'clipgraft\[onnx\]'"):
        write_model(hf_clip, tmp_path / "model", "onnx")


def test_other_folders_are_not_replaced(hf_clip: Clip, tmp_path: Path) -> None:
    """Somebody's photos, or the base itself, are deleted by a wrong output path."""
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "cat.jpg").write_text("a photo")
    with pytest.raises(
        cg.errors.ModelError, match=r"holds cat\.jpg, which is no part of a transformers model"
    ):
        write_model(hf_clip, folder, "transformers")
    with pytest.raises(cg.errors.ModelError, match="is what the model was loaded from"):
        write_model(hf_clip, Path(hf_clip.source.name), "transformers")
    with pytest.raises(cg.errors.ModelError, match="is a file: the onnx form is a folder"):
        write_model(hf_clip, folder / "cat.jpg", "onnx")
    (tmp_path / "a.pt").mkdir()
    with pytest.raises(cg.errors.ModelError, match="is a folder: a checkpoint is a file"):
        write_model(hf_clip, tmp_path / "a.pt", "open_clip")
    write_model(hf_clip, tmp_path / "model", "transformers")
    with pytest.raises(
        cg.errors.ModelError, match=r"holds config\.json, which is no part of a open_clip model"
    ):
        write_model(hf_clip, tmp_path / "model", "open_clip")
    write_model(hf_clip, tmp_path / "model", "transformers")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "model", "photos"]
    assert (folder / "cat.jpg").read_text() == "a photo"


def test_adapters_and_unknown_forms_are_refused(hf_clip: Clip, tmp_path: Path) -> None:
    """A model would be written without the adapter on it, or in a form nobody asked for."""
    with pytest.raises(
        cg.errors.ModelError, match="form 'tflite' is unknown: use one of open_clip, transformers, onnx"
    ):
        write_model(hf_clip, tmp_path / "model", "tflite")  # type: ignore[arg-type]
    cg.apply_lora(hf_clip, r=2)
    with pytest.raises(cg.errors.ModelError, match="carries an adapter"):
        write_model(hf_clip, tmp_path / "model", "transformers")


def test_models_without_tokenizer_say_what_to_do(make_hf: Callable[..., nn.Module], tmp_path: Path) -> None:
    """A folder without a tokenizer would be found to be useless only where it is used."""
    with pytest.raises(cg.errors.ModelError, match=r"no tokenizer: load it with clipgraft\.load"):
        write_model(as_clip(make_hf()), tmp_path / "model", "transformers")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_folder(error: type[BaseException], tmp_path: Path) -> None:
    """A failed export would destroy the last good one, or leave half a model behind."""
    target = tmp_path / "model"
    with atomic_folder(target) as folder:
        (folder / "weights").write_text("old")

    def fail() -> None:
        with atomic_folder(target) as folder:
            (folder / "weights").write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert (target / "weights").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
    with atomic_folder(target) as folder:
        (folder / "other").write_text("new")
    assert [path.name for path in target.iterdir()] == ["other"]
    assert list(tmp_path.iterdir()) == [target]
