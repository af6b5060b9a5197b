"""Makes the golden files again with the authors' code, and compares them with those that are here.

    git clone https://github.com/mhamilton723/STEGO UPSTREAM
    git -C UPSTREAM checkout eb4d6b521740bd4265681b353547f2ffca65d673
    python tests/golden/make_golden.py --upstream UPSTREAM --output NEW

Inputs and everything random (points, permutations, weights) are those of the files; the authors' functions compute the
outputs from them. Packages that these functions do not use, such as Lightning and hydra, are replaced by stubs.
"""

import argparse
import importlib.abc
import importlib.machinery
import sys
import tempfile
import types
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
import yaml
from PIL import Image

HERE = Path(__file__).parent
# Packages that the authors' files import and the functions below do not use.
STUBS = ("hydra", "omegaconf", "wget", "pytorch_lightning", "torchmetrics", "torch._six", "torch.utils.tensorboard")


class Module(torch.nn.Module):
    """In place of a LightningModule: keeps what is logged, and runs the three optimizers by hand."""

    global_step = 0

    def save_hyperparameters(self):
        self.logged = {}

    def log(self, name, value, **_):
        self.logged.setdefault(name, []).append(value.detach())

    def optimizers(self):
        if not hasattr(self, "adams"):
            self.adams = self.configure_optimizers()
        return self.adams

    def manual_backward(self, loss):
        loss.backward()


class Metric:
    """In place of a torchmetrics.Metric."""

    def __init__(self, **_):
        pass

    def add_state(self, name, default, **_):
        setattr(self, name, default)


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports stubs in place of `STUBS`."""

    def find_spec(self, name, path=None, target=None):
        stubbed = any(name == stub or name.startswith(f"{stub}.") for stub in STUBS)
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if stubbed else None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        names = {"main": lambda **_: lambda function: function, "LightningModule": Module, "Metric": Metric}
        module.__getattr__ = lambda name: names.get(name, MagicMock())
        return module

    def exec_module(self, module):
        module.__path__ = []


def import_upstream(folder: Path) -> SimpleNamespace:
    """The authors' modules, on the CPU."""
    sys.meta_path.insert(0, Stubs())
    sys.path.insert(0, str(folder / "src"))
    torch.nn.Module.cuda = torch.Tensor.cuda = lambda self, *_, **__: self
    torchvision.transforms.functional._get_image_size = None  # its name before; not used here
    names = ["utils", "modules", "crf", "precompute_knns", "crop_datasets", "train_segmentation"]
    names.append("dino.vision_transformer")
    for name in names:
        __import__(name)
    modules = {name.split(".")[-1]: sys.modules[name] for name in names}
    return SimpleNamespace(config=folder / "src" / "configs" / "train_config.yml", **modules)


@contextmanager
def drawn(up, coords=(), perms=()):
    """Points and permutations of negatives are the recorded ones, in turn."""
    points, orders = iter(coords), iter(perms)
    rand = patch("torch.rand", lambda *_, **__: (next(points) + 1) / 2)
    with rand, patch.object(up.modules, "super_perm", lambda *_: next(orders)):
        yield


def config(up, g: dict, **changes) -> SimpleNamespace:
    """The options of the authors' configuration, with those of a file."""
    options = yaml.safe_load(up.config.read_text()) | dict(dim=10, dino_patch_size=1, dropout=False, extra_clusters=2)
    weights = {name[2:-4]: g[name].item() for name in g if name.startswith("w_")}
    sizes = {name: int(g[name]) for name in ("feature_samples", "neg_samples", "extra_clusters") if name in g}
    return SimpleNamespace(**options | {"hist_freq": None} | weights | sizes | changes)


class Lookup(torch.nn.Module):
    """In place of the ViT: the "image" is the feature map."""

    def get_intermediate_feat(self, image, n):
        tokens = F.pad(image.flatten(2).transpose(1, 2), (0, 0, 1, 0))
        return [tokens], [None], [None]


