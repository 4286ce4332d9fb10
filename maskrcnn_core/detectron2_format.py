"""Detectron2's Mask R-CNN weights in: names, conventions, and the config that is not in the file.

Enters: a state dict of a GeneralizedRCNN on R50-FPN or R101-FPN, and the name of a recipe. Leaves: a config
and a state dict that loads strictly.

What is different there, and what becomes of it here (C categories, K = C + 1 classes):

- Background is the last of the K classes of cls_score; ours is the first. It is moved.
- bbox_pred has 4C rows and the mask predictor C, none for the background; ours have 4K and K. Zeros go first;
  nothing reads them.
- Pixels are 0 to 255, mostly BGR. conv1's input channels are turned round for RGB; mean and std are divided
  by 255.
- fc1 reads the pooled features flattened as (channel, row, column), as ours does: it stays as it is.
- Where a ResNet has its strides, pixel statistics and channel order are in the training config, hardly ever
  in the file: a Recipe says them. The rest is read from names and shapes, and must agree with the recipe.

Source: Detectron2's config/defaults.py, checkpoint/detection_checkpoint.py, layers/batch_norm.py, modeling/.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from maskrcnn_core.anchors import cell_anchors
from maskrcnn_core.checkpoint import CheckpointError
from maskrcnn_core.config import MaskRCNNConfig, r50_fpn, r50_fpn_v2, r101_fpn
from maskrcnn_core.detectron2_recipes import RECIPES, Layers, Recipe
from maskrcnn_core.foreign_weights import check_fit, wanted_tensors

_FROZEN_BN_EPS = 1e-5
_FROZEN_BN_WITH_EPS = 3  # FrozenBatchNorm2d before this version of its layout added no eps to the variance


# Buffers of old checkpoints that a config says as well.
_PIXEL_BUFFERS = ("pixel_mean", "pixel_std")
_CELL_ANCHORS = re.compile(r"proposal_generator\.anchor_generator\.cell_anchors\.(\d)")

# Our names to theirs, the first that matches; {n} is the first number plus n.
_NAMES = tuple(
    (re.compile(ours), theirs)
    for ours, theirs in (
        (r"backbone\.body\.conv1\.(.+)", r"backbone.bottom_up.stem.conv1.\1"),
        (r"backbone\.body\.bn1\.(.+)", r"backbone.bottom_up.stem.conv1.norm.\1"),
        (
            r"backbone\.body\.layer(\d)\.(\d+)\.downsample\.0\.(.+)",
            r"backbone.bottom_up.res{1}.\2.shortcut.\3",
        ),
        (
            r"backbone\.body\.layer(\d)\.(\d+)\.downsample\.1\.(.+)",
            r"backbone.bottom_up.res{1}.\2.shortcut.norm.\3",
        ),
        (r"backbone\.body\.layer(\d)\.(\d+)\.conv(\d)\.(.+)", r"backbone.bottom_up.res{1}.\2.conv\3.\4"),
        (r"backbone\.body\.layer(\d)\.(\d+)\.bn(\d)\.(.+)", r"backbone.bottom_up.res{1}.\2.conv\3.norm.\4"),
        (r"backbone\.fpn\.inner_blocks\.(\d)\.0\.(.+)", r"backbone.fpn_lateral{2}.\2"),
        (r"backbone\.fpn\.inner_blocks\.(\d)\.1\.(.+)", r"backbone.fpn_lateral{2}.norm.\2"),
        (r"backbone\.fpn\.layer_blocks\.(\d)\.0\.(.+)", r"backbone.fpn_output{2}.\2"),
        (r"backbone\.fpn\.layer_blocks\.(\d)\.1\.(.+)", r"backbone.fpn_output{2}.norm.\2"),
        (r"rpn\.head\.conv\.(\d)\.0\.(.+)", r"proposal_generator.rpn_head.conv.conv{0}.\2"),
        (r"rpn\.head\.cls_logits\.(.+)", r"proposal_generator.rpn_head.objectness_logits.\1"),
        (r"rpn\.head\.bbox_pred\.(.+)", r"proposal_generator.rpn_head.anchor_deltas.\1"),
        (r"roi_heads\.box_head\.fc6\.(.+)", r"roi_heads.box_head.fc1.\1"),
        (r"roi_heads\.box_head\.fc7\.(.+)", r"roi_heads.box_head.fc2.\1"),
        (r"roi_heads\.box_head\.(\d)\.0\.(.+)", r"roi_heads.box_head.conv{1}.\2"),
        (r"roi_heads\.box_head\.(\d)\.1\.(.+)", r"roi_heads.box_head.conv{1}.norm.\2"),
        (r"roi_heads\.box_head\.5\.(.+)", r"roi_heads.box_head.fc1.\1"),
        (r"roi_heads\.box_predictor\.(.+)", r"roi_heads.box_predictor.\1"),
        (r"roi_heads\.mask_head\.(\d)\.0\.(.+)", r"roi_heads.mask_head.mask_fcn{1}.\2"),
        (r"roi_heads\.mask_head\.(\d)\.1\.(.+)", r"roi_heads.mask_head.mask_fcn{1}.norm.\2"),
        (r"roi_heads\.mask_predictor\.conv5_mask\.(.+)", r"roi_heads.mask_head.deconv.\1"),
        (r"roi_heads\.mask_predictor\.mask_fcn_logits\.(.+)", r"roi_heads.mask_head.predictor.\1"),
    )
)


def num_detectron2_categories(weights: Mapping[str, Tensor]) -> int:
    """C, without background.

    Raises:
        CheckpointError: there is no box head.
    """
    return _shape(weights, "roi_heads.box_predictor.cls_score.weight")[0] - 1


def fitting_recipes(weights: Mapping[str, Tensor]) -> list[str]:
    """Recipes that nothing in the file contradicts; several, where only the training config could tell."""
    layers = _layers_of(weights)
    return [
        name
        for name, recipe in RECIPES.items()
        if recipe.layers == layers and not _pixel_contradictions(weights, recipe)
    ]


def from_detectron2(
    weights: Mapping[str, Tensor],
    recipe_name: str,
    categories: tuple[tuple[int, str], ...],
    *,
    versions: Mapping[str, int] | None = None,
) -> tuple[MaskRCNNConfig, dict[str, Tensor]]:
    """Convert a state dict.

    Args:
        weights: of Detectron2.
        recipe_name: one of RECIPES.
        categories: (category_id, name) of Detectron2's classes 0, 1, …: by rising id, as it sorts them.
        versions: module path -> version of its layout (`_metadata`), which old frozen batch norms need.

    Returns:
        the config, and the state dict for MaskRCNN(config).

    Raises:
        CheckpointError: no such recipe; the weights contradict it; or names or shapes are no Mask R-CNN's of
            ours, and the message lists Detectron2's names.
    """
    if recipe_name not in RECIPES:
        raise CheckpointError(f"recipe {recipe_name!r}; wanted one of {', '.join(RECIPES)}.")
    recipe = RECIPES[recipe_name]
    _refuse_contradictions(weights, recipe, recipe_name)
    config = _config_of(weights, recipe, categories)
    wanted = wanted_tensors(config)
    theirs_of = {ours: _their_name(ours, config.rpn_convs) for ours in wanted}
    known = set(theirs_of.values())
    state: dict[str, Tensor] = {
        key: tensor
        for key, tensor in weights.items()
        if key not in known and key not in _PIXEL_BUFFERS and not _CELL_ANCHORS.fullmatch(key)
    }  # nothing, or check_fit says that it is unexpected
    for ours, theirs in theirs_of.items():
        tensor = _find(weights, theirs, wanted[ours])
        if tensor is not None:
            state[ours] = tensor
    _convert(state, recipe, config)
    if config.norm == "frozen_bn":
        _add_eps(state, theirs_of, versions or {})
    check_fit(state, wanted, config, theirs_of)
    return config, state


def _convert(state: dict[str, Tensor], recipe: Recipe, config: MaskRCNNConfig) -> None:
    """The differences of convention, in place; shapes are not looked at, check_fit does."""

    def change(prefix: str, new: str) -> None:
        for key in (f"{prefix}.weight", f"{prefix}.bias"):
            if key in state and state[key].ndim > 0:
                state[key] = _ROWS[new](state[key])

    if recipe.bgr and "backbone.body.conv1.weight" in state:
        state["backbone.body.conv1.weight"] = state["backbone.body.conv1.weight"].flip(1)
    change("roi_heads.box_predictor.cls_score", "last first")
    if not config.box_class_agnostic:
        change("roi_heads.box_predictor.bbox_pred", "four zeros first")
    if not config.mask_class_agnostic:
        change("roi_heads.mask_predictor.mask_fcn_logits", "one zero first")


_ROWS = {
    "last first": lambda rows: torch.cat((rows[-1:], rows[:-1])),
    "four zeros first": lambda rows: torch.cat((rows.new_zeros((4, *rows.shape[1:])), rows)),
    "one zero first": lambda rows: torch.cat((rows.new_zeros((1, *rows.shape[1:])), rows)),
}


def _find(weights: Mapping[str, Tensor], theirs: str, wanted: Tensor) -> Tensor | None:
    """The tensor; zero for a counter of batches that a conversion left out."""
    if theirs.endswith(".norm.num_batches_tracked") and theirs not in weights:
        return torch.zeros(wanted.shape, dtype=wanted.dtype)
    return weights.get(theirs)


def _add_eps(state: dict[str, Tensor], theirs_of: Mapping[str, str], versions: Mapping[str, int]) -> None:
    """Variances of old frozen batch norms, to which nothing was added: less eps, which is added now."""
    for ours, theirs in theirs_of.items():
        version = versions.get(theirs.removesuffix(".running_var"))
        if ours.endswith(".running_var") and version is not None and version < _FROZEN_BN_WITH_EPS:
            state[ours] = state[ours] - _FROZEN_BN_EPS


def _config_of(
    weights: Mapping[str, Tensor], recipe: Recipe, categories: tuple[tuple[int, str], ...]
) -> MaskRCNNConfig:
    num_categories = num_detectron2_categories(weights)
    if num_categories != len(categories):
        raise CheckpointError(
            f"the weights have {num_categories} categories (and background), the list has {len(categories)}."
        )
    layers = recipe.layers
    preset = r101_fpn if layers.backbone == "resnet101" else r50_fpn_v2 if layers.rpn_convs == 2 else r50_fpn
    # SyncBN acts in training only. Where a frozen network was trained as an ordinary one, its counters show.
    tracked = "backbone.bottom_up.stem.conv1.norm.num_batches_tracked" in weights
    mask_convs = [k for k in weights if re.fullmatch(r"roi_heads\.mask_head\.mask_fcn\d+\.weight", k)]
    return preset(categories).replace(
        norm="bn" if layers.batch_norm or tracked else "frozen_bn",
        norm_eps=_FROZEN_BN_EPS,
        stride_in_1x1=recipe.stride_in_1x1,
        trainable_stages=recipe.trainable_stages,
        fpn_channels=_shape(weights, "backbone.fpn_lateral2.weight")[0],
        fpn_norm=layers.batch_norm,
        anchor_rounding=False,
        anchor_strides="nominal",
        rpn_convs=layers.rpn_convs,
        rpn_post_nms_train=1000,  # configs/Base-RCNN-FPN.yaml
        rpn_smooth_l1_beta=0.0,
        roi_sampling_ratio=0,
        roi_aligned=True,  # POOLER_TYPE ROIAlignV2
        box_head=layers.box_head,
        box_head_channels=_shape(weights, "roi_heads.box_head.fc1.weight")[0],
        box_class_agnostic=_shape(weights, "roi_heads.box_predictor.bbox_pred.weight")[0] == 4
        and num_categories > 1,
        box_smooth_l1_beta=0.0,
        mask_head_channels=_shape(weights, "roi_heads.mask_head.deconv.weight")[1],
        mask_head_convs=len(mask_convs),
        mask_head_norm=layers.batch_norm,
        mask_class_agnostic=_shape(weights, "roi_heads.mask_head.predictor.weight")[0] == 1
        and num_categories > 1,
        image_mean=_to_rgb_fractions(recipe.pixel_mean, recipe.bgr),
        image_std=_to_rgb_fractions(recipe.pixel_std, recipe.bgr),
    )


def _to_rgb_fractions(values: tuple[float, float, float], bgr: bool) -> tuple[float, float, float]:
    first, second, third = (value / 255 for value in values)
    return (third, second, first) if bgr else (first, second, third)


def _refuse_contradictions(weights: Mapping[str, Tensor], recipe: Recipe, name: str) -> None:
    found = _layers_of(weights)
    contradictions = [
        f"{field} is {got!r} in the weights and {wanted!r} in the recipe"
        for field, got in vars(found).items()
        if got != (wanted := getattr(recipe.layers, field))
    ] + _pixel_contradictions(weights, recipe)
    if contradictions:
        fitting = fitting_recipes(weights)
        raise CheckpointError(
            f"the weights contradict recipe {name}: {'; '.join(contradictions)}. "
            + (f"Recipes that fit: {', '.join(fitting)}." if fitting else "No recipe fits.")
        )


def _layers_of(weights: Mapping[str, Tensor]) -> Layers:
    """What the names show.

    Raises:
        CheckpointError: a ResNet of another depth, or group norm.
    """
    blocks = {
        int(match[1])
        for key in weights
        if (match := re.match(r"backbone\.bottom_up\.res4\.(\d+)\.conv3\.weight", key))
    }
    depth = {6: "resnet50", 23: "resnet101"}.get(len(blocks))
    if depth is None:
        raise CheckpointError(
            f"the backbone has {len(blocks)} bottlenecks in res4; wanted 6 (ResNet-50) or 23 (ResNet-101)."
        )
    for norm in ("backbone.bottom_up.stem.conv1.norm", "backbone.fpn_lateral2.norm"):
        if f"{norm}.weight" in weights and f"{norm}.running_var" not in weights:
            raise CheckpointError(
                f"{norm} has no running statistics: group norm, of 32 groups; ours has groups of 8 channels."
            )
    batch_norm = "backbone.fpn_lateral2.norm.weight" in weights
    rpn_convs = sum(
        bool(re.fullmatch(r"proposal_generator\.rpn_head\.conv(\.conv\d)?\.weight", key)) for key in weights
    )
    box_head = "4conv1fc" if "roi_heads.box_head.conv1.weight" in weights else "2fc"
    return Layers(depth, rpn_convs, box_head, batch_norm)


def _pixel_contradictions(weights: Mapping[str, Tensor], recipe: Recipe) -> list[str]:
    """Old checkpoints hold the pixel statistics, and the anchors around a position."""
    problems = []
    for key, wanted in (("pixel_mean", recipe.pixel_mean), ("pixel_std", recipe.pixel_std)):
        found = weights.get(key)
        if found is not None and (
            found.numel() != 3 or not torch.allclose(found.flatten().float(), torch.tensor(wanted), atol=1e-3)
        ):
            problems.append(
                f"{key} is {found.flatten().tolist()[:3]} in the weights and {list(wanted)} in the recipe"
            )
    default = r50_fpn()
    for key, found in weights.items():
        match = _CELL_ANCHORS.fullmatch(key)
        if match is None or int(match[1]) >= len(default.anchor_sizes):
            continue
        size = default.anchor_sizes[int(match[1])]
        expected = cell_anchors(size, default.anchor_ratios, rounding=False)
        if found.shape != expected.shape or not torch.allclose(found.float(), expected, atol=1e-2):
            problems.append(f"{key} holds other anchors than {default.anchor_ratios} of {size} px")
    return problems


def _their_name(ours: str, rpn_convs: int) -> str:
    for pattern, theirs in _NAMES:
        if match := pattern.fullmatch(ours):
            name = match.expand(theirs)
            name = re.sub(r"\{(\d)\}", lambda shift: str(int(match[1]) + int(shift[1])), name)
            if rpn_convs == 1:
                name = name.replace("rpn_head.conv.conv0.", "rpn_head.conv.")
            return name
    raise AssertionError(f"no name for {ours}")


def _shape(weights: Mapping[str, Tensor], key: str) -> tuple[int, ...]:
    if key not in weights or weights[key].ndim == 0:
        raise CheckpointError(f"{key} is missing: these are not the weights of a Mask R-CNN with an FPN.")
    return tuple(weights[key].shape)
