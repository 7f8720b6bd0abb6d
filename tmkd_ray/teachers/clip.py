"""CLIP (or SigLIP), the text teacher: Radford et al. 2021, arXiv 2103.00020, in transformers' format.

transformers takes about a second to import, and every worker imports this module, with a CLIP or without: the
functions that use it import it.
"""

import contextlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from tmkd_ray import storage
from tmkd_ray.errors import UserError
from tmkd_ray.settings import ImageStatistics
from tmkd_ray.teachers.passes import count_pass
from tmkd_ray.teachers.pixels import Normalize, weights_fingerprint

MAX_TOKENS = 77
"""CLIP's context length."""

_UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, SafetensorError, UnpicklingError)
"""What transformers raises on files that are missing, damaged, or of something else."""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars while weights are read or written: they come once per actor."""
    import transformers

    was_on = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            transformers.utils.logging.enable_progress_bar()


def _tensor(output: Any) -> Tensor:
    """The projected embedding, which transformers returns bare or as the pooler output."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _is_siglip(config: Any) -> bool:
    return str(config.model_type).startswith("siglip")


def _embedding_width(config: Any) -> int:
    """Return E, as CLIP or SigLIP tells it; 0 if the configuration is of neither."""
    if _is_siglip(config):
        return int(getattr(config.text_config, "projection_size", 0))
    return int(getattr(config, "projection_dim", 0))