def featurizer(up, vit, channels: int, cfg) -> torch.nn.Module:
    """The authors' DinoFeaturizer on another network than DINO's."""
    weights = patch("torch.hub.load_state_dict_from_url", lambda url: vit.state_dict())
    with weights, patch.object(up.vision_transformer, "vit_small", lambda **_: vit):
        net = up.modules.DinoFeaturizer(cfg.dim, SimpleNamespace(**vars(cfg) | {"dino_patch_size": 8}))
    net.patch_size = cfg.dino_patch_size
    net.cluster1, net.cluster2 = net.make_clusterer(channels), net.make_nonlinear_clusterer(channels)
    net.dropout.p = 0
    return net


def segmenter(up, channels: int, g: dict, **changes) -> torch.nn.Module:
    """The authors' LitUnsupervisedSegmenter on given feature maps."""
    cfg = config(up, g, **changes)
    with patch.object(up.train_segmentation, "DinoFeaturizer", lambda dim, cfg: featurizer(up, Lookup(), 384, cfg)):
        model = up.train_segmentation.LitUnsupervisedSegmenter(int(g["n_classes"]), cfg)
    model.net = featurizer(up, Lookup(), channels, cfg)
    return model


def make_correlation_loss(up, g):
    sample = up.modules.sample
    yield "sampled_feats_coords1", sample(g["feats"], g["coords1"])
    yield "sampled_code_coords2", sample(g["code"], g["coords2"])
    yield "nonsquare_sampled", sample(g["nonsquare_map"], g["nonsquare_coords"])
    kinds = ("pos_intra", "pos_inter", "neg_inter")
    for key in [name.split(".")[0] for name in g if name.endswith(".total")]:
        switches = {name: key[at] == "1" for name, at in (("pointwise", 2), ("zero_clamp", 6), ("stabalize", 10))}
        cfg = config(up, g, **switches)
        code, code_pos = (g[name].clone().requires_grad_() for name in ("code", "code_pos"))
        with drawn(up, [g["coords1"], g["coords2"]], g["perms"]):
            loss = up.modules.ContrastiveCorrelationLoss(cfg)
            results = loss(g["feats"], g["feats_pos"], None, None, code, code_pos)
        losses, correspondences = [value.mean() for value in results[::2]], results[1::2]
        total = sum(getattr(cfg, f"{kind}_weight") * value for kind, value in zip(kinds, losses, strict=True))
        total.backward()
        values = {f"{kind}_loss": value for kind, value in zip(kinds, losses, strict=True)}
        values |= {"total": total, "neg_inter_loss_full": results[4], "grad_code": code.grad}
        yield from ((f"{key}.{name}", value) for name, value in (values | {"grad_code_pos": code_pos.grad}).items())
        for kind, value in zip(kinds, correspondences, strict=True):
            yield from ((f"{kind}_cd", value), (f"{kind}_cd_mean", value.mean()))


def make_probes(up, g):
    model, zeros = segmenter(up, 10, g), torch.zeros_like(g["x"])
    model.net.forward = lambda image: (image, image)  # codes are given
    weights = {"linear_probe.weight": g["linear_weight"], "linear_probe.bias": g["linear_bias"]}
    model.load_state_dict(weights | {"cluster_probe.clusters": g["clusters"]}, strict=False)
    probe = model.cluster_probe
    for key, alpha in (("none", None), ("alpha2", 2), ("alpha0p5", 0.5)):
        x = g["x"].clone().requires_grad_()
        probe.zero_grad()
        loss, probs = probe(x, alpha)
        loss.backward()
        grads = {"grad_clusters": probe.clusters.grad.clone(), "grad_x": x.grad}
        yield from ((f"{key}.{name}", value) for name, value in {"loss": loss, "probs": probs, **grads}.items())
        if alpha is None:
            yield "none.argmax", probs.argmax(1)
    yield "linear_logits_lowres", model.linear_probe(g["x"])
    yield from ((f"logprobs_alpha{alpha}", probe(g["x"], alpha, log_probs=True)) for alpha in (1, 2))
    batch = dict.fromkeys(("ind", "img_aug", "coord_aug", "label_pos")) | {"img_pos": zeros}
    batch |= {"img": g["x"], "label": g["label"]}
    model.adams = [MagicMock(zero_grad=model.zero_grad)] * 3  # no steps
    with patch.object(up.modules.ContrastiveCorrelationLoss, "forward", lambda *_: [torch.zeros(1)] * 6):
        model.training_step(batch, 0)
    yield from (("linear_loss", model.logged["loss/linear"][0]), ("step_cluster_loss", model.logged["loss/cluster"][0]))
    yield from (("linear_grad_weight", model.linear_probe.weight.grad), ("step_cluster_grad", probe.clusters.grad))
    yield "linear_grad_bias", model.linear_probe.bias.grad
    seen = []
    for metrics in (model.linear_metrics, model.cluster_metrics):
        metrics.update = lambda preds, label: seen.append(preds)
    model.validation_step(batch, 0)
    yield from (("eval_linear_argmax", seen[0]), ("eval_cluster_argmax", seen[1]))
    code = F.interpolate(g["x"], g["label"].shape[-2:], mode="bilinear", align_corners=False)[:1]
    yield "eval_linear_logsoftmax_img0", model.linear_probe(code).log_softmax(1)[0]
    yield "eval_cluster_logprobs_img0", probe(code, 2, log_probs=True)[0]


