"""Where runs lie: a new folder for one, and the runs that are there."""

from datetime import datetime
from pathlib import Path

from .backbone import Backbone
from .errors import StegoError
from .experiment import Experiment
from .files import explained, read_json
from .notices import notice
from .paths import runs_root
from .run import read_checkpoint


def new_folder(runs_dir: Path, experiment: Experiment) -> Path:
    """Makes a folder named by time and experiment; of two processes that ask at once each gets its own."""
    stem, again = f"{datetime.now():%Y%m%d-%H%M%S}-{experiment.name}", 1
    while True:
        folder = runs_dir / (stem if again == 1 else f"{stem}-{again}")
        try:
            with explained(folder.parent):
                folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            return folder
        except FileExistsError:
            again += 1


def find_run(runs_dir: Path, experiment: Experiment, backbone: Backbone) -> Path | None:
    """The newest run of exactly this experiment, on these weights of the backbone, that has a checkpoint, or None."""
    for path in sorted(runs_dir.glob("*/experiment.json"), reverse=True):
        try:
            same = Experiment.from_dict(read_json(path)).same_result(experiment)
        except (StegoError, TypeError) as error:
            notice(f"{path} is passed over: {error}")
            continue
        if same and (path.parent / "checkpoint.pt").exists():
            if read_checkpoint(path.parent).get("backbone_weights") in (None, backbone.weights_id):
                return path.parent
            notice(f"{path.parent} is passed over: it was trained on other weights of {experiment.backbone}")
    return None


def newest_run(runs_dir: str | Path | None = None) -> Path:
    """The run folder made last; StegoError if there is none with a checkpoint."""
    runs_dir = Path(runs_dir) if runs_dir is not None else runs_root()
    found = sorted(runs_dir.glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise StegoError(f"{runs_dir} holds no run; train one first (make train), or name a run folder")
    return found[-1].parent
