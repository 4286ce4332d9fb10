"""How many input shapes photographs need, and how much of the input is padding.

Run:  python benchmarks/shapes.py [--photos ../shared/data/coco_photos] [--out benchmarks/results]
"""

from __future__ import annotations

import sys
from collections import Counter

from benchmarks.common import photographs as photos
from benchmarks.common.report import arguments, write_report
from maskrcnn_core.config import r50_fpn
from maskrcnn_core.shapes import Size, common_shape, common_shapes, input_size, tight_shape

WANTED_SHAPES, WANTED_PADDING = 8, 0.12


def main() -> None:
    parser = arguments(__doc__)
    photos.add_options(parser)
    args = parser.parse_args()

    config = r50_fpn()
    images = photos.load(args.photos, splits=("train2017", "val2017"))
    sizes = [input_size(config, *image.shape[:2]) for image in images]
    tight = [tight_shape(size) for size in sizes]
    common = [common_shape(config, size) for size in sizes]
    long_sides = [*range(1000, 3000), *range(3000, 20_000_000, 9973)]  # aspects from 1:1 to 1:20000
    every = {common_shape(config, input_size(config, 1000, side)) for side in long_sides}
    every |= {common_shape(config, input_size(config, side, 1000)) for side in long_sides}
    table = [
        ["padding", "shapes that any aspect needs", "shapes met", "padded pixels"],
        ["tight", "unbounded", str(len(set(tight))), f"{padded(sizes, tight):.1%}"],
        ["common", str(len(every)), str(len(set(common))), f"{padded(sizes, common):.1%}"],
        ["must reach", f"at most {WANTED_SHAPES}", "", f"at most {WANTED_PADDING:.0%}"],
    ]
    met = ", ".join(f"{h}×{w}: {n}" for (h, w), n in sorted(Counter(common).items()))
    facts = [
        f"{len(images)} photographs",
        f"common shapes: {', '.join(f'{h}×{w}' for h, w in common_shapes(config))}",
        f"met: {met}",
    ]
    write_report("shapes", "Input shapes and padding", ["numpy"], facts, table, args.out)
    if len(every) > WANTED_SHAPES or padded(sizes, common) > WANTED_PADDING:
        sys.exit("a figure is not what it must be")


def padded(sizes: list[Size], shapes: list[Size]) -> float:
    """Share of the input's pixels that are padding."""
    return 1 - sum(h * w for h, w in sizes) / sum(h * w for h, w in shapes)


if __name__ == "__main__":
    main()