def make_metrics(up, g):
    for key in [name.split(".")[0] for name in g if name.endswith(".n_classes")]:
        case = {name.removeprefix(f"{key}."): value for name, value in g.items() if name.startswith(f"{key}.")}
        sizes, hungarian = (int(case["n_classes"]), int(case["extra_clusters"])), bool(case["hungarian"])
        metrics = up.utils.UnsupervisedMetrics("", *sizes, hungarian)
        if "preds" in case:
            for half in zip(case["preds"].long().chunk(2), case["labels"].long().chunk(2), strict=True):
                metrics.update(*half)
        else:
            metrics.stats = case["stats"]
        yield f"{key}.stats", metrics.stats
        if case["raises"]:
            continue
        values = {f"{name}_f64": value for name, value in metrics.compute().items()}
        histogram = values["histogram"] = metrics.histogram
        values["iou_per_class"] = histogram.diag() / (histogram.sum(0) + histogram.sum(1) - histogram.diag())
        if hungarian:
            values["map_clusters"] = metrics.map_clusters(torch.arange(sum(sizes)))
            for name in ("assignments", "assignments_t")[: 1 + bool(sizes[1])]:
                rows, columns = getattr(metrics, name)
                values |= {f"{name}_rows": rows, f"{name}_cols": columns}
        yield from ((f"{key}.{name}", value) for name, value in values.items())


def make_knn(up, g):
    class Identity(torch.nn.Module):
        def forward(self, maps):
            return maps, maps

    images = [{"img": image} for image in g["feature_maps"]]
    yield "normed_feats", up.precompute_knns.get_feats(torch.nn.Identity(), [{"img": g["feature_maps"]}])
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(up.precompute_knns, "ContrastiveSegDataset", lambda **_: images),
        patch.object(up.modules, "DinoFeaturizer", lambda *_: Identity()),
    ):
        cfg = SimpleNamespace(pytorch_data_dir=folder, output_root=folder, arch="dino", model_type="", num_workers=0)
        up.precompute_knns.my_app(cfg)
        yield "nns", np.load(next(Path(folder).glob("nns/*.npz")))["nns"]


def make_trajectory(up, g):
    model = segmenter(up, 32, g, lr=g["lr_net"].item())
    names = [name.removeprefix("init.") for name in g if name.startswith("init.")]
    model.load_state_dict({name: g[f"init.{name}"] for name in names}, strict=False)
    batch = dict.fromkeys(("ind", "img_aug", "coord_aug", "label_pos"))
    batch |= {"img": g["feats"], "img_pos": g["feats_pos"], "label": g["label"]}
    for coords1, coords2, perms in zip(g["coords1"], g["coords2"], g["perms"], strict=True):
        with drawn(up, [coords1, coords2], perms):
            model.training_step(batch, 0)
    for name, values in model.logged.items():
        yield f"log.{name.replace('/', '_')}", torch.stack(values)
    state = model.state_dict()
    yield from ((f"final.{name}", state[name]) for name in names)
    yield "final_code", model.net.eval()(g["feats"])[1]


