"""The operators of the hot path that libraries offer for one image, with sizes that follow the data.

Here each works on a whole batch (crop_align: on the masks of one image), gives tensors of a fixed size, and
is a `torch.library` operator with a kernel for CPUs (cpu/, Numba) and one for GPUs (cuda/, Triton), each
loaded when first used.
"""

from maskrcnn_core.ops.crop_align import crop_align
from maskrcnn_core.ops.nms import nms
from maskrcnn_core.ops.resize import resize_normalize
from maskrcnn_core.ops.roi_align import roi_align

__all__ = ["crop_align", "nms", "resize_normalize", "roi_align"]
