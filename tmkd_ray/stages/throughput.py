"""How fast each stage of the knowledge's pipeline could go, and which one holds the others back."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tmkd_ray.config import KnowledgeConfig
from tmkd_ray.knowledge.compute import STAGES, ClipStage, VisualStage

STAGE_NAMES = {
    "views": "views",
    "feature": "visual teacher",
    "clip_embedding": "CLIP",
    "write": "writing",
}


def pool_sizes(pools: KnowledgeConfig) -> dict[str, int]:
    """Return how many actors each stage has at most."""
    return {
        "views": pools.views.max_size,
        VisualStage.column: pools.visual.max_size,
        ClipStage.column: pools.text.max_size,
    }


@dataclass
class StageTimes:
    """How long each stage worked on what passed.

    Attributes:
        actors: by stage, at most.
        seconds: by stage, all actors together; `variants`: image variants that passed.
    """

    actors: dict[str, int]
    seconds: dict[str, float] = field(default_factory=dict)
    variants: int = 0

    def add(self, row: Mapping[str, float], variants: int) -> None:
        """Count what passed, with the seconds that each stage noted of it."""
        self.variants += variants
        for stage in STAGES:
            if f"{stage}_seconds" in row:
                self.seconds[stage] = self.seconds.get(stage, 0.0) + row[f"{stage}_seconds"]

    def throughput(self) -> dict[str, float]:
        """Return the image variants a second that each stage's pool could do if it never waited."""
        return {
            stage: self.actors[stage] * self.variants / seconds
            for stage, seconds in self.seconds.items()
            if seconds > 0
        }

    def lines(self) -> list[str]:
        """Say each stage's throughput, and which one holds the others back."""
        throughput = self.throughput()
        if not throughput:
            return []
        slowest = min(throughput, key=lambda stage: throughput[stage])
        lines = []
        for stage, rate in throughput.items():
            actors, seconds = self.actors[stage], self.seconds[stage]
            line = (
                f"knowledge: {STAGE_NAMES[stage]:14} {rate:8,.0f} variants/s  "
                f"(by {actors}, {seconds:.1f} s of work)"
            )
            lines.append(line + ("  ← holds the others back" if stage == slowest else ""))
        return lines