def make_crf(up, g):
    crf, undo = up.crf, up.crf.unnorm
    yield "params_max_iter", crf.MAX_ITER
    for key in ("sq64", "rect96x64"):
        image, logprobs = g[f"{key}.image_tensor"], g[f"{key}.logprobs"]
        yield f"{key}.image_used_rgb_uint8", np.array(crf.VF.to_pil_image(undo(image)))
        refined = crf.dense_crf(image, logprobs)
        yield from ((f"{key}.Q", refined), (f"{key}.argmax", refined.argmax(0)))
        original = g[f"{key}.image_rgb_uint8"].permute(2, 0, 1)
        changes = {f"Q_iter{count}": {"MAX_ITER": count} for count in (0, 1, 2, 5)}
        changes |= {"Q_bilateral_only": {"POS_W": 0}, "Q_gaussian_only": {"Bi_W": 0}}
        changes |= {"Q_with_original_uint8": {"unnorm": lambda _, original=original: original}}
        for name, change in changes.items():
            with patch.multiple(crf, **change):
                changed = crf.dense_crf(image, logprobs)
            yield f"{key}.{name}", changed
            if name == "Q_iter0":
                yield f"{key}.unary_argmax", changed.argmax(0)


def make_crf_loss(up, g):
    def loss(guidance, codes, coords, parameters):
        rows = iter(coords[:, None])
        with patch("torch.randint", lambda *_, **__: next(rows)):
            return up.modules.ContrastiveCRFLoss(coords.shape[1], *parameters)(guidance, codes)

    default = g["default.params_alpha_beta_gamma_w1_w2_shift"].tolist()
    for key in ("default", "wide"):
        codes = g["clusters"].clone().requires_grad_()
        parameters = g[f"{key}.params_alpha_beta_gamma_w1_w2_shift"].tolist()
        out = loss(g["guidance"], codes, g[f"{key}.coords"], parameters)
        out.mean().backward()
        values = {"out": out, "mean": out.mean(), "grad_clusters": codes.grad}
        yield from ((f"{key}.{name}", value) for name, value in values.items())
    code = g["train.code"].clone().requires_grad_()
    resized = up.modules.norm(up.utils.resize(code, 56))
    mean = loss(up.utils.resize(g["train.img"], 56), resized, g["train.coords"], default).mean()
    mean.backward()
    yield from (("train.mean", mean), ("train.grad_code", code.grad), ("train.resized_code_normed", resized[:1]))


