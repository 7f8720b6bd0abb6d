"""CLIP in transformers' format: made, saved, loaded, and what it says of images and texts."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from tmkd_ray.errors import UserError
from tmkd_ray.teachers import ClipTeacher
from tmkd_ray.teachers.clip import MAX_TOKENS, train_tokenizer

REAL_TOKENIZER = Path(__file__).parents[2].parent / "shared" / "data" / "clip"
SIZE, E = 16, 24
MEAN, STD = (0.48, 0.45, 0.4), (0.26, 0.27, 0.28)
PROMPTS = (("a photo of a {}.", "the {}, drawn by hand."), ("an image of a {} with sharp edges.",))
NAMES = ("zero", "one", "two", "three hundred", "fünf")
TEXTS = [template.format(name) for templates in PROMPTS for template in templates for name in NAMES]


def build(seed: int = 0, **changes: Any) -> ClipTeacher:
    fields: dict[str, Any] = {
        "image_size": SIZE,
        "patch_size": 4,
        "embedding_width": E,
        "vision_width": 32,
        "vision_layers": 2,
        "text_width": 16,
        "text_layers": 2,
        "head_width": 8,
        "vocabulary_size": 560,
        "mean": MEAN,
        "std": STD,
    }
    torch.manual_seed(seed)
    return ClipTeacher.new(TEXTS, **{**fields, **changes}).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def clip() -> ClipTeacher:
    return build()


@pytest.fixture(scope="module")
def saved(clip: ClipTeacher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of it; copy it before changing anything."""
    folder = tmp_path_factory.mktemp("clip")
    clip.save(str(folder))
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "clip"))


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Uint8 [12, SIZE, SIZE, 3], smooth enough to be resized."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (12, 4, 4, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(image).resize((SIZE, SIZE))) for image in coarse])


def test_embeddings_of_images(clip: ClipTeacher, images: np.ndarray) -> None:
    embedding = clip.encode_images(torch.from_numpy(images))
    assert (embedding.dtype, embedding.shape) == (torch.float32, (12, E))
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(12))
    assert embedding.std(dim=0).max() > 0.01, "they differ"
    channels_first = clip.encode_images(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    torch.testing.assert_close(channels_first, embedding, rtol=0, atol=1e-6)


def test_as_transformers_says(saved: Path, clip: ClipTeacher, images: np.ndarray) -> None:
    """transformers' own model and processor, on the folder, as a stranger to this package would use it."""
    processor = transformers.CLIPProcessor.from_pretrained(saved)
    model = transformers.CLIPModel.from_pretrained(saved).eval()
    pictures = [Image.fromarray(image) for image in images]
    inputs = processor(text=TEXTS, images=pictures, return_tensors="pt", padding=True)
    with torch.inference_mode():
        output = model(**inputs)
    torch.testing.assert_close(
        clip.encode_images(torch.from_numpy(images)), output.image_embeds, rtol=0, atol=1e-5
    )
    tokens = clip.tokenize(TEXTS)
    assert torch.equal(tokens["input_ids"], inputs["input_ids"])
    torch.testing.assert_close(clip.encode_texts(tokens), output.text_embeds, rtol=0, atol=1e-5)
    scale = output.logits_per_image / (output.image_embeds @ output.text_embeds.T)
    assert 1 / clip.temperature == pytest.approx(scale.mean().item(), rel=1e-4)


@pytest.mark.parametrize("size", [11, 32])
def test_images_of_another_size(size: int, saved: Path, clip: ClipTeacher, images: np.ndarray) -> None:
    """They are resized as transformers does it, bicubic; its rounding to whole pixel values aside."""
    pictures = [Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC) for image in images]
    processor = transformers.CLIPProcessor.from_pretrained(saved)
    model = transformers.CLIPModel.from_pretrained(saved).eval()
    inputs = processor(text=TEXTS[:1], images=pictures, return_tensors="pt", padding=True)
    with torch.inference_mode():
        expected = model(**inputs).image_embeds
    found = clip.encode_images(torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])))
    assert (found * expected).sum(1).min() > 0.999


def test_text_bank_by_the_formula(clip: ClipTeacher) -> None:
    """The mean over a view's prompts of unit embeddings, at unit length; each text encoded by itself."""
    bank = clip.text_bank(PROMPTS, NAMES)
    assert (bank.dtype, bank.shape) == (torch.float32, (2, 5, E))
    for v, templates in enumerate(PROMPTS):
        for c, name in enumerate(NAMES):
            mean = np.zeros(E)
            for template in templates:
                tokens = clip.tokenizer(template.format(name), return_tensors="pt")
                output = clip.model.get_text_features(**tokens)
                embedding = getattr(output, "pooler_output", output)[0].double().numpy()
                mean += embedding / np.linalg.norm(embedding) / len(templates)
            np.testing.assert_allclose(bank[v, c], mean / np.linalg.norm(mean), atol=1e-6)


