"""A form for JupyterLab: clicks define classes, and the segments are updated."""

import base64
import html
import io
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from shutil import make_archive
from tempfile import TemporaryDirectory
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd
import torch
from ipyevents import Event
from PIL import Image, ImageDraw

from stego_lib import Run, StegoError
from stego_lib.datasets.classes import Classes, distinct_colors
from stego_lib.predict import label_maps
from stego_lib.segment import segment_folder
from stego_lib.teach import CLICK, paths_by_name, read_maps, teach
from stego_lib.utils.files import atomic
from stego_lib.utils.paths import shown_path

from .plots.style import paint

# Longer side of the displayed image and radius of a click, in pixels.
SIDE, RADIUS = 720, 6


class ClickForm:
    """An image with its segments. A click adds a label with the selected name and updates the segments.

    Codes of images are cached, so a click only refits the classifier. Saving changes the run.
    images: a folder. output: folder for clicks.csv and label maps. clicks: image, x, y and name of earlier clicks.
    """

    def __init__(self, run: Run, images: Path, output: Path, clicks: Sequence[tuple[str, float, float, str]] = ()):
        self.run, self.images, self.output, self.clicks = run, images, output, list(clicks)
        self.paths = paths_by_name(images)
        self.read = lru_cache(32)(partial(read_maps, run))
        self.suggestions: list[Any] = []
        self.file = widgets.Dropdown(options=list(self.paths), description="image")
        self.name = widgets.ToggleButtons(options=[], style={"button_width": "auto"})
        self.new = widgets.Text(placeholder="new name, then Enter", description="name", continuous_update=False)
        self.opacity = widgets.FloatSlider(0.5, min=0, max=1, step=0.1, description="opacity", readout=False)
        self.shown = widgets.Image(format="jpeg", layout={"width": f"{SIDE}px", "max_width": "100%"})
        self.message, self.legend = widgets.HTML(), widgets.HTML()
        actions = {"Undo": self.undo, "Next suggested": self.suggest, "Save": self.save, "Label maps": self.segment}
        buttons = [widgets.Button(description=text) for text in actions]
        for button in buttons:
            button.on_click(lambda button: self._answer(actions[button.description]))
        self.new.observe(lambda change: self._answer(lambda: self.add_name(change["new"].strip())), "value")
        for widget in (self.file, self.opacity):
            widget.observe(lambda _: self._answer(self.draw), "value")
        Event(source=self.shown, watched_events=["click"]).on_dom_event(self._on_click)
        rows = map(widgets.HBox, ([self.file, self.opacity], [self.new, self.name], buttons))
        self.box = widgets.VBox([*rows, self.message, self.shown, self.legend])
        for name in dict.fromkeys(click[-1] for click in self.clicks):
            self.add_name(name)
        self.draw()

    @property
    def table(self) -> pd.DataFrame:
        """The clicks as a table for `Run.teach`."""
        return pd.DataFrame(self.clicks, columns=list(CLICK))

    def add_name(self, name: str) -> None:
        """Adds a name for clicks, and selects it."""
        if name:
            names = tuple(dict.fromkeys([*self.name.options, name]))
            self.classes = Classes(names, tuple(distinct_colors(len(names))))  # validates the names
            self.name.options, self.name.value, self.new.value = names, name, ""

    def add(self, x: float, y: float) -> None:
        """Adds a click with the selected name on the displayed image; x and y are in pixels of the file."""
        if self.name.value is None:
            raise StegoError("No name is selected. Enter a name, press Enter, and click again.")
        self.clicks.append((self.file.value, x, y, self.name.value))
        self.draw()

    def undo(self) -> None:
        """Removes the last click."""
        self.clicks = self.clicks[:-1]
        self.draw()

    def suggest(self) -> None:
        """Shows the next suggested place as a yellow circle."""
        if not self.suggestions:
            self.suggestions = list(self.run.suggest(self.images, 20, seed=len(self.clicks)).itertuples())
        place = self.suggestions.pop(0)
        self.file.value = place.image
        self.draw((place.x, place.y))

    def save(self) -> str:
        """Writes the clicks to clicks.csv, and the classifier to the run."""
        with atomic(self.output / "clicks.csv") as temporary:
            self.table.to_csv(temporary, index=False)
        self.run.teach(self.images, self.table)
        return f"saved: {shown_path(self.output / 'clicks.csv')} and the run {shown_path(self.run.folder)}"

    def segment(self) -> str:
        """Saves, segments the folder, and returns a link to the label maps."""
        self.save()
        segment_folder(self.run, self.images, self.output)
        with TemporaryDirectory() as folder:
            archive = make_archive(f"{folder}/labels", "zip", self.output, "labels")
            address = f"data:application/zip;base64,{base64.b64encode(Path(archive).read_bytes()).decode()}"
        return f'{shown_path(self.output / "labels")} <a download="labels.zip" href="{address}">labels.zip</a>'

    @torch.inference_mode()
    def draw(self, suggested: tuple[float, float] | None = None) -> None:
        """Fits the classifier to the clicks, and draws image, segments and clicks."""
        scorer, segments, ids = self.run.score_maps, self.run.segments, self.run.ids
        on = self.run.taught.on if self.run.taught else "codes"
        if len({click[-1] for click in self.clicks}) > 1:  # a classifier needs two names
            taught = teach(self.run, self.images, self.table, read=self.read)
            scorer, segments, on = taught.scores, self.classes, taught.on
            ids = np.array([segments.names.index(name) for name in taught.names], np.uint8)
        pixels, maps = self.read(self.paths[self.file.value], on)
        self.scale = SIDE / max(pixels.shape[1:])
        height, width = (max(1, round(self.scale * side)) for side in pixels.shape[1:])
        self.labels = label_maps(scorer(maps), (height, width), ids)[0].numpy()
        image = Image.fromarray(pixels.movedim(0, -1).numpy()).resize((width, height))
        image = Image.blend(image, Image.fromarray(paint(self.labels, segments)), self.opacity.value)
        circles = [(x, y, self.classes.colors[self.classes.names.index(name)], "white")
                   for file, x, y, name in self.clicks if file == self.file.value]  # fmt: skip
        for x, y, color, edge in [*circles, *([(*suggested, None, "yellow")] if suggested else [])]:
            center = self.scale * (x + 0.5), self.scale * (y + 0.5)
            ImageDraw.Draw(image).circle(center, RADIUS, fill=color, outline=edge, width=2)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=90)
        self.shown.value = file.getvalue()
        boxes = [f'<span style="background:rgb{color}">&emsp;</span> {html.escape(name)}'
                 for name, color in zip(segments.names, segments.colors, strict=True)]  # fmt: skip
        self.legend.value = " &emsp; ".join(boxes)

    def _on_click(self, event: dict[str, Any]) -> None:
        x, y = (max(0.0, round((event[key] + 0.5) / self.scale - 0.5, 1)) for key in ("dataX", "dataY"))
        self._answer(lambda: self.add(x, y))

    def _answer(self, action: Callable[[], str | None]) -> None:
        """Runs an action and shows its result or error."""
        self.message.value = "working ..."
        try:
            self.message.value = action() or f"clicks: {len(self.clicks)}"
        except StegoError as error:
            self.message.value = html.escape(str(error))
