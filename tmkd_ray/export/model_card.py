"""The model card: what the student is, what was measured of it, how to run it."""

from tmkd_ray.export.record import ExportRecord

_FIGURES = {
    "test_accuracy": "test images, top-1",
    "test_top5_accuracy": "test images, top-5",
    "test_ece": "test images, expected calibration error",
    "zero_shot_validation_accuracy": "validation images, top-1, zero-shot by CLIP's texts",
    "validation_accuracy": "validation images, top-1 (they chose the epoch, so a little optimistic)",
}

_MAX_CLASSES = 200
"""More class names are left to config.json."""


def model_card(record: ExportRecord) -> str:
    """Return the README.md of a Hugging Face folder."""
    library = {"transformers": "transformers", "torchvision": "torchvision"}.get(
        record.model.partition("/")[0], "tmkd_ray"
    )
    is_classifier = record.kind == "classifier"
    kind = "Image classifier" if is_classifier else "Image encoder, trained without labels"
    title = f"{record.model} on {record.dataset}" if record.dataset else record.model
    lines = [
        "---",
        f"library_name: {library}",
        f"pipeline_tag: {'image-classification' if is_classifier else 'image-feature-extraction'}",
        "tags: [knowledge-distillation]",
        "---",
        "",
        f"# {title}",
        "",
        f"{kind}: `{record.model}`, {record.parameters:,} parameters, {record.image_size}×{record.image_size} "
        f"pixels, {record.output_width:,} {'classes' if is_classifier else 'features'}.",
        "",
        *_origin(record),
        "## Measured",
        "",
        *_figures(record),
        "## Preprocessing",
        "",
        f"{record.preprocessing[0].upper()}{record.preprocessing[1:]}.",
        f"mean {list(record.mean)}, std {list(record.std)} of RGB in [0, 1].",
        "",
        "`preprocessor_config.json` is transformers' description of it. It differs in one point: transformers "
        "scales bicubically also when shrinking. The figures above were measured with means over areas; images "
        "that have the right size already come out the same.",
        "",
        "## Use",
        "",
        *_usage(record),
    ]
    if record.class_names:
        lines += ["", "## Classes", "", *_classes(record)]
    return "\n".join(lines) + "\n"


def _origin(record: ExportRecord) -> list[str]:
    facts = {
        "run": record.run,
        "method": record.method,
        "seed": record.seed,
        "epoch kept": record.best_epoch,
        "data": record.dataset,
    }
    told = ", ".join(f"{name} {_plain(str(value))}" for name, value in facts.items() if value is not None)
    return [f"Trained by tmkd-ray: {told}.", ""] if told else []


def _figures(record: ExportRecord) -> list[str]:
    known = [name for name in _FIGURES if name in record.figures]
    if not known:
        return ["Nothing was measured of it.", ""]
    rows = [f"| {_FIGURES[name]} | {100 * record.figures[name]:.2f} % |" for name in known]
    return ["| on | figure |", "|---|---:|", *rows, ""]


def _usage(record: ExportRecord) -> list[str]:
    ours = [
        "With `pip install tmkd-ray`, from the folder that holds this card:",
        "",
        "```python",
        "from tmkd_ray.export import load_exported",
        "",
        'model = load_exported(".")',
        "outputs = model(images)  # uint8 RGB [N, H, W, 3] in the model's size → "
        f"[N, {record.output_width}] {record.output_name}",
        "```",
        "",
        "or `tmkd predict . IMAGES`" if record.kind == "classifier" else "or `tmkd predict --json . IMAGES`",
    ]
    source, _, name = record.model.partition("/")
    if source == "transformers":
        theirs = [
            "```python",
            "from transformers import AutoModelForImageClassification",
            "",
            'model = AutoModelForImageClassification.from_pretrained(".").eval()',
            "logits = model(pixel_values).logits  # float32 [N, 3, H, W], preprocessed",
            "```",
        ]
        return [*theirs, "", *ours]
    if source == "torchvision":
        options = {"googlenet": ", aux_logits=False, transform_input=True, init_weights=False"}
        options["inception_v3"] = options["googlenet"]
        extra = options.get(name, "")
        if name.startswith("vit_"):
            extra = f", image_size={record.image_size}"
        if name.startswith("maxvit"):
            extra = f", input_size=({record.image_size}, {record.image_size})"
        is_encoder = record.kind == "encoder"
        classes = "" if is_encoder else f", num_classes={record.output_width}"
        theirs = [
            "```python",
            "import torchvision",
            "from safetensors.torch import load_file",
            "",
            f'network = torchvision.models.get_model("{name}", weights=None{classes}{extra}).eval()',
            f'network.load_state_dict(load_file("model.safetensors"){", strict=False" if is_encoder else ""})',
            "outputs = network(pixel_values)  # float32 [N, 3, H, W], preprocessed",
            "```",
        ]
        if is_encoder:
            theirs += ["", "Its classifier is not in the file: it was never trained."]
        return [*theirs, "", *ours]
    return [f"No other library has this network: `{record.model}` is the CIFAR zoo's of tmkd-ray.", "", *ours]


def _classes(record: ExportRecord) -> list[str]:
    names = record.class_names
    if len(names) > _MAX_CLASSES:
        return [f"{len(names):,}, see `id2label` in config.json."]
    return [", ".join(f"{label} {_plain(name)}" for label, name in enumerate(names)) + "."]


def _plain(text: str) -> str:
    """Return text that Markdown does not read as markup."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in " ".join(text.split()))
