"""Makes the golden files again with the authors' code, and compares them with those that are here.

    git clone https://github.com/mhamilton723/STEGO UPSTREAM
    git -C UPSTREAM checkout eb4d6b521740bd4265681b353547f2ffca65d673
    python tests/golden/make_golden.py --upstream UPSTREAM --output NEW

Inputs and everything random (points, permutations, weights) are those of the files; the authors' functions compute the
outputs from them. Packages that these functions do not use, such as Lightning and hydra, are replaced by stubs.
"""

import argparse
import sys
import tempfile
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
STUBS = (
    "hydra", "omegaconf", "wget", "torchmetrics", "torch._six", "torch.utils.tensorboard.summary", "pytorch_lightning",
    "pytorch_lightning.loggers", "pytorch_lightning.callbacks", "pytorch_lightning.utilities.seed",
)  # fmt: skip


class Module(torch.nn.Module):
    """In place of a LightningModule: keeps what is logged, and runs the three optimizers by hand."""

    global_step = 0

    def save_hyperparameters(self):
        self.logged, self.optimizers = {}, lambda: self.adams
        self.manual_backward = torch.Tensor.backward

    def log(self, name, value, **_):
        self.logged.setdefault(name, []).append(value.detach())


class Metric:
    """In place of a torchmetrics.Metric."""

    def __init__(self, **_):
        pass

    def add_state(self, name, default, **_):
        setattr(self, name, default)


def import_upstream(folder: Path) -> SimpleNamespace:
    """The authors' modules, on the CPU."""
    names = dict(main=lambda **_: lambda function: function, LightningModule=Module, Metric=Metric)
    sys.modules |= dict.fromkeys(STUBS, MagicMock(**names))
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


def make_correlation_loss(up, g, out):
    sample = up.modules.sample
    out["sampled_feats_coords1"] = sample(g["feats"], g["coords1"])
    out["sampled_code_coords2"] = sample(g["code"], g["coords2"])
    out["nonsquare_sampled"] = sample(g["nonsquare_map"], g["nonsquare_coords"])
    for key in [name.removesuffix(".total") for name in g if name.endswith(".total")]:
        cfg = config(up, g, pointwise=key[2] == "1", zero_clamp=key[6] == "1", stabalize=key[10] == "1")
        codes = [g[name].clone().requires_grad_() for name in ("code", "code_pos")]
        with drawn(up, [g["coords1"], g["coords2"]], g["perms"]):
            results = up.modules.ContrastiveCorrelationLoss(cfg)(g["feats"], g["feats_pos"], None, None, *codes)
        total = 0
        for kind, loss, values in zip(
            ("pos_intra", "pos_inter", "neg_inter"), results[::2], results[1::2], strict=True
        ):
            total = total + getattr(cfg, f"{kind}_weight") * loss.mean()
            out |= {f"{key}.{kind}_loss": loss.mean(), f"{kind}_cd": values, f"{kind}_cd_mean": values.mean()}
        total.backward()
        out |= {f"{key}.total": total, f"{key}.neg_inter_loss_full": results[4]}
        out |= {f"{key}.grad_code": codes[0].grad, f"{key}.grad_code_pos": codes[1].grad}


def make_probes(up, g, out):
    model = segmenter(up, 10, g)
    model.net.forward = lambda image: (image, image)  # codes are given
    weights = {"linear_probe.weight": g["linear_weight"], "linear_probe.bias": g["linear_bias"]}
    model.load_state_dict(weights | {"cluster_probe.clusters": g["clusters"]}, strict=False)
    probe, linear = model.cluster_probe, model.linear_probe
    for key, alpha in (("none", None), ("alpha2", 2), ("alpha0p5", 0.5)):
        x = g["x"].clone().requires_grad_()
        probe.zero_grad()
        out[f"{key}.loss"], out[f"{key}.probs"] = loss, probs = probe(x, alpha)
        loss.backward()
        out |= {f"{key}.grad_clusters": probe.clusters.grad.clone(), f"{key}.grad_x": x.grad}
        out[f"{key}.argmax"] = probs.argmax(1)
    out |= {f"logprobs_alpha{alpha}": probe(g["x"], alpha, log_probs=True) for alpha in (1, 2)}
    batch = dict.fromkeys(("ind", "img_aug", "coord_aug", "label_pos"))
    batch |= {"img": g["x"], "img_pos": g["x"], "label": g["label"]}
    model.adams = [MagicMock(zero_grad=model.zero_grad)] * 3  # no steps
    with patch.object(up.modules.ContrastiveCorrelationLoss, "forward", lambda *_: [torch.zeros(1)] * 6):
        model.training_step(batch, 0)
    out |= {"linear_loss": model.logged["loss/linear"][0], "step_cluster_loss": model.logged["loss/cluster"][0]}
    out |= {"linear_grad_weight": linear.weight.grad, "linear_grad_bias": linear.bias.grad}
    out |= {"step_cluster_grad": probe.clusters.grad, "linear_logits_lowres": linear(g["x"])}
    model.linear_metrics.update = lambda preds, _: out.update(eval_linear_argmax=preds)
    model.cluster_metrics.update = lambda preds, _: out.update(eval_cluster_argmax=preds)
    model.validation_step(batch, 0)
    code = F.interpolate(g["x"], g["label"].shape[-2:], mode="bilinear", align_corners=False)[:1]
    out["eval_linear_logsoftmax_img0"] = linear(code).log_softmax(1)[0]
    out["eval_cluster_logprobs_img0"] = probe(code, 2, log_probs=True)[0]