def test_text_bank_of_many_classes(clip: ClipTeacher) -> None:
    """More than are encoded at once: every class has its own row, whatever its neighbours."""
    names = tuple(f"class {number}" for number in range(300))
    bank = clip.text_bank(PROMPTS, names)
    assert bank.shape == (2, 300, E)
    for number in (0, 255, 256, 299):
        alone = clip.text_bank(PROMPTS, names[number : number + 1])
        torch.testing.assert_close(bank[:, number], alone[:, 0], rtol=0, atol=1e-6)


def test_text_bank_can_be_trained_with() -> None:
    """It is made in inference mode, but is an ordinary tensor."""
    bank = build().text_bank(PROMPTS, NAMES)
    weight = torch.ones(E, requires_grad=True)
    (bank @ weight).sum().backward()
    assert weight.grad is not None


def test_padding_does_not_change_a_text(clip: ClipTeacher) -> None:
    together = clip.encode_texts(clip.tokenize(["a", "a photo of a three hundred, drawn by hand."]))
    torch.testing.assert_close(together[:1], clip.encode_texts(clip.tokenize(["a"])), rtol=0, atol=1e-6)


def test_long_texts_are_cut(clip: ClipTeacher) -> None:
    """At the length of the position embeddings; the end token stays, since CLIP reads the text there."""
    limit = clip.model.config.text_config.max_position_embeddings
    tokens = clip.tokenize(["zero " * 200])["input_ids"]
    assert tokens.shape == (1, limit)
    assert tokens[0, -1] == clip.tokenizer.eos_token_id
    assert limit <= MAX_TOKENS
    assert torch.isfinite(clip.encode_texts(clip.tokenize(["zero " * 200]))).all()


def test_saved_and_loaded(clip: ClipTeacher, saved: Path, images: np.ndarray) -> None:
    loaded = ClipTeacher.load(str(saved))
    pixels = torch.from_numpy(images)
    assert torch.equal(loaded.encode_images(pixels), clip.encode_images(pixels))
    assert torch.equal(loaded.text_bank(PROMPTS, NAMES), clip.text_bank(PROMPTS, NAMES))
    assert loaded.tokenizer.get_vocab() == clip.tokenizer.get_vocab()
    assert loaded.fingerprint() == clip.fingerprint()
    assert loaded.text_fingerprint() == clip.text_fingerprint()
    assert loaded.temperature == clip.temperature
    assert (loaded.image_size, loaded.embedding_width) == (SIZE, E)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_half_precision_weights_are_widened(folder: Path, clip: ClipTeacher, images: np.ndarray) -> None:
    transformers.CLIPModel.from_pretrained(folder).half().save_pretrained(folder)
    loaded = ClipTeacher.load(str(folder))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    pixels = torch.from_numpy(images)
    torch.testing.assert_close(loaded.encode_images(pixels), clip.encode_images(pixels), rtol=0, atol=5e-3)


def test_fingerprints() -> None:
    """The image tower's changes with what image embeddings depend on, the text tower's with the rest."""
    clip = build()
    image, text = clip.fingerprint(), clip.text_fingerprint()
    assert (build().fingerprint(), build().text_fingerprint()) == (image, text)
    state = clip.model.state_dict()
    for name in ("vision_model.embeddings.class_embedding", "visual_projection.weight"):
        other = build()
        other.model.state_dict()[name].view(-1)[0] += 1
        assert other.fingerprint() != image
        assert other.text_fingerprint() == text
        assert name in state
    for name in ("text_projection.weight", "text_model.final_layer_norm.bias"):
        other = build()
        other.model.state_dict()[name].view(-1)[0] += 1
        assert other.fingerprint() == image
        assert other.text_fingerprint() != text
    assert build(mean=(0.5, 0.5, 0.5)).fingerprint() != image
    other = build()
    other.tokenizer.add_tokens(["<new>"])
    assert (other.fingerprint() == image, other.text_fingerprint() == text) == (True, False)
    with torch.no_grad():
        other.model.logit_scale += 1
    assert other.fingerprint() == image


def test_temperature() -> None:
    clip = build()
    clip.model.logit_scale.fill_(np.log(50.0))
    assert clip.temperature == pytest.approx(0.02)


def without(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


def half_of(name: str) -> Callable[[Path], Any]:
    def cut(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return cut


def another_width(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "projection_dim": 48}))


def another_model(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16
    )
    transformers.ViTModel(config).save_pretrained(folder)