class ClipTeacher(nn.Module):
    """A CLIP model with its tokenizer and image preprocessing.

    SigLIP (Zhai et al. 2023, arXiv 2303.15343) will do as well: the cosines are all that is used of it. Its own
    sigmoid is not; what is softened by a softmax has its logit scale without the bias, which cancels.

    Args:
        model: transformers' CLIPModel or SiglipModel, or one with the same `get_image_features` and
            `get_text_features`.
        image_size: input height and width, in pixels.
        mean, std: of its image preprocessing.
    """

    def __init__(
        self, model: Any, tokenizer: Any, image_size: int, mean: ImageStatistics, std: ImageStatistics
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.mean, self.std = mean, std
        self.normalize = Normalize(mean, std)

    @classmethod
    def load(cls, name_or_folder: str) -> "ClipTeacher":
        """Load a CLIP by name or folder, frozen.

        Raises:
            UserError: it cannot be found or is not a CLIP.
        """
        with storage.local_copy(name_or_folder) as path:
            return cls._load_local(path, name_or_folder)

    @classmethod
    def _load_local(cls, path: str, name_or_folder: str) -> "ClipTeacher":
        import transformers

        try:
            with _quiet():
                model, loading = transformers.AutoModel.from_pretrained(
                    path, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
                )
                tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
                processor = transformers.AutoImageProcessor.from_pretrained(path, trust_remote_code=False)
        except _UNREADABLE as error:
            where = "folder" if os.path.isdir(path) else "folder or model name"
            raise UserError(
                f"teacher.text.model: cannot load a CLIP from the {where} {name_or_folder!r}: {error}"
            ) from error
        needed = ("get_image_features", "get_text_features", "logit_scale")
        if not all(hasattr(model, name) for name in needed) or not _embedding_width(model.config):
            raise UserError(f"teacher.text.model: {name_or_folder!r} is a {type(model).__name__}, not a CLIP")
        if loading["missing_keys"]:
            raise UserError(
                f"teacher.text.model: {name_or_folder!r} lacks the weights "
                f"{', '.join(sorted(loading['missing_keys'])[:5])}; give a CLIP with both its towers"
            )
        # Without its files a tokenizer is loaded that knows no words; padding the vocabulary is common.
        vocabulary = model.config.text_config.vocab_size
        if not len(set(tokenizer.all_special_ids)) < len(tokenizer) <= vocabulary:
            raise UserError(
                f"teacher.text.model: the tokenizer of {name_or_folder!r} has {len(tokenizer)} tokens, its "
                f"text tower {vocabulary}; is its own tokenizer.json, or vocab.json and merges.txt, there?"
            )
        size = model.config.vision_config.image_size
        teacher = cls(model, tokenizer, size, tuple(processor.image_mean), tuple(processor.image_std))
        return teacher.eval().requires_grad_(False)

    @classmethod
    def new(
        cls,
        texts: Sequence[str],
        *,
        image_size: int,
        patch_size: int,
        embedding_width: int,
        vision_width: int,
        vision_layers: int,
        text_width: int,
        text_layers: int,
        head_width: int,
        vocabulary_size: int,
        mean: ImageStatistics,
        std: ImageStatistics,
    ) -> "ClipTeacher":
        """Build an untrained small CLIP whose tokenizer (byte-pair encoding) is trained on `texts`."""
        import transformers

        tokenizer = train_tokenizer(texts, vocabulary_size)
        longest = max(len(ids) for ids in tokenizer(list(texts)).input_ids)
        shared = {"projection_dim": embedding_width}
        config = transformers.CLIPConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": text_width,
                "intermediate_size": 4 * text_width,
                "num_hidden_layers": text_layers,
                "num_attention_heads": text_width // head_width,
                "max_position_embeddings": min(MAX_TOKENS, longest + 8),
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
                **shared,
            },
            vision_config={
                "hidden_size": vision_width,
                "intermediate_size": 4 * vision_width,
                "num_hidden_layers": vision_layers,
                "num_attention_heads": vision_width // head_width,
                "image_size": image_size,
                "patch_size": patch_size,
                **shared,
            },
            **shared,
        )
        return cls(transformers.CLIPModel(config), tokenizer, image_size, mean, std)

    def save(self, folder: str) -> None:
        """Write model, tokenizer and preprocessing so that `from_pretrained(folder)` reads them."""
        import transformers

        processor = transformers.CLIPImageProcessor(
            size={"height": self.image_size, "width": self.image_size},
            do_center_crop=False,
            image_mean=list(self.mean),
            image_std=list(self.std),
        )
        with _quiet():
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            processor.save_pretrained(folder)

    @property
    def embedding_width(self) -> int:
        return _embedding_width(self.model.config)

    @property
    def temperature(self) -> float:
        """1 / exp(logit_scale): the temperature CLIP was trained with."""
        return float(torch.exp(-self.model.logit_scale.detach().float()))

    def fingerprint(self) -> str:
        """Return the SHA-256 of the weights and preprocessing that the image embeddings depend on."""
        state = {k: v for k, v in self.model.state_dict().items() if not k.startswith(("text", "logit"))}
        state["preprocessing"] = torch.tensor([self.image_size, *self.mean, *self.std])
        return weights_fingerprint(state)

    def text_fingerprint(self) -> str:
        """Return the SHA-256 of the text tower's weights and the tokenizer's vocabulary."""
        state = {k: v for k, v in self.model.state_dict().items() if k.startswith(("text", "logit"))}
        vocabulary = json.dumps(self.tokenizer.get_vocab(), sort_keys=True).encode()
        state["vocabulary"] = torch.frombuffer(bytearray(vocabulary), dtype=torch.uint8)
        return weights_fingerprint(state)

    def encode_images(self, images_BHWC: Tensor) -> Tensor:
        """Return float32 [B, E], unit length, of uint8 images (resized to the model's input size)."""
        count_pass()
        images = self.normalize(images_BHWC)
        if images.shape[-1] != self.image_size:
            images = F.interpolate(
                images, size=(self.image_size, self.image_size), mode="bicubic", antialias=True
            )
        embedding_BE = _tensor(self.model.get_image_features(pixel_values=images)).float()
        return F.normalize(embedding_BE, dim=1)

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return `input_ids` and `attention_mask`, [len(texts), tokens], padded to the longest.

        For SigLIP, `input_ids` alone, padded to its context length.
        """
        limit = self.model.config.text_config.max_position_embeddings
        # SigLIP was trained on texts filled up to its context length, the filling unmasked.
        is_siglip = _is_siglip(self.model.config)
        tokens = self.tokenizer(
            list(texts),
            padding="max_length" if is_siglip else True,
            truncation=True,
            max_length=limit,
            return_tensors="pt",
        )
        names = ("input_ids",) if is_siglip else ("input_ids", "attention_mask")
        return {name: tokens[name] for name in names}

    def encode_texts(self, tokens: Mapping[str, Tensor]) -> Tensor:
        """Return float32 [texts, E], unit length."""
        count_pass()
        return F.normalize(_tensor(self.model.get_text_features(**tokens)).float(), dim=1)

    @torch.no_grad()
    def text_bank(self, prompts: Sequence[Sequence[str]], class_names: Sequence[str]) -> Tensor:
        """Return the text bank [V, C, E]: mean over a view's prompts of unit embeddings, unit length.

        Args:
            prompts: for each of V views its templates, each with one `{}` for the class name.
        """
        device = self.normalize.scale.device
        bank = []
        for templates in prompts:
            sums_CE = torch.zeros(len(class_names), self.embedding_width, device=device)
            for template in templates:
                for start in range(0, len(class_names), 256):
                    texts = [template.format(name) for name in class_names[start : start + 256]]
                    tokens = {k: v.to(device) for k, v in self.tokenize(texts).items()}
                    sums_CE[start : start + 256] += self.encode_texts(tokens)
            bank.append(F.normalize(sums_CE, dim=1))
        return torch.stack(bank)


def train_tokenizer(texts: Sequence[str], vocabulary_size: int) -> Any:
    """Return a CLIPTokenizer whose byte-pair merges are learnt from `texts`: the same in every process.

    Every byte has its tokens, so any text can be encoded; merges are learnt until the vocabulary is full or no
    pair is left. Source: Sennrich et al. 2016, "Neural machine translation of rare words with subword units",
    arXiv 1508.07909, algorithm 1. (The tokenizers library's own trainer numbers tokens and breaks ties in the
    order of a hash table, so that no two workers would agree on what a token means.)
    """
    import transformers
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = ["<|startoftext|>", "<|endoftext|>", *alphabet, *(f"{symbol}</w>" for symbol in alphabet)]
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    blank = transformers.CLIPTokenizer(
        vocab=vocabulary, merges=[], model_max_length=MAX_TOKENS
    ).backend_tokenizer
    counts = Counter(
        word
        for text in texts
        for word, _ in blank.pre_tokenizer.pre_tokenize_str(blank.normalizer.normalize_str(text))
    )
    words = [([*word[:-1], f"{word[-1]}</w>"], count) for word, count in counts.items()]
    merges: list[tuple[str, str]] = []
    while len(vocabulary) < vocabulary_size:
        pairs: Counter[tuple[str, str]] = Counter()
        for parts, count in words:
            for pair in itertools.pairwise(parts):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        vocabulary.setdefault("".join(best), len(vocabulary))
        for parts, _ in words:
            _merge(parts, best)
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def _merge(parts: list[str], pair: tuple[str, str]) -> None:
    """Join every occurrence of the pair, from left to right, in place."""
    i = 0
    while i < len(parts) - 1:
        if (parts[i], parts[i + 1]) == pair:
            parts[i : i + 2] = ["".join(pair)]
        i += 1