def make_metrics(up, g, out):
    for key in [name.removesuffix("n_classes") for name in g if name.endswith(".n_classes")]:
        case = {name.removeprefix(key): value for name, value in g.items() if name.startswith(key)}
        sizes, hungarian = (int(case["n_classes"]), int(case["extra_clusters"])), bool(case["hungarian"])
        metrics = up.utils.UnsupervisedMetrics("", *sizes, hungarian)
        if "preds" in case:
            for half in zip(case["preds"].long().chunk(2), case["labels"].long().chunk(2), strict=True):
                metrics.update(*half)
        else:
            metrics.stats = case["stats"]
        out[f"{key}stats"] = metrics.stats
        if case["raises"]:
            continue
        out |= {f"{key}{name}_f64": value for name, value in metrics.compute().items()}
        out[f"{key}histogram"] = table = metrics.histogram
        out[f"{key}iou_per_class"] = table.diag() / (table.sum(0) + table.sum(1) - table.diag())
        if hungarian:
            out[f"{key}map_clusters"] = metrics.map_clusters(torch.arange(sum(sizes)))
            for name in ("assignments", "assignments_t")[: 1 + bool(sizes[1])]:
                out[f"{key}{name}_rows"], out[f"{key}{name}_cols"] = getattr(metrics, name)


def make_knn(up, g, out):
    maps, script = g["feature_maps"], up.precompute_knns
    out["normed_feats"] = script.get_feats(torch.nn.Identity(), [{"img": maps}])
    images = patch.object(script, "ContrastiveSegDataset", lambda **_: [{"img": image} for image in maps])
    network = patch.object(
        up.modules, "DinoFeaturizer", lambda *_: up.modules.LambdaLayer(lambda image: (image, image))
    )
    with tempfile.TemporaryDirectory() as folder, images, network:
        script.my_app(config(up, g, pytorch_data_dir=folder, output_root=folder, num_workers=0))
        out["nns"] = np.load(next(Path(folder).glob("nns/*.npz")))["nns"]


def make_trajectory(up, g, out):
    model = segmenter(up, 32, g, lr=g["lr_net"].item())
    names = [name.removeprefix("init.") for name in g if name.startswith("init.")]
    model.load_state_dict({name: g[f"init.{name}"] for name in names}, strict=False)
    model.adams = model.configure_optimizers()
    batch = dict.fromkeys(("ind", "img_aug", "coord_aug", "label_pos"))
    batch |= {"img": g["feats"], "img_pos": g["feats_pos"], "label": g["label"]}
    for coords1, coords2, perms in zip(g["coords1"], g["coords2"], g["perms"], strict=True):
        with drawn(up, [coords1, coords2], perms):
            model.training_step(batch, 0)
    out |= {f"log.{name.replace('/', '_')}": torch.stack(values) for name, values in model.logged.items()}
    out |= {f"final.{name}": value for name, value in model.state_dict().items()}
    out["final_code"] = model.net.eval()(g["feats"])[1]


def make_crf(up, g, out):
    crf, unnorm = up.crf, up.crf.unnorm
    out["params_max_iter"] = crf.MAX_ITER
    for key in ("sq64", "rect96x64"):
        image, original = g[f"{key}.image_tensor"], g[f"{key}.image_rgb_uint8"].permute(2, 0, 1)
        out[f"{key}.image_used_rgb_uint8"] = np.array(crf.VF.to_pil_image(unnorm(image)))
        changes = {"Q": {"MAX_ITER": crf.MAX_ITER}, "Q_bilateral_only": {"POS_W": 0}, "Q_gaussian_only": {"Bi_W": 0}}
        changes |= {f"Q_iter{count}": {"MAX_ITER": count} for count in (0, 1, 2, 5)}
        changes["Q_with_original_uint8"] = {"unnorm": lambda _, original=original: original}
        for name, change in changes.items():
            with patch.multiple(crf, **change):
                out[f"{key}.{name}"] = crf.dense_crf(image, g[f"{key}.logprobs"])
        out[f"{key}.argmax"] = out[f"{key}.Q"].argmax(0)
        out[f"{key}.unary_argmax"] = out[f"{key}.Q_iter0"].argmax(0)


