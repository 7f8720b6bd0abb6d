"""What a closer look at a run's networks found: the schema of the analysis file beside results.json.

The file is one `.npz`: arrays, and under `record` everything else as JSON. It is read without executing code
(no pickles). Where an attribute may be None, it was not looked at, or the network does not allow it.
"""

import io
import json
import zipfile
from typing import Annotated, Any, Final, Literal

import numpy as np
from pydantic import BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError, model_validator
from pydantic.functional_validators import PlainValidator

from tmkd_ray import storage
from tmkd_ray.errors import UserError
from tmkd_ray.settings import Settings

SCHEMA_VERSION: Final = 1

_RECORD = "record"
"""The name, in the file, of what is no array."""


def _array_of(kinds: str, num_axes: int) -> Any:
    def check(value: Any) -> np.ndarray:
        if not isinstance(value, np.ndarray) or value.dtype.kind not in kinds or value.ndim != num_axes:
            raise ValueError(f"expected an array of {num_axes} axes and a type of {kinds!r}")
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise ValueError("expected finite numbers")
        return value

    return PlainValidator(check)


_AsItIs = PlainSerializer(lambda value: value)
Images = Annotated[np.ndarray, _array_of("u", 4), _AsItIs]
ViewImages = Annotated[np.ndarray, _array_of("u", 5), _AsItIs]
Reals1 = Annotated[np.ndarray, _array_of("f", 1), _AsItIs]
Reals2 = Annotated[np.ndarray, _array_of("f", 2), _AsItIs]
Counts1 = Annotated[np.ndarray, _array_of("iu", 1), _AsItIs]
Counts2 = Annotated[np.ndarray, _array_of("iu", 2), _AsItIs]
Maps = Annotated[np.ndarray, _array_of("u", 3), _AsItIs]


def _clean(value: Any) -> Any:
    # A file name that is not UTF-8 reaches us with lone surrogates, which neither JSON nor HTML can hold.
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


Name = Annotated[str, BeforeValidator(_clean)]


class _Part(Settings):
    model_config = ConfigDict(arbitrary_types_allowed=True)


class ViewGallery(_Part):
    """A few images in every view.

    Attributes:
        images: uint8 [N, V, H, W, 3].
        view_names: V names. labels: N class names.
        weights: [N, V] semantic weights, rows sum to one; None without a text teacher.
    """

    images: ViewImages
    view_names: tuple[Name, ...]
    labels: tuple[Name, ...]
    weights: Reals2 | None = None

    @model_validator(mode="after")
    def _shapes_agree(self) -> "ViewGallery":
        shape = (len(self.labels), len(self.view_names))
        if self.images.shape[:2] != shape or self.images.shape[-1] != 3:
            raise ValueError(f"images: expected {shape} images of three channels, not {self.images.shape}")
        if self.weights is not None and self.weights.shape != shape:
            raise ValueError(f"weights: expected {shape}, not {self.weights.shape}")
        return self


class ViewWins(_Part):
    """For which images each view had the largest semantic weight.

    Attributes:
        view_names: V names, the views that are fused.
        counts: [C, V], images of a class that a view won.
        won_by: for each view, the images where its lead was largest, in all views, the largest first.
    """

    view_names: tuple[Name, ...]
    counts: Counts2
    won_by: tuple[ViewGallery, ...]

    @model_validator(mode="after")
    def _one_gallery_a_view(self) -> "ViewWins":
        if self.counts.shape[1] != len(self.view_names) or len(self.won_by) != len(self.view_names):
            raise ValueError("view_wins: expected a column and a gallery for each view")
        return self


class NetworkFindings(_Part):
    """One network on the test images, or all seeds of one method together.

    Attributes:
        key: the method's name; `teacher` and role `teacher` for the visual teacher.
        seeds: number of networks behind the counts.
        confusion: [P, 3]: label, predicted class, images; pairs that were never met are left out.
        bin_counts, bin_hits, bin_confidences: [M], over bins of the confidence of equal width: images, those
            of them that are right, and the sum of their confidences (Guo et al. 2017, arXiv 1706.04599).
        projection: float [N, 2], t-SNE of the features of `Analysis.projected_labels` (first seed).
        correlation_gap: float [K, K], |correlation of the network's logits − that of the teacher's| over
            `Analysis.correlated_classes` (first seed). mean_correlation_gap: over all pairs of classes.
    """

    key: Name
    role: Literal["teacher", "student"]
    seeds: Annotated[int, Field(ge=1)] = 1
    confusion: Counts2
    bin_counts: Counts1
    bin_hits: Counts1
    bin_confidences: Reals1
    projection: Reals2 | None = None
    correlation_gap: Reals2 | None = None
    mean_correlation_gap: float | None = None

    def confusion_matrix(self, num_classes: int) -> np.ndarray:
        """Return [C, C] int64: rows are labels, columns predictions."""
        matrix_CC = np.zeros((num_classes, num_classes), dtype=np.int64)
        matrix_CC[self.confusion[:, 0], self.confusion[:, 1]] = self.confusion[:, 2]
        return matrix_CC

    @property
    def ece(self) -> float:
        """Expected calibration error, 0 to 1, of all seeds' predictions together."""
        return float(np.abs(self.bin_hits - self.bin_confidences).sum() / max(self.bin_counts.sum(), 1))


