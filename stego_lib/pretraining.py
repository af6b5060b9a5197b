"""Pre-trains a small ViT on pictures without labels, by dense contrast. (This is not DINO.)

Two crops of a picture overlap; the same point seen in both must be recognised among points of other pictures. Colours
are mixed anew for each crop, so what is left to recognise a point by is texture and shape. The objective is InfoNCE
(van den Oord et al. 2018) on bilinearly sampled patch tokens, as in dense contrastive learning (Wang et al. 2021).
It serves as a stand-in for DINO where no weights can be downloaded.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .datasets import painter
from .files import atomic, load_state, save_state
from .metrics import confusion, identity, match, scores
from .progress import progress


@dataclass(frozen=True)
class PretrainRecipe:
    """Everything that determines a pre-training run, besides the pictures."""

    steps: int = 2000
    """Training steps; the last `full_size_steps` of them see crops of `full_crop` pixels."""
    batch_size: int = 64
    """Pictures a step, two crops each."""
    crop: int = 64
    """Side of a crop in pixels. Small crops are cheap: attention and tokens grow with the area."""
    full_size_steps: int = 200
    full_crop: int = 128
    """The last steps use this crop and a quarter of the batch, so that position embeddings fit the size of use."""
    zoom: tuple[float, float] = (0.75, 1.4)
    """Range of the enlargement from picture to crop (log-uniform)."""
    colour_mixing: tuple[float, float, float, float] = (0.35, 0.3, 0.15, 0.2)
    """Strength of `mix_colours`: spreads of matrix, logarithm of contrast and brightness; share of grey crops."""
    points: int = 24
    """Points a picture that are matched between its two crops."""
    temperature: float = 0.15
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: int = 100
    """Steps of linear warm-up; then the learning rate falls by a cosine to a hundredth."""
    seed: int = 0
    architecture: str = "vit_tiny_patch16_224"
    """timm's name; the patch is made 8 pixels."""
    depth: int = 4
    img_size: int = 128
    """Side in pixels for which the position embedding is stored (timm resamples it for other sizes)."""
    projection: int = 64
    """Width of the projection on which points are compared; thrown away afterwards."""

    def timm_arguments(self) -> dict:
        """The network, as keyword arguments of `timm.create_model` (its name under "architecture")."""
        return dict(
            architecture=self.architecture, patch_size=8, img_size=self.img_size, depth=self.depth, num_classes=0,
            global_pool="token", dynamic_img_size=True,
        )  # fmt: skip

    def varied(self, seed: int, steps: int | None = None) -> "PretrainRecipe":
        """The recipe with another seed and, if given, another number of steps, its two phases shortened alike."""
        if steps is None:
            return replace(self, seed=seed)
        return replace(self, seed=seed, steps=steps, full_size_steps=max(1, steps // 10), warmup=max(1, steps // 20))


SECOND_STAGE = PretrainRecipe(steps=240, full_size_steps=40, lr=3e-4, warmup=20, colour_mixing=(0.2, 0.15, 0.08, 0.1))
"""How the embedded backbone, trained by `PretrainRecipe()` on clear scenes, goes on to scenes in all weathers."""


def draw_scenes(series: int, count: int, *, weather: bool) -> tuple[Tensor, Tensor]:
    """The first scenes of a series: uint8 (count, 3, H, W) and their label maps, int64 (count, H, W)."""
    drawn = [painter.paint_scene(series, index, weather=weather) for index in progress(range(count), "drawing scenes")]
    pictures, labels = (torch.from_numpy(np.stack(parts)) for parts in zip(*drawn, strict=True))
    return pictures.permute(0, 3, 1, 2).contiguous(), labels.long()


def two_views(
    pictures: Tensor, crop: int, recipe: PretrainRecipe, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cuts two overlapping random crops from each picture and picks points seen in both, as many as the recipe says.

    pictures: float (B, 3, H, W) in [0, 1]. Returns two crop batches (B, 3, crop, crop) and the positions of the same
    `points` points in each, (B, points, 2) as (x, y) in [-1, 1] of the crop (-1 and 1 are its outer edges).
    """
    count, _, height, width = pictures.shape
    points, zoom = recipe.points, _zoom(recipe, crop, pictures)
    size = torch.tensor([width, height], dtype=torch.float32)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    def box() -> Tensor:
        enlargement = torch.exp(uniform(count, 1) * math.log(zoom[1] / zoom[0])) * zoom[0]
        return torch.clamp(crop / enlargement / size, max=1.0)  # (B, 2): part of the picture that the crop covers

    half1, half2 = box(), box()  # half-extents in picture coordinates, where the picture spans [-1, 1]
    centre1 = (2 * uniform(count, 2) - 1) * (1 - half1)
    reach = 0.5 * (half1 + half2)  # centres nearer than half1 + half2 overlap; half of that overlaps well
    centre2 = torch.clamp(centre1 + (2 * uniform(count, 2) - 1) * reach, -(1 - half2), 1 - half2)
    low, high = torch.maximum(centre1 - half1, centre2 - half2), torch.minimum(centre1 + half1, centre2 + half2)
    where = low[:, None] + uniform(count, points, 2) * (high - low)[:, None]
    views = []
    for centre, half in ((centre1, half1), (centre2, half2)):
        mirror = torch.stack([1 - 2 * (uniform(count) < 0.5).float(), torch.ones(count)], 1)
        matrix = torch.zeros(count, 2, 3)
        matrix[:, 0, 0], matrix[:, 1, 1] = (half * mirror).unbind(1)
        matrix[:, :, 2] = centre
        grid = F.affine_grid(matrix, [count, 3, crop, crop], align_corners=False).to(pictures.device)
        view = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
        views += [
            mix_colours(view, recipe.colour_mixing, generator),
            ((where - centre[:, None]) / half[:, None] * mirror[:, None]).to(pictures.device),
        ]
    return views[0], views[2], views[1], views[3]


def mix_colours(pictures: Tensor, strength: tuple[float, float, float, float], generator: torch.Generator) -> Tensor:
    """Random 3 x 3 colour mixing near the identity, contrast, brightness, now and then grey; (B, 3, H, W) in [0, 1].

    `strength`: see `PretrainRecipe.colour_mixing`. Zeros change nothing.
    """
    count = len(pictures)
    matrix_spread, gain_spread, offset_spread, grey_share = strength
    matrix = torch.eye(3) + matrix_spread * torch.randn(count, 3, 3, generator=generator)
    grey = (torch.rand(count, 1, 1, generator=generator) < grey_share).float()
    matrix = grey / 3 + (1 - grey) * matrix
    gain = torch.exp(gain_spread * torch.randn(count, 1, 1, 1, generator=generator))
    offset = offset_spread * torch.randn(count, 3, 1, 1, generator=generator)
    matrix, gain, offset = (value.to(pictures.device) for value in (matrix, gain, offset))
    mixed = torch.einsum("bij,bjhw->bihw", matrix, pictures - 0.5)
    return (mixed * gain + 0.5 + offset).clamp(0, 1)


def point_contrast(projected1: Tensor, projected2: Tensor, temperature: float) -> Tensor:
    """InfoNCE between the same points of two crops, (B, P, C) each; negatives are the points of OTHER pictures.

    Points of the same picture are left out of the denominator: they often show the same thing.
    """
    count, points, _ = projected1.shape
    a, b = (F.normalize(p.float(), dim=-1).flatten(0, 1) for p in (projected1, projected2))
    logits = a @ b.T / temperature
    picture = torch.arange(count, device=a.device).repeat_interleave(points)
    same = picture[:, None] == picture[None]
    same.fill_diagonal_(False)
    logits = logits.masked_fill(same, float("-inf"))
    target = torch.arange(len(a), device=a.device)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


def tokens_of(vit: VisionTransformer, pictures: Tensor) -> Tensor:
    """Patch tokens after the final norm, (B, h * w, C), of float pictures (B, 3, H, W) in [0, 1]."""
    return vit.forward_features((pictures - MEAN.to(pictures)) / STD.to(pictures))[:, vit.num_prefix_tokens :]


def tokens_at(vit: VisionTransformer, pictures: Tensor, where: Tensor) -> Tensor:
    """Patch tokens of square pictures, bilinear at `where` (B, P, 2), see `two_views`; returns (B, P, C)."""
    side = pictures.shape[-1] // 8
    maps = tokens_of(vit, pictures).transpose(1, 2).unflatten(2, (side, side)).float()
    return F.grid_sample(maps, where[:, :, None], padding_mode="border", align_corners=False)[..., 0].transpose(1, 2)


MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def pretrain(
    pictures: Tensor,
    recipe: PretrainRecipe,
    folder: str | Path,
    *,
    start: Mapping[str, Tensor] | None = None,
    device: str = "cpu",
    save_every: int = 200,
    watch: Callable[[VisionTransformer, int], dict[str, float]] | None = None,
) -> tuple[VisionTransformer, list[dict[str, float]]]:
    """Trains a ViT on `pictures`, uint8 (N, 3, H, W), and returns it with its log.

    It begins with the weights `start` (a state dict of an earlier stage) or with random ones. State is kept in `folder` every `save_every` steps; called again it goes on from there with the same result on a
    CPU. `watch(vit, step)` may return numbers to add to the log at those moments; it must not change the network.
    """
    torch.manual_seed(recipe.seed)
    arguments = recipe.timm_arguments()
    vit = timm.create_model(arguments.pop("architecture"), **arguments)
    width = vit.embed_dim
    projector = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, recipe.projection))
    if start is not None:
        vit.load_state_dict(start)
    vit.to(device), projector.to(device)
    parameters = [*vit.parameters(), *projector.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, betas=(0.9, 0.98))
    log: list[dict[str, float]] = []
    state_file, first = Path(folder) / "pretraining.pt", 0
    if state_file.exists():
        state = load_state(state_file)
        if state["recipe"] != _plain(recipe):
            raise ValueError(f"{state_file} belongs to another recipe; remove it or name another folder")
        vit.load_state_dict(state["vit"]), projector.load_state_dict(state["projector"])
        optimiser.load_state_dict(state["optimiser"])
        log, first = state["log"], state["step"]
    bar = progress(range(first, recipe.steps), "pre-training", initial=first, total=recipe.steps)
    for step in bar:
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        full = step >= recipe.steps - recipe.full_size_steps
        count = max(2, recipe.batch_size // 4) if full else recipe.batch_size
        rows = torch.randint(len(pictures), (count,), generator=generator)
        batch = pictures[rows].to(device).float() / 255
        crop = recipe.full_crop if full else recipe.crop
        view1, view2, where1, where2 = two_views(batch, crop, recipe, generator)
        sampled = tokens_at(vit.train(), torch.cat([view1, view2]), torch.cat([where1, where2]))
        ours, theirs = projector(sampled).chunk(2)
        loss = point_contrast(ours, theirs, recipe.temperature)
        for group in optimiser.param_groups:
            group["lr"] = recipe.lr * _schedule(step, recipe)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        log.append(dict(step=step, loss=loss.item()))
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if (step + 1) % save_every == 0 or step + 1 == recipe.steps:
            if watch:
                log[-1] |= watch(vit.eval(), step + 1)
            save_state(
                state_file,
                dict(
                    recipe=_plain(recipe), vit=vit.state_dict(), projector=projector.state_dict(),
                    optimiser=optimiser.state_dict(), log=log, step=step + 1,
                ),
            )  # fmt: skip
    return vit.eval(), log


def watcher(
    pictures: Tensor, labels: Tensor, n_classes: int, batch: int = 32
) -> Callable[[nn.Module, int], dict[str, float]]:
    """A `watch` for `pretrain`: mIoU (percent) of k-means and of a linear probe on the patch tokens of labelled pictures.

    pictures: uint8 (N, 3, H, W); labels: int64 (N, H, W). Both are fitted on the first 60 % of the pictures and scored on
    the rest, at one label a token (the commonest of its patch). The labels are looked at, never learnt from.
    """
    count, _, height, width = pictures.shape
    cells = labels.reshape(count, height // 8, 8, width // 8, 8).transpose(2, 3).flatten(3).mode(-1).values
    fitted = round(0.6 * count)
    known, asked = cells[:fitted].flatten(), cells[fitted:].flatten()

    @torch.inference_mode()
    def watch(vit: nn.Module, step: int) -> dict[str, float]:
        device = next(vit.parameters()).device
        tokens = torch.cat([tokens_of(vit, part.to(device).float() / 255).cpu() for part in pictures.split(batch)])
        tokens = F.normalize(tokens, dim=-1)
        seen, held_out = tokens[:fitted].flatten(0, 1).numpy(), tokens[fitted:].flatten(0, 1).numpy()
        clusters = KMeans(n_classes, n_init=5, random_state=0).fit(seen).predict(held_out)
        table = confusion(torch.from_numpy(clusters), asked, n_classes, n_classes)
        probe = LogisticRegression(C=10.0, tol=1e-2, max_iter=200).fit(seen[::3], known[::3].numpy())
        linear = confusion(torch.from_numpy(probe.predict(held_out)), asked, n_classes, n_classes)
        return {
            "kmeans_miou": scores(table, match(table))["miou"],
            "linear_miou": scores(linear, identity(n_classes))["miou"],
        }

    return watch


def save_backbone(vit: VisionTransformer, recipe: PretrainRecipe, path: str | Path, trained: str) -> None:
    """Writes the weights in float16 as a safetensors file that `Backbone` loads.

    Its metadata holds the timm arguments under "timm" and the sentence `trained` (what it has seen, how long).
    """
    weights = {name: value.detach().cpu().half().contiguous() for name, value in vit.state_dict().items()}
    with atomic(path) as temporary:
        save_file(weights, temporary, {"timm": json.dumps(recipe.timm_arguments()), "trained": trained})


def _zoom(recipe: PretrainRecipe, crop: int, pictures: Tensor) -> tuple[float, float]:
    # A crop as large as the picture can only be had by enlarging.
    smallest = crop / min(pictures.shape[-2:])
    return max(recipe.zoom[0], smallest), max(recipe.zoom[1], 1.4 * smallest)


def _schedule(step: int, recipe: PretrainRecipe) -> float:
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))


def _plain(recipe: PretrainRecipe) -> dict:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(recipe).items()}