def make_crf_loss(up, g, out):
    parameters = "params_alpha_beta_gamma_w1_w2_shift"
    for key in ("default", "wide", "train"):
        coords, codes = g[f"{key}.coords"], g["train.code" if key == "train" else "clusters"].clone().requires_grad_()
        guidance, clusters = g["guidance"], codes
        if key == "train":
            guidance, clusters = up.utils.resize(g["train.img"], 56), up.modules.norm(up.utils.resize(codes, 56))
            out["train.resized_code_normed"] = clusters[:1]
        options, rows = g["wide." + parameters if key == "wide" else "default." + parameters], iter(coords[:, None])
        with patch("torch.randint", lambda *_, rows=rows, **__: next(rows)):
            loss = up.modules.ContrastiveCRFLoss(coords.shape[1], *options.tolist())(guidance, clusters)
        loss.mean().backward()
        out |= {f"{key}.out": loss, f"{key}.mean": loss.mean(), f"{key}.grad_clusters": codes.grad}
        out[f"{key}.grad_code"] = codes.grad


def make_head(up, g, out):
    norm = partial(torch.nn.LayerNorm, eps=1e-6)
    options = dict(patch_size=8, embed_dim=96, depth=3, num_heads=6, qkv_bias=True, norm_layer=norm)
    vit = up.vision_transformer.VisionTransformer(**options)
    vit.load_state_dict({name.removeprefix("vit."): value for name, value in g.items() if name.startswith("vit.")})
    net = featurizer(up, vit, 96, config(up, g, dino_patch_size=8)).eval()
    net.load_state_dict({name[5:]: value for name, value in g.items() if name.startswith("head.")}, strict=False)
    out["head_out_linear"] = linear = net.cluster1(g["head_in"])
    out["head_out_nonlinear"] = linear + net.cluster2(g["head_in"])
    for size in ("64x64", "64x96", "96x64", "224x224"):
        height, width = map(int, size.split("x"))
        places = torch.zeros(1, 1 + height * width // 64, 96)
        out[f"posenc_{size}"] = vit.interpolate_pos_encoding(places, height, width)
        if f"img_{size}" not in g:
            continue
        image = g[f"img_{size}"]
        image = image.repeat_interleave(height // image.shape[2], 2).repeat_interleave(width // image.shape[3], 3)
        for net.feat_type in ("KK", "feat"):
            features, out[f"{net.feat_type}_code_{size}"] = net(image)
            out[f"{net.feat_type}_feats_{size}"] = features
            out[f"{net.feat_type}_feats_{size}_every4th"] = features[:, :, ::4, ::4]
        out |= {f"feat_feats_{size}_n2": net(image, n=2)[0], f"cls_feat_{size}": vit(image)}
        out[f"feat_code_{size}_projection_linear"] = net.cluster1(features)


def make_transforms(up, g, out):
    image, label = (Image.fromarray(g[name].numpy()) for name in ("image", "label"))
    for key, crop in (("center32", "center"), ("none32", None)):
        read_image, read_label = (up.utils.get_transform(32, is_label, crop) for is_label in (False, True))
        out |= {f"{key}.image_out": read_image(image), f"{key}.label_out": read_label(label)}
        for height, width in g["idx_sizes"].tolist():
            rows, cols = np.indices((height, width), dtype=np.uint8)
            out[f"idx.{key}.{height}x{width}.rows"] = read_label(Image.fromarray(rows))[0, :, 0]
            out[f"idx.{key}.{height}x{width}.cols"] = read_label(Image.fromarray(cols))[0, 0]
    computer = up.crop_datasets.RandomCropComputer.__new__(up.crop_datasets.RandomCropComputer)
    for name in [name for name in g if name.startswith("five.boxes_")]:
        size, ratio = name.removeprefix("five.boxes_").split("_ratio")
        height, width = map(int, size.split("x"))
        computer.crop_ratio = float(ratio)
        corners = computer.five_crops(0, torch.arange(height * width).view(1, height, width))
        out[name] = [[*divmod(int(crop[0, 0, 0]), width), *crop.shape[1:]] for crop in corners]
    computer.crop_ratio = 0.5
    pixels, ids = up.utils.T.ToTensor()(image), up.utils.ToTargetTensor()(label)[0]
    out["five.image_crops"] = torch.stack(computer.five_crops(0, pixels))
    out["five.label_crops"] = torch.stack(computer.five_crops(0, ids))
    ids = torch.where(ids == 255, -1, ids)
    pairs = [(pixels, ids), (pixels.flip(1), ids.flip(0))]
    computer.dataset = [{"img": computer.five_crops(0, a), "label": computer.five_crops(0, b)} for a, b in pairs]
    with tempfile.TemporaryDirectory() as folder:
        computer.img_dir = computer.label_dir = folder
        for item in range(2):
            computer[item]
        for name, ending in (("five.saved_label_png", "png"), ("five.saved_jpg_decoded", "jpg")):
            out[name] = np.stack([np.array(Image.open(f"{folder}/{number}.{ending}")) for number in range(10)])


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
        made, new, largest = {}, dict(stored), {}
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # progress of the authors' code
            make(upstream, inputs, made)
        for key, value in [item for item in made.items() if item[0] in stored]:
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