def without_text_tower(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in state.items() if not name.startswith("text_model.encoder")}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def another_tokenizer(folder: Path) -> None:
    others = [
        "the tokenizer of another checkpoint, which has learnt considerably more merges than there are rows"
    ]
    train_tokenizer(others, 10_000).save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (shutil.rmtree, "cannot load a CLIP"),
        (without("config.json"), "cannot load a CLIP"),
        (without("model.safetensors"), "cannot load a CLIP"),
        (without("preprocessor_config.json"), "cannot load a CLIP"),
        (without("tokenizer.json"), "tokenizer"),
        (half_of("config.json"), "cannot load a CLIP"),
        (half_of("model.safetensors"), "cannot load a CLIP"),
        (half_of("tokenizer.json"), "cannot load a CLIP"),
        (half_of("preprocessor_config.json"), "cannot load a CLIP"),
        (another_width, "cannot load a CLIP"),
        (another_model, "is a ViTModel, not a CLIP"),
        (without_text_tower, r"lacks the weights text_model\.encoder"),
        (another_tokenizer, r"has \d+ tokens, its text tower 560"),
    ],
)
def test_what_is_no_clip(damage: Callable[[Path], Any], reason: str, folder: Path) -> None:
    """Each is refused by the option's name and the folder; none is loaded with random parts."""
    damage(folder)
    with pytest.raises(UserError, match=reason) as caught:
        ClipTeacher.load(str(folder))
    assert str(caught.value).startswith("teacher.text.model: ")
    assert str(folder) in str(caught.value)


def test_a_file_is_no_clip(saved: Path) -> None:
    with pytest.raises(UserError, match="cannot load a CLIP"):
        ClipTeacher.load(str(saved / "config.json"))


def test_home_folder(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(saved.parent))
    assert ClipTeacher.load(f"~/{saved.name}").image_size == SIZE


def test_merges_by_hand() -> None:
    """`low` 5 times, `lower` 2, `newest` 6, `widest` 3: the example of Sennrich et al. 2016, section 3.2; of
    pairs that are equally frequent the first in the alphabet is merged."""
    tokenizer = train_tokenizer(["low"] * 5 + ["lower"] * 2 + ["newest"] * 6 + ["widest"] * 3, 514 + 5)
    learnt = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])[514:]
    assert learnt == [
        ("es", 514),  # 9 times, as often as "s t</w>"
        ("est</w>", 515),
        ("lo", 516),
        ("ew", 517),  # 6 times, as often as "ne", "w est</w>"
        ("ewest</w>", 518),
    ]
    assert tokenizer.tokenize("lowest") == ["lo", "w", "est</w>"]
    assert tokenizer.tokenize("newest") == ["n", "ewest</w>"]


def test_any_text_has_tokens() -> None:
    tokenizer = train_tokenizer(["a b c"], 600)
    unknown = tokenizer.convert_tokens_to_ids(tokenizer.unk_token)
    text = "Ünïcödé 猫 ⊕ ~#"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert unknown not in ids
    assert tokenizer.decode(ids).replace(" ", "") == text.lower().replace(" ", "")


@pytest.mark.parametrize("size", [10, 514, 520, 10_000])
def test_size_of_the_vocabulary(size: int) -> None:
    """Bytes always have their tokens; no more merges than the texts have; ids without a gap."""
    vocabulary = train_tokenizer(TEXTS, size).get_vocab()
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    if size <= 520:
        assert len(vocabulary) == max(size, 514)
    else:
        assert 520 < len(vocabulary) < 700


def test_tokens_are_the_same_in_another_process() -> None:
    """Each worker builds its own tokenizer, and Python and Rust hash strings differently in every process."""
    code = (
        "import sys, json; from tmkd_ray.teachers.clip import train_tokenizer; "
        "print(json.dumps(train_tokenizer(json.loads(sys.argv[1]), 560).get_vocab()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(TEXTS)], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == train_tokenizer(TEXTS, 560).get_vocab()


@pytest.fixture
def with_real_tokenizer(tmp_path: Path) -> ClipTeacher:
    """A folder like a published CLIP's, its own tokenizer files and preprocessing, with small random towers."""
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(REAL_TOKENIZER / name, tmp_path / name)
    shutil.copy(REAL_TOKENIZER / "preprocessor_config.json", tmp_path / "preprocessor_config.json")
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**tower, "projection_dim": 8},
        vision_config={**tower, "image_size": 224, "patch_size": 32, "projection_dim": 8},
        projection_dim=8,
    )
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    return ClipTeacher.load(str(tmp_path))


@pytest.mark.data
@pytest.mark.skipif(not REAL_TOKENIZER.is_dir(), reason="needs ../shared/data/clip")
def test_with_clips_own_tokenizer(with_real_tokenizer: ClipTeacher) -> None:
    clip = with_real_tokenizer
    tokens = clip.tokenize(["a photo of a cat"])
    assert tokens["input_ids"].tolist() == [[49406, 320, 1125, 539, 320, 2368, 49407]]
    padded = clip.tokenize(["a photo of a cat", "A  photo\nof an aquarium fish, swimming."])
    assert padded["input_ids"][0, :7].tolist() == tokens["input_ids"][0].tolist()
    assert padded["attention_mask"].sum(1).tolist()[0] == 7
    assert clip.tokenize(["word " * 100])["input_ids"].shape == (1, 77)
    assert clip.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    assert clip.std == pytest.approx((0.26862954, 0.26130258, 0.27577711))
    bank = clip.text_bank([["a photo of a {}."]], ["cat", "aquarium fish"])
    assert bank.shape == (1, 2, 8)
    small = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    assert clip.encode_images(small).shape == (2, 8)
