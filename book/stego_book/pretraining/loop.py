"""The training loop: steps, schedule, checkpoints."""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from stego_lib.utils.files import atomic
from stego_lib.utils.paths import user_path
from stego_lib.utils.progress import progress

from .contrast import DenseContrast
from .network import build_network
from .recipe import PretrainRecipe


def pretrain(
    images: Tensor,
    recipe: PretrainRecipe,
    folder: str | Path,
    *,
    start: Mapping[str, Tensor] | None = None,
    chances: Tensor | None = None,
    device: str | torch.device = "cpu",
    precision: torch.dtype = torch.float32,
    save_every: int = 200,
    watch: Callable[[VisionTransformer, int], dict[str, float]] | None = None,
    watch_every: int | None = None,
) -> tuple[VisionTransformer, list[dict[str, float]]]:
    """Trains a ViT on images without labels. Resumes from `folder`; on a CPU the result is the same.

    images: uint8 (N, 3, H, W). folder: checkpoints, written every `save_every` steps; ValueError if they are of another
    recipe. start: state dict of an earlier stage; None for random weights. chances: sampling weight of each image.
    precision: of the network; weights, losses and the optimizer stay float32. watch: called with the network and the
    step every `watch_every` steps (None: `save_every`) for values of the log; it must not change the network.

    Returns the network and the log: step, loss and seconds (on a CPU: CPU time) of each step.
    """
    device = torch.device(device)
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda):  # does not change the caller's generators
        torch.manual_seed(recipe.seed)
        vit = build_network(recipe)
        if start is not None:
            vit.load_state_dict(start)
        if device.type == "cpu":  # on a CPU, fused attention is slow in bfloat16 without AMX, and not faster in float32
            for block in vit.blocks:
                block.attn.fused_attn = False
        objective = DenseContrast(vit, recipe).to(device)
        parameters = list(objective.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, betas=(0.9, 0.98))
        log: list[dict[str, float]] = []
        state_file, first = user_path(folder) / "pretraining.pt", 0
        if state_file.exists():
            state = torch.load(state_file, weights_only=True)
            if state["recipe"] != _plain(recipe):
                raise ValueError(f"{state_file} belongs to another recipe; remove it or name another folder")
            objective.load_state_dict(state["objective"])
            optimizer.load_state_dict(state["optimizer"])
            log, first = state["log"], state["step"]
        images = _shrunk(images, recipe.shrink).to(device)
        clock = time.process_time if device.type == "cpu" else time.perf_counter
        began = clock() - (log[-1]["seconds"] if log else 0.0)
        bar = progress(range(first, recipe.steps), "pre-training", initial=first, total=recipe.steps)
        for step in bar:
            generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
            full = step >= recipe.steps - recipe.full_size_steps
            count = max(2, recipe.batch_size // 4) if full else recipe.batch_size
            batch = images[_draw(len(images), chances, count, generator).to(device)].float() / 255
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                loss = objective.train()(batch, recipe.full_crop if full else recipe.crop, generator)
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * _schedule(step, recipe)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            log.append(dict(step=step, loss=loss.item(), seconds=clock() - began))
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            last = step + 1 == recipe.steps
            if watch and (last or (step + 1) % (watch_every or save_every) == 0):
                paused = clock()
                log[-1] |= watch(objective.vit.eval(), step + 1)
                began += clock() - paused
            if last or (step + 1) % save_every == 0:
                states = {"objective": objective.state_dict(), "optimizer": optimizer.state_dict()}
                state = {"recipe": _plain(recipe), "log": log, "step": step + 1} | states
                with atomic(state_file) as temporary:
                    torch.save(state, temporary)
        return objective.vit.eval(), log


def _shrunk(images: Tensor, by: int) -> Tensor:
    if by == 1:
        return images
    return torch.cat([F.avg_pool2d(part.float(), by).round().byte() for part in images.split(64)])


def _draw(size: int, chances: Tensor | None, count: int, generator: torch.Generator) -> Tensor:
    if chances is None:
        return torch.randint(size, (count,), generator=generator)
    return torch.multinomial(chances, count, replacement=True, generator=generator)


def _schedule(step: int, recipe: PretrainRecipe) -> float:
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, (recipe.schedule_steps or recipe.steps) - recipe.warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))


def _plain(recipe: PretrainRecipe) -> dict:
    return json.loads(json.dumps(asdict(recipe)))
