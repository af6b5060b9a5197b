"""Provenance of runs and records: data, weights, precision and versions."""

from collections.abc import Collection
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .utils.files import fingerprint, read_json

if TYPE_CHECKING:
    from .backbone import Backbone


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """The inputs of a run in addition to its `Experiment`; None if unknown.

    It is stored in provenance.json of a run folder and as "provenance" in a run record. Results are only compared or
    averaged if `differing` is empty.

    Examples
    --------
    >>> ours, theirs = (Provenance.from_dict(record["provenance"]) for record in records)
    >>> ours.differing(theirs)
    ['precision']
    """

    images: str | None = None
    """Fingerprint of the training images."""
    labels: str | None = None
    """Fingerprint of their label maps; None without labels."""
    weights: str | None = None
    """`Backbone.weights_id`."""
    precision: str | None = None
    """Precision of the backbone, "float32" or "bfloat16"."""
    store: str | None = None
    """Kind of the features: "full", "compact" or "online"."""
    start: str | None = None
    """Fingerprint of the head and probes from `Experiment.start_from`; None for random weights."""
    versions: dict[str, str] = field(default_factory=dict)
    """Packages, machine and date, see `utils.environment`. They are not compared."""

    @classmethod
    def of(
        cls, backbone: "Backbone", store: str, fingerprints: dict[str, str | None], start: str | None = None
    ) -> "Provenance":
        """The provenance of a run on this machine. fingerprints: of the training split, see `Features.fingerprints`."""
        from .utils.environment import environment

        return cls(
            **fingerprints,
            weights=backbone.weights_id,
            precision=str(backbone.precision).removeprefix("torch."),
            store=store,
            start=start,
            versions=environment(),
        )

    def scored(self, backbone: "Backbone", store: str) -> "Provenance":
        """The provenance of a new run record. It names both precisions and stores if they differ from training."""
        current = Provenance.of(backbone, store, {"images": self.images, "labels": self.labels}, self.start)
        for name in ("precision", "store"):
            trained, scored = getattr(self, name), getattr(current, name)
            if trained not in (None, scored):
                current = replace(current, **{name: f"{trained}, scored with {scored}"})  # type: ignore[arg-type]
        return current

    @classmethod
    def read(cls, folder: Path) -> "Provenance":
        """Reads provenance.json of a run folder."""
        return cls.from_dict(read_json(folder / "provenance.json"))

    @classmethod
    def from_dict(cls, values: dict[str, Any] | None) -> "Provenance":
        """Inverse of `to_dict`; missing keys are None, unknown keys are ignored."""
        known = {item.name for item in fields(cls)}
        return cls(**{key: value for key, value in (values or {}).items() if key in known})

    def to_dict(self) -> dict[str, Any]:
        """Keys and values for JSON."""
        return asdict(self)

    def differing(self, other: "Provenance", ignored: Collection[str] = ()) -> list[str]:
        """Names of differing fields, except `versions` and `ignored`. An unknown value differs from any other."""
        ours, theirs = self._compared(ignored), other._compared(ignored)
        return [name for name in ours if ours[name] != theirs[name]]

    def key(self) -> str:
        """A fingerprint for grouping, equal if and only if `differing` is empty."""
        return fingerprint(sorted(self._compared().items()))

    def _compared(self, ignored: Collection[str] = ()) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name not in ("versions", *ignored)}
