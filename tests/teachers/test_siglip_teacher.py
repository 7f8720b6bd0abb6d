"""SigLIP as the text teacher: a small random one, in the folder that `save_pretrained` writes."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from tmkd_ray.teachers import ClipTeacher
from tmkd_ray.teachers.clip import train_tokenizer

SIZE, WIDTH, TOKENS = 16, 24, 20
NAMES = ("zero", "one", "two")
TEXTS = tuple(f"a photo of a {name}." for name in NAMES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("siglip")
    tokenizer = train_tokenizer(TEXTS, 560)
    torch.manual_seed(0)
    shared = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.SiglipConfig(
        text_config={
            **shared,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": TOKENS,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**shared, "image_size": SIZE, "patch_size": 4},
    )
    transformers.SiglipModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = transformers.SiglipImageProcessor(size={"height": SIZE, "width": SIZE}, image_mean=[0.5] * 3)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def siglip(folder: Path) -> ClipTeacher:
    return ClipTeacher.load(str(folder))


def test_as_transformers_says(folder: Path, siglip: ClipTeacher) -> None:
    """transformers' own model on texts filled up to the context length, as SigLIP was trained."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, SIZE, SIZE, 3), dtype=np.uint8)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    pixels = processor([Image.fromarray(image) for image in images], return_tensors="pt").pixel_values
    model = transformers.SiglipModel.from_pretrained(folder).eval()
    tokens = tokenizer(list(TEXTS), padding="max_length", max_length=TOKENS, return_tensors="pt")
    with torch.inference_mode():
        output = model(input_ids=tokens.input_ids, pixel_values=pixels)
    found = siglip.tokenize(TEXTS)
    assert set(found) == {"input_ids"}
    assert found["input_ids"].shape == (len(NAMES), TOKENS)
    torch.testing.assert_close(siglip.encode_texts(found), output.text_embeds, rtol=0, atol=1e-5)
    embedding = siglip.encode_images(torch.from_numpy(images))
    torch.testing.assert_close(embedding, output.image_embeds, rtol=0, atol=1e-5)
    # Its logits are the cosines times the scale, and a bias, which a softmax does not see.
    ours = embedding @ output.text_embeds.T / siglip.temperature
    torch.testing.assert_close(ours.softmax(1), output.logits_per_image.softmax(1), rtol=0, atol=1e-5)


def test_a_text_does_not_depend_on_its_neighbours(siglip: ClipTeacher) -> None:
    bank = siglip.text_bank([("a photo of a {}.", "the {}")], NAMES)
    assert bank.shape == (1, len(NAMES), WIDTH)
    alone = siglip.text_bank([("a photo of a {}.", "the {}")], NAMES[1:2])
    torch.testing.assert_close(bank[:, 1], alone[:, 0], rtol=0, atol=1e-6)


def test_its_width_and_fingerprints(folder: Path, siglip: ClipTeacher) -> None:
    assert siglip.embedding_width == WIDTH
    assert not any(parameter.requires_grad for parameter in siglip.parameters())
    image, text = siglip.fingerprint(), siglip.text_fingerprint()
    other = ClipTeacher.load(str(folder))
    with torch.no_grad():
        other.model.text_model.head.bias.add_(1.0)
    assert other.fingerprint() == image
    assert other.text_fingerprint() != text
