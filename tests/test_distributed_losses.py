"""Two workers with half a batch each learn what one worker learns from the whole: same loss, same gradient."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from teaching_samples import CLASSES, SPEC, STUDENT_WIDTH, mapped, maps_from, normal, teacher_output
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tmkd_ray.distillers import STRATEGIES
from tmkd_ray.losses import gather_from_workers
from tmkd_ray.objective import Distiller, DistillerConfig
from tmkd_ray.training.context import PlainContext
from tmkd_ray.training.metrics import evaluate
from tmkd_ray.types import LossOutput, ModelOutput, TeacherOutput

NUM_WORKERS, BATCH, PIXELS, TEST_IMAGES = 2, 6, 10, 11


def cases() -> dict[str, dict[str, Any]]:
    """Each term beside cross-entropy, each contrast, each strategy, and everything at once, by name."""
    ce = {f"{term}_weight": 0.0 for term in ("kd", "feature", "text", "contrastive")} | {"ce_weight": 1.0}
    found = {"ce": ce} | {term: ce | {f"{term}_weight": 3.0} for term in ("feature", "text")}
    for mode in ("class", "instance", "both"):
        found[mode] = ce | {"contrastive_weight": 3.0, "contrastive_mode": mode}
    for strategy in STRATEGIES:
        if not has_batch_norm(strategy):  # its statistics are each worker's own
            found[strategy] = ce | {"kd_weight": 3.0, "strategy": strategy}
    return found | {"everything": {"name": "tmkd"}}


def has_batch_norm(strategy: str) -> bool:
    modules = STRATEGIES.get(strategy)(STRATEGIES.get(strategy).Config(), SPEC).modules()
    return any(isinstance(module, nn.BatchNorm2d) for module in modules)


class Student(nn.Module):
    """Feature and logits by one linear layer each (no batch statistics), and the objective: what DDP wraps."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Linear(PIXELS, STUDENT_WIDTH)
        self.head = nn.Linear(STUDENT_WIDTH, CLASSES)
        self.distiller = Distiller(DistillerConfig.model_validate(options), SPEC, label_smoothing=0.1)

    def forward(self, images: Tensor, teacher: TeacherOutput, labels: Tensor) -> LossOutput:
        feature = torch.tanh(self.body(images))
        student = ModelOutput(self.head(feature), feature, **maps_from(feature))
        output: LossOutput = self.distiller(student, teacher, labels)
        return output


def batch(rows: slice) -> tuple[Tensor, TeacherOutput, Tensor]:
    """Some rows of one and the same batch; the text bank is of all."""
    images = normal(torch.Generator().manual_seed(4), BATCH, PIXELS)
    teacher = TeacherOutput(**mapped(teacher_output(batch=BATCH), lambda value: value[rows]))
    return images[rows], teacher, torch.tensor([0, 3, 3, 4, 1, 3])[rows]


def step(module: nn.Module, rows: slice) -> dict[str, Any]:
    """Loss, terms and gradients of one step."""
    output = module(*batch(rows))
    output.loss.backward()
    parameters = {name.removeprefix("module."): value for name, value in module.named_parameters()}
    return {
        "loss": output.loss.item(),
        "terms": {name: value.item() for name, value in output.terms.items()},
        "gradients": {name: value.grad for name, value in parameters.items()},
    }


def labelled_images() -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """(predict, images, labels): as many images as no number of workers divides; each carries its number."""
    logits = normal(torch.Generator().manual_seed(5), TEST_IMAGES, CLASSES)
    images = torch.arange(TEST_IMAGES, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 2, 2, 3)
    labels = torch.arange(TEST_IMAGES) % CLASSES
    return lambda images_BHWC: logits[images_BHWC[:, 0, 0, 0].long()], images, labels


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=NUM_WORKERS)
    size = BATCH // NUM_WORKERS
    rows = slice(rank * size, (rank + 1) * size)
    found: dict[str, Any] = {
        name: step(DistributedDataParallel(Student(options)), rows) for name, options in cases().items()
    }
    own = (torch.arange(6.0).reshape(3, 2) + 10 * rank).requires_grad_()
    gathered, start = gather_from_workers(own.T)  # not contiguous
    found["gather"] = (gathered, start)
    for images in (TEST_IMAGES, 1):  # one image leaves the second worker without any
        predict, images_NHWC, labels_N = labelled_images()
        context = PlainContext(Path(folder), quiet=True)
        found[f"evaluate {images}"] = evaluate(predict, images_NHWC[:images], labels_N[:images], context, 4)
    torch.save(found, f"{folder}/worker-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each worker found."""
    folder = tmp_path_factory.mktemp("workers")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=NUM_WORKERS)
    return [torch.load(folder / f"worker-{rank}.pt", weights_only=True) for rank in range(NUM_WORKERS)]


@pytest.mark.parametrize("case", cases())
def test_two_workers_learn_what_one_does(workers: list[dict[str, Any]], case: str) -> None:
    alone = step(Student(cases()[case]), slice(None))
    each = [worker[case] for worker in workers]
    assert alone["loss"] == pytest.approx(sum(found["loss"] for found in each) / NUM_WORKERS, rel=1e-5)
    for name, value in alone["terms"].items():
        assert value == pytest.approx(sum(found["terms"][name] for found in each) / NUM_WORKERS, rel=1e-5)
    for found in each:
        assert found["gradients"].keys() == alone["gradients"].keys()
        for name, gradient in alone["gradients"].items():
            atol = 1e-6 * max(1.0, gradient.abs().max().item())  # some strategies' weights are large
            torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-4, atol=atol)
    assert alone["gradients"]["body.weight"].abs().max() > 1e-4


def test_gathering_keeps_the_order_of_the_ranks(workers: list[dict[str, Any]]) -> None:
    own = torch.arange(6.0).reshape(3, 2).T
    for rank, worker in enumerate(workers):
        gathered, start = worker["gather"]
        assert torch.equal(gathered, torch.cat([own, own + 10]))
        assert start == 2 * rank
        assert not gathered.requires_grad


@pytest.mark.parametrize("images", [TEST_IMAGES, 1])
def test_two_workers_count_each_image_once(tmp_path: Path, workers: list[dict[str, Any]], images: int) -> None:
    predict, images_NHWC, labels_N = labelled_images()
    alone = evaluate(predict, images_NHWC[:images], labels_N[:images], PlainContext(tmp_path), 4)
    for worker in workers:
        assert worker[f"evaluate {images}"] == pytest.approx(alone, rel=1e-6)