class Explanation(_Part):
    """Where a network looks for the label's class: Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391).

    Attributes:
        key: of the network, or `fused teacher`.
        maps: uint8 [N, H, W], 255 where the class's evidence is strongest in an image, 0 where there is none.
        probabilities: [N], what the network gives the label's class.
    """

    key: Name
    maps: Maps
    probabilities: Reals1


class GradCam(_Part):
    """The same images, explained for several networks.

    Attributes:
        images: uint8 [N, H, W, 3]. labels: N class names.
    """

    images: Images
    labels: tuple[Name, ...]
    explanations: tuple[Explanation, ...]

    @model_validator(mode="after")
    def _one_map_an_image(self) -> "GradCam":
        if any(each.maps.shape != self.images.shape[:3] for each in self.explanations):
            raise ValueError("grad_cam: expected a map of each image, of its size")
        return self


class Analysis(_Part):
    """The content of an analysis file.

    Attributes:
        created: that of the results it belongs to.
        num_images: test images that were looked at for the logits' correlations.
        projected_labels: [N], labels of the images whose features are projected.
        correlated_classes: [K], the classes of `correlation_gap`.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    created: str
    gallery: ViewGallery | None = None
    view_wins: ViewWins | None = None
    networks: tuple[NetworkFindings, ...] = ()
    num_images: int = 0
    projected_labels: Counts1 | None = None
    correlated_classes: Counts1 | None = None
    grad_cam: GradCam | None = None

    def save(self, path: str) -> None:
        """Write the file, whole or not at all."""
        arrays: dict[str, np.ndarray] = {}
        tree = _without_arrays(self.model_dump(), "", arrays)
        record = np.frombuffer(json.dumps(tree, allow_nan=False).encode(), dtype=np.uint8)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **arrays, **{_RECORD: record})
        storage.write_bytes(path, buffer.getvalue())

    @classmethod
    def load(cls, path: str) -> "Analysis":
        """Read an analysis file.

        Raises:
            UserError: it is missing, damaged, of another version, or does not fit the schema.
        """
        advice = "run `tmkd run` with the run's config.yaml again: it only makes what is missing"
        try:
            with np.load(io.BytesIO(storage.read_bytes(path)), allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            tree = json.loads(arrays.pop(_RECORD).tobytes())
            version = tree["schema_version"]
        except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} is no analysis file ({error}); {advice}") from error
        if version != SCHEMA_VERSION:
            known = f"this version of tmkd-ray reads {SCHEMA_VERSION}"
            raise UserError(f"{path} has schema_version {version!r}, {known}; {advice}")
        try:
            return cls.model_validate(_with_arrays(tree, arrays))
        except (ValidationError, KeyError) as error:
            raise UserError(f"{path} does not fit the schema ({error}); {advice}") from error


def analysis_path(results_path: str) -> str:
    """Return where the analysis of a results file lies: `results.json` has `results-analysis.npz`."""
    return f"{results_path.removesuffix('.json')}-analysis.npz"


def _without_arrays(value: Any, name: str, arrays: dict[str, np.ndarray]) -> Any:
    """Return the tree as JSON has it; arrays go into `arrays`, their names stay behind."""
    if isinstance(value, np.ndarray):
        arrays[name] = value
        return {"array": name}
    if isinstance(value, dict):
        return {key: _without_arrays(item, f"{name}.{key}".lstrip("."), arrays) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_without_arrays(item, f"{name}.{index}", arrays) for index, item in enumerate(value)]
    return value


def _with_arrays(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"array"}:
            return arrays[value["array"]]
        return {key: _with_arrays(item, arrays) for key, item in value.items()}
    return [_with_arrays(item, arrays) for item in value] if isinstance(value, list) else value
