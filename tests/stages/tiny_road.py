"""A road that takes seconds: overrides of the default configuration.

Each process that Ray starts costs seconds, most of them to import PyTorch: one of each, except where a test is
about several.
"""

TINY = [
    "dataset=digits",
    "dataset.limit=240",
    "name=tiny",
    "teacher.visual.model=resnet8",
    "teacher.visual.fit.epochs=2",
    "teacher.text.fit.epochs=2",
    "teacher.visual.fit.num_workers=1",
    "teacher.text.fit.num_workers=1",
    "teacher.text.architecture={patch_size: 8, vision_layers: 1, vision_width: 32, text_layers: 1, "
    "text_width: 32, embedding_width: 16}",
    "knowledge.num_variants=2",
    "knowledge.shard_rows=64",
    "knowledge.visual.batch_size=64",
    "knowledge.text.batch_size=64",
    "knowledge.views.max_size=1",
    "training.epochs=3",
    "training.num_workers=1",
    "training.labels_per_class=5",
    "methods={alone: alone, kd: kd, tmkd: tmkd}",
    "seeds=[0, 1]",
    "report.num_images=60",
]

TWO_OF_EACH = [
    "teacher.visual.fit.num_workers=2",
    "teacher.text.fit.num_workers=2",
    "knowledge.views.max_size=2",
    "training.num_workers=2",
]
"""What the whole road is gone with; it changes nothing of what is learnt."""