def make_head(up, g):
    norm = partial(torch.nn.LayerNorm, eps=1e-6)
    vit = up.vision_transformer.VisionTransformer(
        patch_size=8, embed_dim=96, depth=3, num_heads=6, qkv_bias=True, norm_layer=norm
    )
    vit.load_state_dict({name.removeprefix("vit."): value for name, value in g.items() if name.startswith("vit.")})
    net = featurizer(up, vit, 96, config(up, g, dino_patch_size=8)).eval()
    net.load_state_dict({name[5:]: value for name, value in g.items() if name.startswith("head.")}, strict=False)
    linear = net.cluster1(g["head_in"])
    yield from (("head_out_linear", linear), ("head_out_nonlinear", linear + net.cluster2(g["head_in"])))
    for size in [name.removeprefix("img_") for name in g if name.startswith("img_")]:
        height, width = map(int, size.split("x"))
        image = g[f"img_{size}"]
        image = image.repeat_interleave(height // image.shape[2], 2).repeat_interleave(width // image.shape[3], 3)
        for net.feat_type in ("feat", "KK"):
            features, code = net(image)
            yield from ((f"{net.feat_type}_feats_{size}", features), (f"{net.feat_type}_code_{size}", code))
            yield f"{net.feat_type}_feats_{size}_every4th", features[:, :, ::4, ::4]
        net.feat_type = "feat"
        yield from ((f"feat_feats_{size}_n2", net(image, n=2)[0]), (f"cls_feat_{size}", vit(image)))
        yield f"return_class_feat_{size}", net(image, return_class_feat=True)
        yield f"last_attn_cls_{size}", vit.get_intermediate_feat(image)[1][0][:, :, 0, 1:]
        yield f"feat_code_{size}_projection_linear", net.cluster1(net(image)[0])
    for height, width in ((64, 64), (64, 96), (96, 64)):
        encoding = vit.interpolate_pos_encoding(torch.zeros(1, 1 + height * width // 64, 96), height, width)
        yield f"posenc_{height}x{width}", encoding


def make_transforms(up, g):
    image, label = (Image.fromarray(g[name].numpy()) for name in ("image", "label"))
    for key, crop in (("center32", "center"), ("none32", None)):
        yield f"{key}.image_out", up.utils.get_transform(32, False, crop)(image)
        yield f"{key}.label_out", up.utils.get_transform(32, True, crop)(label)
        for height, width in g["idx_sizes"].tolist():
            rows, cols = np.indices((height, width), dtype=np.uint8)
            read = [up.utils.get_transform(32, True, crop)(Image.fromarray(grid))[0] for grid in (rows, cols)]
            yield f"idx.{key}.{height}x{width}.rows", read[0][:, 0]
            yield f"idx.{key}.{height}x{width}.cols", read[1][0]
    computer = up.crop_datasets.RandomCropComputer.__new__(up.crop_datasets.RandomCropComputer)
    for name in [name for name in g if name.startswith("five.boxes_")]:
        size, ratio = name.removeprefix("five.boxes_").split("_ratio")
        height, width = map(int, size.split("x"))
        computer.crop_ratio = float(ratio)
        corners = computer.five_crops(0, torch.arange(height * width).view(1, height, width))
        yield name, [[*divmod(int(crop[0, 0, 0]), width), *crop.shape[1:]] for crop in corners]
    computer.crop_ratio = 0.5
    pixels, ids = up.utils.T.ToTensor()(image), up.utils.ToTargetTensor()(label)[0]
    crops = [computer.five_crops(0, values) for values in (pixels, ids)]
    yield from (("five.image_crops", torch.stack(crops[0])), ("five.label_crops", torch.stack(crops[1])))
    ids = torch.where(ids == 255, -1, ids)
    pairs = [(pixels, ids), (pixels.flip(1), ids.flip(0))]
    computer.dataset = [{"img": computer.five_crops(0, a), "label": computer.five_crops(0, b)} for a, b in pairs]
    with tempfile.TemporaryDirectory() as folder:
        computer.img_dir = computer.label_dir = folder
        for item in range(2):
            computer[item]
        for name, ending in (("five.saved_label_png", "png"), ("five.saved_jpg_decoded", "jpg")):
            yield name, np.stack([np.array(Image.open(f"{folder}/{number}.{ending}")) for number in range(10)])


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the golden files again with the authors' code.")
    parser.add_argument("--upstream", type=Path, required=True, help="a clone of the authors' repository")
    parser.add_argument("--output", type=Path, required=True, help="folder of the new files")
    parser.add_argument("--reference", type=Path, default=HERE, help="folder of the files with the inputs")
    given = parser.parse_args()
    torch.set_num_threads(1)
    upstream = import_upstream(given.upstream)
    given.output.mkdir(parents=True, exist_ok=True)
    for function, make in [item for item in globals().items() if item[0].startswith("make_")]:
        name = function.removeprefix("make_")
        with np.load(given.reference / f"{name}.npz") as file:
            stored = {key: file[key] for key in file.files}
        inputs = {key: torch.from_numpy(np.array(value)) for key, value in stored.items()}
        new, largest = dict(stored), {}
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # progress of the authors' code
            made = {key: value for key, value in make(upstream, inputs) if key in stored}
        for key, value in made.items():
            value = value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
            new[key] = value.astype(stored[key].dtype).reshape(stored[key].shape)
            ours, theirs = stored[key].astype(float), new[key].astype(float)
            difference = np.where((ours == theirs) | (np.isnan(ours) & np.isnan(theirs)), 0, abs(ours - theirs))
            largest[key] = float(np.nan_to_num(difference, nan=np.inf).max(initial=0))
        np.savez_compressed(given.output / f"{name}.npz", **new)
        worst = max(largest, key=largest.__getitem__)
        kept = len(stored) - len(largest)
        print(f"{name}: {len(largest)} arrays made from {kept}; largest difference {largest[worst]:.1e} ({worst})")


if __name__ == "__main__":
    main()
