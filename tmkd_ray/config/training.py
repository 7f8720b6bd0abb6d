"""How a network is trained."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from tmkd_ray.settings import Precision, SectionError, Settings

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""What every random generator takes."""


def distinct(values: tuple[Any, ...]) -> bool:
    """Return whether there are values, each once."""
    return 0 < len(values) == len(set(values))


class TrainingConfig(Settings, allow_inf_nan=False):
    """How one network is trained: the student, the visual teacher, or CLIP.

    `batch_size` is global: it is divided among the workers, so that their number changes neither batch nor
    schedule (batch normalisation, mixup and cutmix, though, see each worker's part).

    `gradient_accumulation` divides each worker's part further, into micro-batches that go through the network
    one after the other; their mean gradient is the same. What looks at the samples together sees a micro-batch:
    batch normalisation, mixup and cutmix, and every loss that is no mean over samples (contrast within the
    batch, relations between its samples, memory banks, which move after each micro-batch; those of LGD and SEED
    once a step).
    """

    epochs: int = Field(default=20, ge=1)
    batch_size: int = Field(default=64, ge=1)
    gradient_accumulation: int = Field(default=1, ge=1, description="micro-batches of a worker's batch")
    labels_per_class: int | None = Field(default=None, ge=1, description="few labels; null: all")
    optimizer: Literal["sgd", "adamw", "dot"] = Field(
        default="sgd", description="dot: SGD with one momentum for the task's gradient, one for the teaching's"
    )
    dot_delta: float = Field(
        default=0.075, ge=0, lt=1, description="dot: the momenta are momentum - delta and momentum + delta"
    )
    learning_rate: float = Field(default=0.05, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(default=5e-4, ge=0)
    schedule: Literal["constant", "cosine", "one_cycle", "step"] = "cosine"
    milestones: tuple[float, ...] = Field(
        default=(0.625, 0.75, 0.875),
        description="step schedule: parts of the epochs after which lr is × decay",
    )
    decay: float = Field(default=0.1, gt=0, lt=1)
    warmup_epochs: float = Field(default=0.0, ge=0, description="of one_cycle: its rising part")
    min_learning_rate_ratio: float = Field(
        default=0.0, ge=0, lt=1, description="cosine and one_cycle end at this part of learning_rate"
    )
    one_cycle_momentum: float = Field(
        default=0.85, ge=0, lt=1, description="one_cycle with sgd: momentum where the learning rate is highest"
    )
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    mixup: float = Field(default=0.0, ge=0, description="alpha of the Beta distribution; 0: none")
    cutmix: float = Field(default=0.0, ge=0, description="the same; with mixup, one of both by a coin")
    ema_decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="moving average of the weights, which is evaluated and kept; null: none",
    )
    max_gradient_norm: float | None = Field(default=None, gt=0)
    max_loss: float | None = Field(
        default=1e6,
        gt=0,
        description="of a step; beyond it the run stops as if it were infinite; null: none",
    )
    precision: Precision = "float32"
    channels_last: bool | None = Field(
        default=None, description="memory layout of the network; null: where it pays (CPU; GPU below float32)"
    )
    compile: bool = Field(
        default=False, description="the network by torch.compile, for GPUs; on CPUs it was no faster"
    )
    num_workers: int = Field(default=2, ge=1)
    min_workers: int | None = Field(
        default=None, ge=1, description="go on with as few when nodes are lost, up to num_workers; null: fixed"
    )
    num_cpus_per_worker: float = Field(default=1.0, gt=0)
    use_gpu: bool | None = Field(default=None, description="null: use GPUs when the cluster has them")
    max_failures: int = Field(default=3, ge=-1, description="restarts of a failed worker group; -1: no limit")
    checkpoint_every: int = Field(
        default=1, ge=1, description="epochs between checkpoints: what a crash can cost at most"
    )
    checkpoint_every_steps: int | None = Field(
        default=None, ge=1, description="checkpoints within an epoch too, for long ones; null: none"
    )
    keep_checkpoints: int = Field(
        default=2, ge=1, description="newest ones kept; if one is damaged, the one before it serves"
    )
    loggers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = Field(
        default=("tensorboard",), description="where the epochs' figures go as well; [] or none: nowhere"
    )
    evaluation_batch_size: int = Field(default=512, ge=1)
    seed: Seed = 0

    @field_validator("loggers", mode="before")
    @classmethod
    def _logger_names(cls, value: Any) -> Any:
        if value is None or value == "none":
            return ()
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> "TrainingConfig":
        problems = []
        fewest = self.num_workers if self.min_workers is None else self.min_workers
        if fewest > self.num_workers:
            problems.append((("min_workers",), f"{fewest} is above num_workers {self.num_workers}"))
        uneven = [str(n) for n in range(fewest, self.num_workers + 1) if self.batch_size % n]
        if uneven and self.min_workers is None:
            text = f"{self.batch_size} is not divisible by num_workers {self.num_workers}"
            problems.append((("batch_size",), text))
        elif uneven:
            text = (
                f"{self.batch_size} is not divisible by {', '.join(uneven)}, but so many workers can take "
                f"part: from min_workers {fewest} to num_workers {self.num_workers}"
            )
            problems.append((("batch_size",), text))
        local = self.batch_size // self.num_workers
        if self.gradient_accumulation > max(local, 1):
            text = f"{self.gradient_accumulation} is more than the {local} images of a worker's batch"
            problems.append((("gradient_accumulation",), text))
        if self.warmup_epochs >= self.epochs:
            text = f"{self.warmup_epochs:g} leaves nothing of the {self.epochs} epochs"
            problems.append((("warmup_epochs",), text))
        if self.schedule == "one_cycle" and self.warmup_epochs == 0:
            text = f"one_cycle rises for so long, which cannot be 0; {0.3 * self.epochs:g} is usual"
            problems.append((("warmup_epochs",), text))
        if self.nesterov and self.momentum == 0:
            problems.append((("nesterov",), "needs a momentum above zero"))
        if self.optimizer == "dot":
            if not self.dot_delta <= self.momentum < 1 - self.dot_delta:
                text = f"momentum {self.momentum:g} ± {self.dot_delta:g} leaves the range from 0 to 1"
                problems.append((("dot_delta",), text))
            refused = {
                "nesterov": self.nesterov,
                "precision": self.precision == "float16",
                "gradient_accumulation": self.gradient_accumulation > 1,
            }
            problems += [((name,), "not with optimizer dot") for name, is_set in refused.items() if is_set]
        if any(not 0 < part < 1 for part in self.milestones):
            problems.append((("milestones",), "are parts of the training, between 0 and 1"))
        if not distinct(self.loggers or (None,)):
            problems.append((("loggers",), "each once"))
        if problems:
            raise SectionError(problems)
        return self

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with one another, and so their labels."""
        return self.mixup > 0 or self.cutmix > 0


class ClipTrainingConfig(TrainingConfig):
    """How CLIP is trained: a `TrainingConfig` with the defaults that suit transformers."""

    optimizer: Literal["sgd", "adamw", "dot"] = "adamw"
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    max_gradient_norm: float | None = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _check_clip(self) -> "ClipTrainingConfig":
        problems = [((name,), _UNMIXED_CLIP) for name in ("mixup", "cutmix") if getattr(self, name) > 0]
        if self.compile:
            problems.append((("compile",), "not offered for CLIP"))
        if problems:
            raise SectionError(problems)
        return self


_UNMIXED_CLIP = "not offered for CLIP: an image has one caption, that of what is on it"
