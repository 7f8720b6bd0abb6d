"""What the frozen teachers say of the images: pools, modes, the store."""

from typing import Literal

from pydantic import Field, model_validator

from tmkd_ray.config.training import Seed
from tmkd_ray.settings import Location, Precision, SectionError, Settings


class PoolConfig(Settings, allow_inf_nan=False):
    """An actor pool of the knowledge stage. It grows from `min_size` to `max_size` with its queue."""

    min_size: int = Field(default=1, ge=1)
    max_size: int = Field(default=1, ge=1)
    num_cpus: float = Field(default=0.5, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> "PoolConfig":
        if self.max_size < self.min_size:
            raise SectionError([(("max_size",), f"{self.max_size} is below min_size {self.min_size}")])
        return self


class ViewPoolConfig(PoolConfig):
    """The actor pool that computes the views."""

    max_size: int = Field(default=2, ge=1)


class TeacherPoolConfig(PoolConfig):
    """An actor pool that runs a frozen teacher."""

    num_gpus: float | None = Field(
        default=None, ge=0, description="share of a GPU per actor; null: what the cluster's GPUs allow, up to 1"
    )
    batch_size: int = Field(default=256, ge=1, description="views per forward pass")
    precision: Precision = "float32"
    channels_last: bool = Field(default=True, description="memory format; else channels first")
    compile: bool = Field(default=False, description="by torch.compile: the first batch takes a minute more")


class KnowledgeConfig(Settings):
    """What the frozen teachers say of the images: when it is computed, where it lies, how much of it is kept.

    `mode` says when the teachers run:
        cached: once, into a store that every epoch, method and trial reads;
        streaming: for every epoch anew, in the cluster beside the training, on fresh augmentation;
        online: in the training workers, on fresh augmentation; what feature-map strategies need.
    """

    mode: Literal["cached", "streaming", "online"] = "cached"
    path: Location | None = Field(
        default=None,
        description="of the store; null: `knowledge`, or `knowledge-validation`, in the run's folder",
    )
    num_variants: int = Field(default=4, ge=1, description="stored augmentations of each training image")
    dtype: Literal["float16", "float32", "int8"] = Field(
        default="float16", description="of features and embeddings; int8 has a scale for each vector"
    )
    images: Literal["raw", "lossless", "jpeg", "reference"] = Field(
        default="lossless",
        description="how the store keeps the images; jpeg: the teachers see the compressed ones too; "
        "reference: not at all, the training reads them from the dataset",
    )
    loader: Literal["auto", "resident", "mapped", "streaming"] = Field(
        default="auto",
        description="how a cached store reaches the students: resident in each worker's memory; mapped from "
        "one copy on each machine's disk; streaming, read from such copies by actors of the cluster. "
        "auto: resident where it fits, else mapped",
    )
    node_copies: str | None = Field(
        default=None, description="folder of the copies; null: $TMKD_CACHE or the user's cache folder"
    )
    shard_rows: int = Field(default=1024, ge=1, description="images per shard")
    views: ViewPoolConfig = Field(default_factory=ViewPoolConfig)
    visual: TeacherPoolConfig = Field(default_factory=TeacherPoolConfig)
    text: TeacherPoolConfig = Field(default_factory=TeacherPoolConfig)
    seed: Seed = Field(default=0, description="of the augmentation's draws")
