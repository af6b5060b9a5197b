"""What a result was made from: `Provenance`, compared wherever runs or records are compared."""

from collections.abc import Collection
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .utils.files import fingerprint, read_json

if TYPE_CHECKING:
    from .backbone import Backbone


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What a run was made from, beside its `Experiment`. None means that a value is not recorded.

    A run folder holds it as provenance.json, a run record under "provenance". Results can be compared or averaged only
    if `differing` is empty.

    Examples
    --------
    >>> ours, theirs = (Provenance.from_dict(record["provenance"]) for record in records)
    >>> ours.differing(theirs)
    ['precision']
    """

    images: str | None = None
    """Fingerprint of the training images."""
    labels: str | None = None
    """Fingerprint of their label maps; None for a split without labels."""
    weights: str | None = None
    """Fingerprint of the backbone's weights, `Backbone.weights_id`."""
    precision: str | None = None
    """Precision of the backbone: "float32" or "bfloat16"."""
    store: str | None = None
    """Kind of the features: "full", "compact" or "online"."""
    start: str | None = None
    """Fingerprint of the head and probes that training started from; None for fresh weights."""
    versions: dict[str, str] = field(default_factory=dict)
    """Packages, machine and date, see `utils.environment`. They do not count in comparisons."""

    @classmethod
    def of(
        cls, backbone: "Backbone", store: str, fingerprints: dict[str, str | None], start: str | None = None
    ) -> "Provenance":
        """The provenance of a run on this machine. fingerprints: "images" and "labels" of the training split."""
        from .utils.environment import environment

        return cls(
            images=fingerprints["images"],
            labels=fingerprints["labels"],
            weights=backbone.weights_id,
            precision=str(backbone.precision).removeprefix("torch."),
            store=store,
            start=start,
            versions=environment(),
        )

    def scored(self, backbone: "Backbone", store: str) -> "Provenance":
        """The provenance of a record scored now. If precision or store differ from those of training, it names both."""
        here = Provenance.of(backbone, store, {"images": self.images, "labels": self.labels}, self.start)
        for name in ("precision", "store"):
            trained, scored = getattr(self, name), getattr(here, name)
            if trained not in (None, scored):
                here = replace(here, **{name: f"{trained}, scored with {scored}"})  # type: ignore[arg-type]
        return here

    @classmethod
    def read(cls, folder: Path) -> "Provenance":
        """Reads provenance.json of a run folder."""
        return cls.from_dict(read_json(folder / "provenance.json"))

    @classmethod
    def from_dict(cls, values: dict[str, Any] | None) -> "Provenance":
        """The inverse of `to_dict`; missing keys are None, unknown ones are ignored."""
        known = {item.name for item in fields(cls)}
        return cls(**{key: value for key, value in (values or {}).items() if key in known})

    def to_dict(self) -> dict[str, Any]:
        """Keys and values for JSON."""
        return asdict(self)

    def differing(self, other: "Provenance", ignored: Collection[str] = ()) -> list[str]:
        """Names of the fields that differ, without `versions` and `ignored`. None differs from any value."""
        ours, theirs = self._compared(ignored), other._compared(ignored)
        return [name for name in ours if ours[name] != theirs[name]]

    def key(self, ignored: Collection[str] = ()) -> str:
        """Sixteen hexadecimal digits for grouping, equal exactly if `differing` is empty."""
        return fingerprint(sorted(self._compared(ignored).items()))

    def _compared(self, ignored: Collection[str]) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "versions" and key not in ignored}
